"""Paired comparison of runs on the same cases: masks case by case, classes as a set; a shared student with others."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import Task, recorded_task
from amkd_monai.files.names import some
from amkd_monai.metrics.classification import class_metrics, delong_test, labels_and_probabilities, positive_classes
from amkd_monai.metrics.statistics import bootstrap_p, holm, interval, paired_bootstrap_ci, paired_wilcoxon, resampled
from amkd_monai.metrics.summary import Row, part_of, read_case_csv
from amkd_monai.storage import read_json
from amkd_monai.terminal import align

SIZE = "reference_volume"
SCORE = ["value", "ci_low", "ci_high"]
DELTA = ["delta", "delta_ci_low", "delta_ci_high", "p", "p_holm"]
Key = tuple[str, ...]
"""Key of a row in a case file: its id, and for masks its class."""


def evaluated_task(metrics_json: str | Path) -> Task | None:
    """Return the task of an evaluated run, from its ``metrics.json``; None where that file is missing."""
    report = read_json(metrics_json)
    return recorded_task(report) if report else None


def compare_runs(
    reference_csv: str | Path, other_csvs: Mapping[str, str | Path], metric: str | None = None, task: Task | None = None
) -> list[dict[str, Any]]:
    """Compare runs with a reference run on the same cases.

    Masks are compared case by case, class by class and region by region; background, and pairs where either run has no
    value (NaN), are left out, the pairs counted. Metrics of classes belong to the whole set: a single area under the
    ROC curve is compared by DeLong's test, any other metric by a paired bootstrap over cases. The p values of all
    returned rows form one family for the Holm adjustment.

    Args:
        reference_csv: case file of the reference run, for example the undistilled student's.
        other_csvs: case file of each run to compare with it, by name.
        metric: what to compare; None takes the Dice of masks, and of classes the primary metric and all single areas.
        task: task of the runs; None if their images have masks.

    Returns:
        One row per run and class (of masks) or metric (of classes): ``name``, ``class`` (of classes the metric),
        ``metric``, ``n`` (pairs), ``left_out``, ``reference_mean``, ``mean`` (both over the pairs), ``difference`` (run
        minus reference) with ``ci_low`` and ``ci_high`` (95 %), ``test``, its two-sided ``p``, and ``p_holm``.

    Raises:
        ValueError: a file lacks the metric, repeats a case, or does not have the cases and labels (of
            masks: their sizes) of the reference; or the metric is unknown.
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
        pairs = {case: (row.get(SIZE), other[case].get(SIZE)) for case, row in reference.items()}
        if changed := [" ".join(case) for case, pair in pairs.items() if None not in pair and not _same(*pair)]:
            raise ValueError(
                f"The run '{name}' was scored on other labels than the reference, {len(changed)} case(s) differ in "
                f"size: {some(changed)}. Compare runs on the same data."
            )
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
        row |= dict(zip(("difference", "ci_low", "ci_high"), paired_bootstrap_ci(a, b), strict=True))
        rows.append(row | {"p": paired_wilcoxon(a, b), "test": "Wilcoxon"})
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
    masks, metrics, rows = positive_classes(task), class_metrics(task), []
    for name in [metric] if metric else [task.primary_metric, *(f"{problem}_auc" for problem in masks)]:
        of = metrics[name]
        mean, reference_mean = of(label, p), of(label, q)
        mask = masks.get(name.removesuffix("_auc")) if name.endswith("_auc") else None
        if mask is not None and min(mask[label].sum(), (~mask[label]).sum()) >= 2:
            test, found = "DeLong", delong_test(mask[label], p[:, mask].sum(1), q[:, mask].sum(1))
        else:
            drawn = np.array([of(label[i], p[i]) - of(label[i], q[i]) for i in resampled(len(p))])
            test, found = "bootstrap", (mean - reference_mean, *interval(drawn), bootstrap_p(drawn))
        row = {"class": name, "metric": name, "n": len(label), "left_out": 0, "reference_mean": reference_mean}
        row |= dict(zip(("difference", "ci_low", "ci_high", "p"), found, strict=True))
        rows.append(row | {"mean": mean, "test": test})
    return rows


def _same(now: Any, then: Any) -> bool:
    return bool(np.isclose(float(now), float(then), rtol=1e-3, equal_nan=True))


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


def score_of(folder: str | Path, task: Task) -> dict[str, float]:
    """Return the primary metric of an evaluated run: ``value``, ``ci_low``, ``ci_high`` (95 %)."""
    path = Path(folder) / "metrics.json"
    report = read_json(path)
    if report.get("task") != task.name:
        raise ValueError(f"{path} is no evaluation of {task.name}: evaluate that run, or correct `compare`.")
    metric = report["summary"]["metrics"][task.primary_metric]
    found = (metric["value" if task.is_classification else "mean"], metric["ci_low"], metric["ci_high"])
    return {name: math.nan if v is None else float(v) for name, v in zip(SCORE, found, strict=True)}


def transfer_rows(
    shared: Mapping[str, Path], tasks: Mapping[str, Task], runs: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Compare a shared student with other runs on each task.

    Args:
        shared: {task: folder of its evaluation by the shared student}.
        tasks: {task: its description}.
        runs: {label: folder, with ``{task}`` in place of the task's name}. Tasks whose folder is not there are left out
            of that comparison; one of them must be there.

    Returns:
        For each task a row of the shared student, then one per run with its score and ``delta``, shared minus run: for
        masks the mean over the paired cases (Wilcoxon), for classes the difference of the metric (bootstrap or
        DeLong). ``p_holm`` adjusts over all rows. Last, for each run the mean delta over tasks.

    Raises:
        ValueError: a folder without an evaluation of its task, or of other cases, or no folder of a run.
    """
    rows: list[dict[str, Any]] = []
    for label, pattern in runs.items():
        if not any(Path(pattern.format(task=name)).is_dir() for name in shared):
            raise ValueError(f"There is no folder {pattern} for any task: correct `compare#{label}`.")
    for name, folder in shared.items():
        task = tasks[name]
        about = {"task": name, "metric": task.primary_metric}
        rows.append({**about, "run": "shared", **score_of(folder, task)})
        for label, pattern in runs.items():
            other = Path(pattern.format(task=name))
            if not other.is_dir():
                continue
            row = {**about, "run": label, **score_of(other, task)}
            csvs = other / "per_case.csv", {"shared": folder / "per_case.csv"}
            compared = compare_runs(*csvs, task.primary_metric, task)
            for found in compared:
                own = {"class": found["class"]} if len(compared) > 1 else {}
                values = [found[key] for key in ("difference", "ci_low", "ci_high", "p")]
                rows.append({**row, **own, **dict(zip(DELTA[:-1], values, strict=True))})
    compared_rows = [row for row in rows if "delta" in row]
    for row, adjusted in zip(compared_rows, holm([row["p"] for row in compared_rows]), strict=True):
        row["p_holm"] = adjusted
    for label in runs:
        deltas = [row["delta"] for row in compared_rows if row["run"] == label]
        rows.append({"task": f"mean of {len(deltas)}", "run": label, "delta": math.fsum(deltas) / len(deltas)})
    return rows


def format_transfer(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`transfer_rows` as a plain-text table."""
    lines = [("task", "run", "metric", "score [95 % CI]", "shared - run [95 % CI]", "p", "p (Holm)")]
    for row in rows:
        task = f"{row['task']} {row['class']}" if "class" in row else row["task"]
        score, delta = _interval(row, SCORE, ".4f"), _interval(row, DELTA, "+.4f")
        chances = (_number(row.get(k), ".2g") for k in ("p", "p_holm"))
        lines.append((task, row["run"], row.get("metric", ""), score, delta, *chances))
    return align(lines)


def transfer_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["task", "run", "metric", "class", *SCORE, *DELTA], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else "-" if math.isnan(value) else format(value, form)


def _interval(row: Mapping[str, Any], names: Sequence[str], form: str) -> str:
    value, low, high, *_ = (_number(row.get(name), form) for name in names)
    return f"{value} [{low}, {high}]" if low else value
