"""Paired comparison of runs on the same cases: masks case by case, classes as a set."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import Task
from amkd_monai.files.names import some
from amkd_monai.metrics.classification import class_metrics, delong_test, labels_and_probabilities, problems_of
from amkd_monai.metrics.statistics import bootstrap_ci, bootstrap_p, holm, interval, resampled, wilcoxon_p
from amkd_monai.metrics.summary import Row, part_of, read_case_csv
from amkd_monai.terminal import align

SIZE = "reference_volume"
Key = tuple[str, ...]  # key of a row in a case file: its id, and for masks its class


def compare_runs(
    reference_csv: str | Path, other_csvs: Mapping[str, str | Path], metric: str | None = None, task: Task | None = None
) -> list[dict[str, Any]]:
    """Compare runs with a reference run on the same cases.

    Masks are compared case by case, class by class and region by region; background, and pairs where either run has no
    value (NaN), are left out, the pairs counted. Metrics of classes belong to the whole set: a single area under the
    ROC curve is compared by DeLong's test, any other metric by a paired bootstrap over cases. The p values of all
    returned rows form one family for the Holm adjustment.

    Args:
        reference_csv: case file of the reference run.
        other_csvs: case file of each run to compare with it, by name; of the same cases and labels.
        metric: what to compare; None takes the Dice of masks, and of classes the primary metric and all single areas.
        task: task of the runs; None if their images have masks.

    Returns:
        One row per run and class (of masks) or metric (of classes): ``name``, ``class`` (of classes the metric),
        ``metric``, ``n`` (pairs), ``left_out``, ``reference_mean``, ``mean`` (both over the pairs), ``difference`` (run
        minus reference) with ``ci_low`` and ``ci_high`` (95 %), ``test``, its two-sided ``p``, and ``p_holm``.

    Raises:
        ValueError: no such metric, or runs on different cases or data.
    """
    classes = task if task is not None and task.is_classification else None
    if classes is not None and metric not in (None, *(known := class_metrics(classes))):
        raise ValueError(f"There is no metric '{metric}' for {classes.name}: use one of {', '.join(known)}.")
    columns, key = (("id", "label"), ("id",)) if classes else (("id", "class", metric or "dice"), ("id", "class"))
    reference = _load(reference_csv, columns, key)
    rows: list[dict[str, Any]] = []
    for name, path in other_csvs.items():
        other = _load(path, columns, key)
        if unpaired := reference.keys() ^ other.keys():
            shown = some(map(" ".join, unpaired))
            raise ValueError(f"{len(unpaired)} case(s) are only in one of '{name}' and the reference: {shown}.")
        both = [case for case, row in reference.items() if SIZE in row and SIZE in other[case]]
        then, now = (np.array([float(of[case][SIZE]) for case in both]) for of in (reference, other))
        alike = np.isclose(then, now, rtol=1e-3, equal_nan=True)
        if changed := [" ".join(case) for case, same in zip(both, alike, strict=True) if not same]:
            what = f"other labels than the reference, {len(changed)} case(s) differ in size: {some(changed)}"
            raise ValueError(f"The run '{name}' was scored on {what}. Compare runs on the same data.")
        if classes is not None:
            found = _compare_classes(other, reference, metric, classes, name)
        else:
            found = _compare_masks(other, reference, metric or "dice")
        rows += [{"name": name, **row} for row in found]
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def format_comparison(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The rows of :py:func:`compare_runs` as a plain-text table."""
    lines: list[Sequence[str]] = [("", "n", "reference", "mean", "difference", "95 % CI", "p", "p (Holm)")]
    several = len({row["class"] for row in rows}) > 1
    for row in rows:
        name = f"{row['name']} {row['class']}" if several else row["name"]
        values = (f"{row['reference_mean']:.4f}", f"{row['mean']:.4f}", f"{row['difference']:+.4f}")
        bounds = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        lines.append((name, str(row["n"]), *values, bounds, f"{row['p']:.2g}", f"{row['p_holm']:.2g}"))
    return "\n".join([title, align(lines)])


def _compare_masks(other: Mapping[Key, Row], reference: Mapping[Key, Row], metric: str) -> list[dict[str, Any]]:
    """Statistics of paired cases, a row per class."""
    rows = []
    for name in dict.fromkeys(key[1] for key, row in reference.items() if part_of(row) != "background"):
        keys = [key for key in reference if key[1] == name]
        a, b = (np.array([float(of[key][metric]) for key in keys]) for of in (other, reference))
        paired = ~(np.isnan(a) | np.isnan(b))
        a, b = a[paired], b[paired]
        row = {"class": name, "metric": metric, "n": len(a), "left_out": int((~paired).sum())}
        row |= {key: float(x.mean()) if len(x) else math.nan for key, x in (("reference_mean", b), ("mean", a))}
        row |= dict(zip(("difference", "ci_low", "ci_high"), bootstrap_ci(a - b), strict=True))
        rows.append(row | {"p": wilcoxon_p(a - b), "test": "Wilcoxon"})
    return rows


def _compare_classes(
    other: Mapping[Key, Row], reference: Mapping[Key, Row], metric: str | None, task: Task, run: str
) -> list[dict[str, Any]]:
    """Statistics of the set of cases, a row per metric."""
    ids = sorted(reference)
    (label, p), (expected, q) = (labels_and_probabilities(task, [of[i] for i in ids]) for of in (other, reference))
    if (label != expected).any():
        wrong = some(ids[i][0] for i in np.flatnonzero(label != expected))
        raise ValueError(f"The run '{run}' has other labels than the reference for {wrong}.")
    problems, metrics, rows = problems_of(task), class_metrics(task), []
    areas = (f"{problem}_auc" for problem in problems)
    for name in [metric] if metric else dict.fromkeys([task.primary_metric, *areas]):
        of = metrics[name]
        mean, reference_mean = of(label, p), of(label, q)
        problem = problems.get(name.removesuffix("_auc")) if name.endswith("_auc") else None
        positive = np.zeros(0, bool) if problem is None else problem.positive(label)
        if problem is not None and min(positive.sum(), (~positive).sum()) >= 2:
            test, found = "DeLong", delong_test(positive, problem.score(p), problem.score(q))
        else:
            drawn = np.array([of(label[i], p[i]) - of(label[i], q[i]) for i in resampled(len(p))])
            test, found = "bootstrap", (mean - reference_mean, *interval(drawn), bootstrap_p(drawn))
        row = {"class": name, "metric": name, "n": len(label), "left_out": 0, "reference_mean": reference_mean}
        row |= dict(zip(("difference", "ci_low", "ci_high", "p"), found, strict=True))
        rows.append(row | {"mean": mean, "test": test})
    return rows


def _load(path: str | Path, columns: Sequence[str], key: Sequence[str]) -> dict[Key, Row]:
    """Rows of a case file by their key."""
    found: dict[Key, Row] = {}
    for row in read_case_csv(path):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(row)}.")
        named = tuple(str(row[column]) for column in key)
        if named in found:
            raise ValueError(f"{path} has two rows for the case {' '.join(named)}.")
        found[named] = row
    if not found:
        raise ValueError(f"{path} holds no cases.")
    return found
