"""Paired comparison of runs that were evaluated on the same cases."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amkd_monai.metrics.statistics import holm, paired_bootstrap_ci, paired_wilcoxon
from amkd_monai.metrics.summary import align, read_case_csv
from amkd_monai.tasks import Task, get_task

IDS_SHOWN = 5
"""How many ids an error message spells out."""


def evaluated_task(metrics_json: str | Path) -> Task | None:
    """Return the task of an evaluated run, from its ``metrics.json``; None where that file is missing.

    Raises:
        ValueError: the file is not a report, or names an unknown task.
    """
    path = Path(metrics_json)
    if not path.is_file():
        return None
    try:
        return get_task(json.loads(path.read_text(encoding="utf-8"))["task"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the report of an evaluation: evaluate that run again.") from error


def compare_runs(
    reference_csv: str | Path, other_csvs: Mapping[str, str | Path], metric: str = "dice"
) -> list[dict[str, Any]]:
    """Compare runs with a reference run, case by case and class by class.

    Pairs where either run has no value (NaN) are left out and counted. The p values of all returned rows form
    one family for the Holm adjustment.

    Args:
        reference_csv: case file of the reference run, for example the undistilled student's.
        other_csvs: name -> case file of each run to compare with it.
        metric: column to compare.

    Returns:
        One row per run and class: ``name``, ``class``, ``metric``, ``n`` (pairs), ``left_out``,
        ``reference_mean``, ``mean`` (both over the pairs), ``difference`` (run minus reference) with
        ``ci_low`` and ``ci_high`` (95 % paired bootstrap), ``p`` (Wilcoxon signed-rank, two-sided) and
        ``p_holm``.

    Raises:
        ValueError: if a file lacks the metric, repeats a case, or does not have the cases of the reference.
    """
    reference = _load(reference_csv, metric)
    rows: list[dict[str, Any]] = []
    for name, path in other_csvs.items():
        other = _load(path, metric)
        _check_same_cases(reference, other, name)
        for class_name in dict.fromkeys(key[1] for key in reference):
            keys = [key for key in reference if key[1] == class_name]
            a = np.array([other[key] for key in keys])
            b = np.array([reference[key] for key in keys])
            rows.append({"name": name, "class": class_name, "metric": metric, **_compare(a, b)})
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return rows


def format_comparison(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The rows of :py:func:`compare_runs` as a plain-text table."""
    lines: list[Sequence[str]] = [("", "n", "reference", "mean", "difference", "95 % CI", "p", "p (Holm)")]
    several = len({row["class"] for row in rows}) > 1
    for row in rows:
        lines.append(
            (
                f"{row['name']} {row['class']}" if several else row["name"],
                str(row["n"]),
                f"{row['reference_mean']:.4f}",
                f"{row['mean']:.4f}",
                f"{row['difference']:+.4f}",
                f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]",
                f"{row['p']:.2g}",
                f"{row['p_holm']:.2g}",
            )
        )
    return "\n".join([title, align(lines)])


def _compare(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, float]:
    """Statistics of paired values of a run ``a`` and the reference ``b``, both of shape (N,)."""
    paired = ~(np.isnan(a) | np.isnan(b))
    a, b = a[paired], b[paired]
    difference, low, high = paired_bootstrap_ci(a, b)
    return {
        "n": len(a),
        "left_out": int((~paired).sum()),
        "reference_mean": float(b.mean()) if len(b) else math.nan,
        "mean": float(a.mean()) if len(a) else math.nan,
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "p": paired_wilcoxon(a, b),
    }


def _load(path: str | Path, metric: str) -> dict[tuple[str, str], float]:
    """Metric by (id, class)."""
    values: dict[tuple[str, str], float] = {}
    for row in read_case_csv(path):
        missing = [column for column in ("id", "class", metric) if column not in row]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(row)}.")
        key = (row["id"], row["class"])
        if key in values:
            raise ValueError(f"{path} has two rows for the case {key[0]!r} and the class {key[1]!r}.")
        values[key] = float(row[metric])
    if not values:
        raise ValueError(f"{path} holds no cases.")
    return values


def _check_same_cases(
    reference: Mapping[tuple[str, str], float], other: Mapping[tuple[str, str], float], name: str
) -> None:
    only_reference, only_other = (
        sorted(reference.keys() - other.keys()),
        sorted(other.keys() - reference.keys()),
    )
    if only_reference or only_other:
        raise ValueError(
            f"Cannot pair the run {name!r} with the reference: {_listed(only_reference)} only in the "
            f"reference, {_listed(only_other)} only in {name!r}."
        )


def _listed(keys: Sequence[tuple[str, str]]) -> str:
    if not keys:
        return "0 cases"
    shown = ", ".join(f"{case} ({class_name})" for case, class_name in keys[:IDS_SHOWN])
    return f"{len(keys)} case{'s' if len(keys) > 1 else ''} ({shown}{', ...' if len(keys) > IDS_SHOWN else ''})"
