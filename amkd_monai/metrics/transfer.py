"""A shared student next to the students of single data sets: one table, paired by case, losses included."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amkd_monai.data.datasets import Task
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.metrics.statistics import holm
from amkd_monai.terminal import align

SCORE = ["value", "ci_low", "ci_high"]
DELTA = ["delta", "delta_ci_low", "delta_ci_high", "p", "p_holm"]


def score_of(folder: str | Path, task: Task) -> dict[str, float]:
    """Return the primary metric of an evaluated run: ``value``, ``ci_low``, ``ci_high`` (95 %).

    Raises:
        ValueError: the folder holds no evaluation of the task.
    """
    path = Path(folder) / "metrics.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        metric = report["summary"]["metrics"][task.primary_metric]
        if report["task"] != task.name:
            raise KeyError(task.name)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no evaluation of {task.name}: evaluate that run, or correct `compare`.") from error
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
            csvs = other / "per_case.csv", {"shared": Path(folder) / "per_case.csv"}
            compared = compare_runs(*csvs, task.primary_metric, task)
            for found in compared:
                values = (found["difference"], found["ci_low"], found["ci_high"], found["p"])
                own = {"class": found["class"]} if len(compared) > 1 else {}
                rows.append({**row, **own, **dict(zip(DELTA, values, strict=False))})
    compared_rows = [row for row in rows if "delta" in row]
    for row, adjusted in zip(compared_rows, holm([row["p"] for row in compared_rows]), strict=True):
        row["p_holm"] = adjusted
    for label in runs:
        deltas = [row["delta"] for row in compared_rows if row["run"] == label]
        if deltas:
            rows.append({"task": f"mean of {len(deltas)}", "run": label, "delta": math.fsum(deltas) / len(deltas)})
    return rows


def format_transfer(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`transfer_rows` as a plain-text table."""
    lines = [("task", "run", "metric", "score [95 % CI]", "shared - run [95 % CI]", "p", "p (Holm)")]
    for row in rows:
        task = f"{row['task']} {row['class']}" if "class" in row else row["task"]
        score, delta = (
            _interval([row.get(k) for k in names], form) for names, form in ((SCORE, ".4f"), (DELTA, "+.4f"))
        )
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


def _interval(values: Sequence[float | None], form: str) -> str:
    value, low, high, *_ = (_number(v, form) for v in values)
    return f"{value} [{low}, {high}]" if low else value
