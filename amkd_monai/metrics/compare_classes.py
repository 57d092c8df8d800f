"""Paired comparison of classification runs that were evaluated on the same cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amkd_monai.metrics.class_summary import (
    class_metrics,
    interval,
    labels_and_probabilities,
    positive_classes,
    resampled,
)
from amkd_monai.metrics.classification import delong_test
from amkd_monai.metrics.statistics import holm
from amkd_monai.metrics.summary import Row, read_case_csv
from amkd_monai.tasks import Task

Cases = tuple[NDArray[np.int64], NDArray[np.float64]]


def compare_class_runs(
    reference_csv: str | Path, other_csvs: Mapping[str, str | Path], task: Task, metric: str | None = None
) -> list[dict[str, Any]]:
    """Compare runs with a reference run on the same cases.

    A single area under the ROC curve is compared by DeLong's test, anything else by a paired bootstrap over cases. The
    p values of all returned rows form one family for the Holm adjustment.

    Args:
        reference_csv: case file of the reference run.
        other_csvs: name -> case file of each run to compare with it.
        task: what was asked.
        metric: which metric; None compares the primary one and all single areas.

    Returns:
        Rows as from :py:func:`~amkd_monai.metrics.compare.compare_runs`, where ``class`` is the metric; ``test`` says
        which test gave ``p``.

    Raises:
        ValueError: unknown metric, or the cases or their labels differ.
    """
    known = class_metrics(task)
    if metric is not None and metric not in known:
        raise ValueError(f"There is no metric '{metric}' for {task.name}: use one of {', '.join(known)}.")
    names = [metric] if metric else [task.primary_metric, *(f"{problem}_auc" for problem in positive_classes(task))]
    reference = _by_id(reference_csv)
    rows: list[dict[str, Any]] = []
    for run, path in other_csvs.items():
        other = _by_id(path)
        if reference.keys() != other.keys():
            differing = sorted(reference.keys() ^ other.keys())
            raise ValueError(
                f"Cannot pair the run '{run}' with the reference: {len(differing)} case(s) only in one of them "
                f"({', '.join(differing[:5])})."
            )
        ids = sorted(reference)
        b = labels_and_probabilities(task, [reference[i] for i in ids])
        a = labels_and_probabilities(task, [other[i] for i in ids])
        if (a[0] != b[0]).any():
            wrong = [i for i, same in zip(ids, a[0] == b[0], strict=True) if not same]
            raise ValueError(f"The run '{run}' has other labels than the reference for {', '.join(wrong[:5])}.")
        rows += [{"name": run, "class": name, "metric": name, **_compare(task, name, a, b)} for name in names]
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def _compare(task: Task, name: str, a: Cases, b: Cases) -> dict[str, Any]:
    """Statistics of one metric of a run ``a`` and the reference ``b``."""
    metric = class_metrics(task)[name]
    label = a[0]
    values = {"n": len(label), "left_out": 0, "reference_mean": metric(*b), "mean": metric(*a)}
    mask = positive_classes(task).get(name.removesuffix("_auc")) if name.endswith("_auc") else None
    if mask is not None and min(mask[label].sum(), (~mask[label]).sum()) >= 2:
        difference, low, high, p = delong_test(mask[label], a[1][:, mask].sum(1), b[1][:, mask].sum(1))
        return values | {"difference": difference, "ci_low": low, "ci_high": high, "p": p, "test": "DeLong"}
    draws = resampled(len(label))
    drawn = np.array([metric(label[i], a[1][i]) - metric(label[i], b[1][i]) for i in draws])
    low, high = interval(drawn)
    values |= {"difference": values["mean"] - values["reference_mean"], "ci_low": low, "ci_high": high}
    return values | {"p": bootstrap_p(drawn), "test": "bootstrap"}


def bootstrap_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p value: twice the smaller part of resampled differences on one side of 0 (Efron, Tibshirani, 1993)."""
    known = differences[~np.isnan(differences)]
    if len(known) == 0:
        return math.nan
    below, above = int((known <= 0).sum()), int((known >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(known) + 1))


def _by_id(path: str | Path) -> dict[str, Row]:
    rows: Sequence[Row] = read_case_csv(path)
    found = {str(row["id"]): row for row in rows}
    if len(found) < len(rows) or not rows:
        raise ValueError(f"{path} holds no cases, or an id twice: evaluate that run again.")
    return found
