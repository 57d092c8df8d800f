"""Ranks the cases of a run from the worst, and lists those that failed."""

import math
from collections import Counter
from collections.abc import Sequence

from amkd_monai.data.datasets import Task
from amkd_monai.metrics.classification import labels_and_probabilities, of_truth
from amkd_monai.metrics.summary import Row, part_of

FAILED = 0.5
"""Dice below which a mask failed."""


def badness(task: Task, rows: Sequence[Row]) -> float:
    """Sort key of a case's rows, worst first: mean Dice of its classes, or the probability of what is true.

    A false positive counts as -1; cases without anything come last.
    """
    if task.is_classification:
        return float(of_truth(task, int(rows[0]["label"]), labels_and_probabilities(task, rows)[1][0]).mean())
    own = [row for row in rows if part_of(row) == "classes" or len(rows) == 1]
    values = [-1.0 if r["status"] == "false_positive" else float(r["dice"]) for r in own if r["status"] != "empty_both"]
    return math.fsum(values) / len(values) if values else math.inf


def failures(task: Task, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Case, what is wrong and how far: masks from the worst on, wrong classes from the surest on."""
    found: list[tuple[float, tuple[str, str, str]]] = []
    for row in rows:
        if task.is_classification:
            (label,), (p_all,) = labels_and_probabilities(task, [row])
            p = 1 - float(of_truth(task, label, p_all).min()) if task.has_findings else float(p_all.max())
            wrong = f"{row['class']} taken for {task.text_of(int(row['prediction']))}"
            entry, failed = (-p, (row["id"], wrong, f"probability {p:.2f}")), row["label"] != row["prediction"]
        else:
            wrong = "low Dice" if row["status"] == "ok" else row["status"].replace("_", " ")
            sizes = f"{row['pred_volume']:.0f} for {row['reference_volume']:.0f} {task.size_unit}"
            dice = "" if math.isnan(row["dice"]) else f"Dice {row['dice']:.3f}, "
            entry = badness(task, [row]), (row["id"], f"{row['class']}: {wrong}", dice + sizes)
            failed = part_of(row) == "classes" and (row["status"] == "false_positive" or row["dice"] < FAILED)
        found += [entry] * failed
    return [cells for _, cells in sorted(found)]


def outcomes(rows: Sequence[Row]) -> str:
    """How the masks of all cases came out, in words."""
    own = [row for row in rows if part_of(row) == "classes"]
    dices, status = [row["dice"] for row in own if not math.isnan(row["dice"])], Counter(row["status"] for row in own)
    empty, wrong = status["false_positive"] + status["empty_both"], status["false_positive"]
    shares = (f"{sum(d >= level for d in dices) / len(dices):.0%} reach Dice {level}" for level in (0.9, 0.7, FAILED))
    told = [f"Of {len(dices)} references {', '.join(shares)}; missed: {status['missed']}."] if dices else []
    return " ".join(told + [f"Empty references: {empty}, false positives on them: {wrong}."] * bool(empty))
