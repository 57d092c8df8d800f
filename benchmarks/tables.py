"""The tables that compare finished runs: one for masks, one for classes.

Intervals, of a score and of a gain, resample groups (patients, volumes, look-alikes) and seeds; a gain is paired by
case and seed. Tests are Wilcoxon's over cases, seeds averaged first: of Dice, and of the log-likelihood of the true
class, which says more per image than kappa or an area. The p values of a table are one family (Holm). "sees" is the
smallest gain that a row shows with a power of 80 % at Holm's first step over six sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from amkd_monai.data.datasets import Task, get_task
from amkd_monai.metrics.classification import class_metrics, labels_and_probabilities, problems_of
from amkd_monai.metrics.statistics import holm, interval, wilcoxon_p
from amkd_monai.metrics.summary import read_case_csv

RESAMPLES = 2000
MISSED = 0.3
"""Dice below which the share of cases is told."""
GAIN = ("gain [95 % CI]", "sees", "p", "CPU min")
MASK_COLUMNS = ("Dice [95 % CI]", "median", f"below {MISSED}", "IoU", "NSD", "HD95", *GAIN)
CLASS_COLUMNS = ("primary [95 % CI]", "areas", "balanced accuracy", "ECE", "primary gain [95 % CI]", *GAIN)
SEEN = (stats.norm.ppf(1 - 0.05 / 6 / 2) + stats.norm.ppf(0.8)) / (2 * stats.norm.ppf(0.975))
"""The smallest gain seen, in widths of a 95 % interval."""
LEAST = 1e-4
"""Probabilities of true classes count as this at least: a single certain mistake is no infinite loss."""


@dataclass(frozen=True)
class Row:
    """A setting in a table: its task, how many seeds it has, the setting it is compared with."""

    task: str
    seeds: int
    reference: str | None


Estimate = tuple[float, float, float]
"""A value and its 95 % interval."""


@dataclass(frozen=True)
class Line:
    """What a row says; ``gain`` is None and ``p`` NaN where nothing is compared."""

    counts: str
    score: Estimate
    scores: list[str]
    gain: Estimate | None
    p: float


def seed_and_case_ci(matrix: ArrayLike, groups: Sequence[object] | None = None) -> tuple[float, float, float]:
    """Mean over training seeds and cases with a 95 % interval that covers both sources of variation.

    Every seed is scored on the same cases, so rows (seeds) and columns (cases) are resampled independently
    and crossed (Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 1, 2007). With the usual 3 to 5 seeds the
    part due to seeds is underestimated, by about (S - 1) / S in variance: report the spread over seeds as
    well. ``matrix`` (S, N) holds the metric of each run and case, or the differences of two methods; NaN entries are
    left out of every mean. ``groups`` (N,), e.g. patients, are drawn as a whole; None draws cases. Returns
    ``(mean, low, high)``; all NaN without a value, NaN bounds with fewer than two groups.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError(f"matrix must have the shape (seeds, cases) and no infinite value, got {values.shape}.")
    present = ~np.isnan(values)
    known = present.any(axis=0)
    values, present = values[:, known], present[:, known]
    n_seeds, n_cases = values.shape
    of = np.arange(n_cases) if groups is None else np.unique(np.asarray(groups)[known], return_inverse=True)[1]
    filled, n_groups = np.where(present, values, 0.0), len(np.unique(of))
    if n_groups < 2:
        return (float(filled.sum() / present.sum()) if n_cases else np.nan), np.nan, np.nan
    rng, means = np.random.default_rng(0), np.empty(10000)
    for i in range(len(means)):
        # how many times each run, shape (S,), and each case, shape (N,), is drawn
        runs = np.bincount(rng.integers(n_seeds, size=n_seeds), minlength=n_seeds)
        cases = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[of]
        count = runs @ present @ cases
        means[i] = runs @ filled @ cases / count if count else np.nan
    return (float(filled.sum() / present.sum()), *interval(means))


def table(rows: dict[str, Row], output: Path) -> str:
    """Return the runs in ``output`` as Markdown, masks first.

    Raises:
        ValueError: runs are missing.
    """
    parts = []
    for classes, columns in ((False, MASK_COLUMNS), (True, CLASS_COLUMNS)):
        names = [name for name, row in rows.items() if get_task(row.task).is_classification == classes]
        if not names:
            continue
        lines = [(_class_line if classes else _mask_line)(name, rows, output) for name in names]
        cells = [["setting", "seeds x cases", *columns], ["---"] * (len(columns) + 2)]
        for name, line, p in zip(names, lines, holm([line.p for line in lines]), strict=True):
            gain = "" if line.gain is None else _signed(line.gain)
            sees = "" if line.gain is None else f"{SEEN * (line.gain[2] - line.gain[1]):.3f}"
            shown = "" if math.isnan(p) else f"{p:.2g}"
            cells.append([name, line.counts, *line.scores, gain, sees, shown, f"{_minutes(output / name):.1f}"])
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in cells))
    return "\n\n".join(parts)


def _signed(estimate: Estimate) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*estimate)


def _minutes(folder: Path) -> float:
    records = [json.loads(file.read_text()) for file in folder.glob("*/run.json")]
    return float(np.median([record["cpu_seconds"] for record in records])) / 60


def _cases(name: str, row: Row, output: Path) -> dict[str, list[dict[str, Any]]]:
    """Return {case: [its row per seed]}; folds hold different cases."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(row.seeds):
        for folder in sorted((output / name).glob(f"fold*_seed{seed}")):
            if (folder / "per_case.csv").is_file():
                for case in read_case_csv(folder / "per_case.csv"):
                    found.setdefault(str(case["id"]), []).append(case)
    if not found or any(len(values) != row.seeds for values in found.values()):
        raise ValueError(f"The runs of {name} are not complete in {output}: run the benchmark again.")
    return found


def _groups(name: str, cases: Iterable[str], output: Path) -> list[str]:
    """Group of each case, as the splits of the runs say."""
    groups: dict[str, str] = {}
    for split in (output / name).glob("*/split_*.json"):
        groups |= dict(json.loads(split.read_text())["test"])
    return [groups[case] for case in cases]


def _mask_line(name: str, rows: dict[str, Row], output: Path) -> Line:
    cases = _cases(name, rows[name], output)
    scores = {
        metric: np.array([[float(row[metric]) for row in seeds] for seeds in cases.values()]).T
        for metric in ("dice", "iou", "nsd", "hd95")
    }
    groups = _groups(name, cases, output)
    dice = seed_and_case_ci(scores["dice"], groups)
    values = scores["dice"][~np.isnan(scores["dice"])]
    spread = [f"{np.median(values):.3f}", f"{(values < MISSED).mean():.1%}"]
    others = [f"{np.nanmean(scores[metric]):.{digits}f}" for metric, digits in (("iou", 3), ("nsd", 3), ("hd95", 1))]
    empty = int(np.isnan(scores["dice"]).all(axis=0).sum())
    counts = f"{rows[name].seeds} x {len(cases) - empty}" + (f" (+{empty} empty)" if empty else "")
    reference, gain, p = rows[name].reference, None, math.nan
    if reference in rows:
        known = _cases(reference, rows[reference], output)
        _check_pairs(name, rows, cases.keys() == known.keys())
        a, b = (np.array([[float(row["dice"]) for row in t[case]] for case in cases]).T for t in (cases, known))
        gain, p = seed_and_case_ci(a - b, groups), wilcoxon_p(a.mean(axis=0) - b.mean(axis=0))
    return Line(counts, dice, ["{:.3f} [{:.3f}, {:.3f}]".format(*dice), *spread, *others], gain, p)


def _class_line(name: str, rows: dict[str, Row], output: Path) -> Line:
    task = get_task(rows[name].task)
    names, label, runs = _predictions(task, name, rows[name], output)
    groups = _groups(name, names, output)
    metrics = class_metrics(task)
    means = {metric: _mean(metrics[metric], label, runs) for metric in metrics}
    drawn = [_mean(metrics[task.primary_metric], label[i], [runs[s][i] for s in s_]) for s_, i in _draws(runs, groups)]
    low, high = interval(np.array(drawn))
    areas = ", ".join(f"{problem} {means[f'{problem}_auc']:.3f}" for problem in problems_of(task))
    primary = means[task.primary_metric]
    scores = [f"{task.primary_metric} {primary:.3f} [{low:.3f}, {high:.3f}]", areas]
    scores += [f"{means['balanced_accuracy']:.3f}", f"{means['ece']:.3f}"]
    counts, reference = f"{len(runs)} x {len(label)}", rows[name].reference
    if reference not in rows:
        return Line(counts, (primary, low, high), [*scores, ""], None, math.nan)
    known, truth, others = _predictions(task, reference, rows[reference], output)
    _check_pairs(name, rows, known == names and (truth == label).all())
    metric = metrics[task.primary_metric]
    differences = np.array(
        [
            _mean(metric, label[i], [runs[s][i] for s in s_]) - _mean(metric, label[i], [others[s][i] for s in s_])
            for s_, i in _draws(runs, groups)
        ]
    )
    gained = _mean(metric, label, runs) - _mean(metric, label, others)
    a, b = (np.log([p[range(len(label)), label].clip(LEAST) for p in of]) for of in (runs, others))
    gain, p = seed_and_case_ci(a - b, groups), wilcoxon_p(a.mean(axis=0) - b.mean(axis=0))
    return Line(counts, (primary, low, high), [*scores, _signed((gained, *interval(differences)))], gain, p)


def _check_pairs(name: str, rows: dict[str, Row], same_cases: bool) -> None:
    reference = str(rows[name].reference)
    if not same_cases or rows[name].seeds != rows[reference].seeds:
        raise ValueError(f"{name} and {reference} have other cases, labels or seeds: their runs are no pairs.")


def _predictions(
    task: Task, name: str, row: Row, output: Path
) -> tuple[list[str], NDArray[np.int64], list[NDArray[np.float64]]]:
    """Names of cases in their order, true classes (N,), and probabilities (N, C) of each seed."""
    cases = _cases(name, row, output)
    names = sorted(cases)
    seeds = [labels_and_probabilities(task, [cases[c][s] for c in names]) for s in range(row.seeds)]
    return names, seeds[0][0], [p for _, p in seeds]


def _draws(runs: list[NDArray[np.float64]], groups: list[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Bootstrap samples of seeds, and of cases by whole groups."""
    rng, of = np.random.default_rng(0), np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(of == group) for group in range(of.max() + 1)]
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(members), size=len(members))
        yield rng.integers(len(runs), size=len(runs)), np.concatenate([members[group] for group in drawn])


def _mean(metric: Any, label: NDArray[np.int64], runs: list[NDArray[np.float64]]) -> float:
    return float(np.mean([metric(label, p) for p in runs]))
