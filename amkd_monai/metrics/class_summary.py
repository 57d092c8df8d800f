"""From the class probabilities of all cases to the numbers and the table that are reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from amkd_monai.metrics import classification as m
from amkd_monai.metrics.summary import Row, align
from amkd_monai.tasks import Task

SENSITIVITIES = (82, 95)
"""Sensitivities (%) at which specificity is reported: that of dermatologists, and a strict one."""
RESAMPLES = 2000

Metric = Callable[[NDArray[np.int64], NDArray[np.float64]], float]
"""From true classes (N,) and probabilities (N, C)."""


def slug(name: str) -> str:
    """A class name as part of a column's name."""
    return name.lower().replace(" ", "_")


def positive_classes(task: Task) -> dict[str, NDArray[np.bool_]]:
    """The binary problems of a task by name: which of its classes count as positive, (C,)."""
    problems = {}
    if task.referable_from is not None:
        problems["referable"] = np.arange(len(task.classes)) >= task.referable_from
    for name in task.singled_out:
        problems[slug(name)] = np.array([other == name for other in task.classes])
    return problems


def class_metrics(task: Task) -> dict[str, Metric]:
    """The metrics of a classification task by name, the primary one first.

    For every binary problem there are the area under the ROC curve of the summed probability of its positive classes,
    sensitivity and specificity of the predicted class, and specificities at fixed sensitivities.
    """
    classes, problems = len(task.classes), positive_classes(task)
    found: dict[str, Metric] = {}
    if task.referable_from is not None:
        found["qwk"] = lambda y, p: m.quadratic_weighted_kappa(y, p.argmax(1), classes)
    if task.singled_out:
        masks = [problems[slug(name)] for name in task.singled_out]
        found["mean_auc"] = lambda y, p: math.fsum(_area(mask, y, p) for mask in masks) / len(masks)
    for name, mask in problems.items():
        found[f"{name}_auc"] = partial(_area, mask)
        found[f"{name}_sensitivity"] = partial(_called, m.sensitivity, mask)
        found[f"{name}_specificity"] = partial(_called, m.specificity, mask)
        for percent in SENSITIVITIES:
            found[f"{name}_specificity_at_{percent}"] = partial(_specificity_at, percent / 100, mask)
    found["macro_auroc"] = m.macro_auroc
    found["balanced_accuracy"] = lambda y, p: m.balanced_accuracy(y, p.argmax(1))
    found["accuracy"] = lambda y, p: float((p.argmax(1) == y).mean())
    found["ece"] = m.expected_calibration_error
    found["brier"] = m.brier
    return {task.primary_metric: found[task.primary_metric], **found}


def _area(mask: NDArray[np.bool_], y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    return m.auroc(mask[y], p[:, mask].sum(1))


def _called(part: Callable[..., float], mask: NDArray[np.bool_], y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    return part(mask[y], mask[p.argmax(1)])


def _specificity_at(wanted: float, mask: NDArray[np.bool_], y: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    return m.specificity_at_sensitivity(mask[y], p[:, mask].sum(1), wanted)


def class_row(task: Task, case: str, label: int | None, probabilities: ArrayLike) -> Row:
    """One case as a row: ``id``, ``class`` and ``label`` (where it is known), ``prediction``, ``p_<class>``.

    Raises:
        ValueError: the probabilities are not one per class with sum 1, or there is no such class.
    """
    p = np.asarray(probabilities, dtype=float)
    if p.shape != (len(task.classes),) or not np.isfinite(p).all() or abs(p.sum() - 1) > 1e-3 or (p < 0).any():
        raise ValueError(f"'pred' must be {len(task.classes)} probabilities with sum 1, got {p.round(4).tolist()}.")
    row: Row = {"id": case}
    if label is not None:
        if not 0 <= label < len(task.classes):
            raise ValueError(f"the label {label} is no class of {task.name}.")
        row |= {"class": task.classes[label], "label": label}
    row["prediction"] = int(p.argmax())
    return row | {f"p_{slug(name)}": float(v) for name, v in zip(task.classes, p, strict=True)}


def labels_and_probabilities(task: Task, rows: Sequence[Row]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """True classes (N,) and probabilities (N, C) of rows.

    Raises:
        ValueError: there is no row, or a column is missing.
    """
    columns = [f"p_{slug(name)}" for name in task.classes]
    missing = sorted({c for c in ("label", *columns) for row in rows if c not in row})
    if missing or not rows:
        raise ValueError(f"There are no cases of {task.name}, or they lack {', '.join(missing) or 'rows'}.")
    label = np.array([int(row["label"]) for row in rows])
    return label, np.array([[float(row[c]) for c in columns] for row in rows])


def resampled(count: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """Indices of bootstrap samples of cases (resamples, count)."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def summarise_classes(rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """Aggregate rows of cases: every metric with its 95 % bootstrap interval over cases.

    Returns:
        ``cases``, ``classes`` (cases per class), ``metrics`` ({name: ``value``, ``ci_low``, ``ci_high``}),
        ``confusion`` (true classes by row) and ``reliability`` (a row per bin of the largest probability).
        Resamples that lack a class are left out where a metric needs it.
    """
    label, p = labels_and_probabilities(task, rows)
    metrics = class_metrics(task)
    samples = [(label[i], p[i]) for i in resampled(len(label))]
    table = {}
    for name, metric in metrics.items():
        low, high = interval(np.array([metric(y, q) for y, q in samples]))
        table[name] = {"value": metric(label, p), "ci_low": low, "ci_high": high}
    return {
        "cases": len(rows),
        "classes": {name: int((label == c).sum()) for c, name in enumerate(task.classes)},
        "metrics": table,
        "confusion": m.confusion_matrix(label, p.argmax(1), len(task.classes)).tolist(),
        "reliability": m.reliability_table(label, p),
    }


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Bounds of the central 95 % of bootstrap values; NaN are left out."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def format_class_table(summary: Mapping[str, Any], title: str) -> str:
    """The summary as a plain-text table, a line per metric."""
    lines: list[Sequence[str]] = [("", "value", "95 % CI")]
    for name, v in summary["metrics"].items():
        lines.append((name, _number(v["value"]), f"[{_number(v['ci_low'])}, {_number(v['ci_high'])}]"))
    counts = ", ".join(f"{name} {count}" for name, count in summary["classes"].items())
    return "\n".join([f"{title} ({summary['cases']} cases; {counts})", align(lines)])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
