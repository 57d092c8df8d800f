"""The files of an evaluation, by any predictor: ``per_case.csv``, ``metrics.json`` and a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from amkd_monai.data.datasets import Task
from amkd_monai.files.masks import IGNORED
from amkd_monai.metrics.segmentation import METRICS, case_metrics
from amkd_monai.metrics.summary import Row, format_table, summarise, summarise_classes, write_case_csv
from amkd_monai.storage import atomic_write_json, jsonable, now, read_json

CASES, SEEN_CASES, FIGURES = "per_case.csv", "per_case_seen.csv", "metrics.json"


def mask_rows(task: Task, case: str, pred: ArrayLike, reference: ArrayLike, spacing: Sequence[float]) -> list[Row]:
    """Score label maps (H, W) or (X, Y, Z) of one case by a task; pixels whose reference is 255 count nowhere."""
    known = np.asarray(reference) != IGNORED
    if not known.all():
        pred, reference = np.where(known, pred, 0), np.where(known, reference, 0)
    scored = task.nsd_tolerance, task.classes[1:], task.regions, known
    return [{"id": case, **row} for row in case_metrics(pred, reference, len(task.classes), spacing, *scored)]


def figures_of(task: Task, rows: Sequence[Row], seen: Mapping[str, str]) -> dict[str, Any]:
    """Return what ``metrics.json`` says of the rows of all cases: the task, ``summary``, and ``seen`` where there is.

    Cases in ``seen``, {id: where}, took part in the training; they count under ``seen`` alone. One must be left.
    """

    def summary(rows: Sequence[Row]) -> dict[str, Any]:
        return summarise_classes(rows, task) if task.is_classification else summarise(rows, METRICS)

    apart, kept = ([row for row in rows if (row["id"] in seen) is which] for which in (True, False))
    if not kept:
        raise ValueError("Every case took part in the student's training: give data of another origin.")
    figures: dict[str, Any] = dict(task.identity)
    if task.is_classification:
        figures["primary_metric"] = task.primary_metric
    else:
        figures |= {"unit": task.unit, "nsd_tolerance": task.nsd_tolerance}
    if apart:
        figures["seen"] = {"cases": dict(seen), "summary": summary(apart)}
    return figures | {"summary": summary(kept)}


def write_figures(folder: Path, rows: Sequence[Row], figures: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write the files of an evaluation and return its table; ``facts`` are further content of ``metrics.json``.

    If some cases could not be used, a folder with the figures of all cases is refused.
    """
    skipped, seen = facts.get("skipped_samples", ()), figures.get("seen", {"cases": {}})
    old = read_json(folder / FIGURES) if skipped else {}
    if old and old.get("student_sha256") == facts.get("student_sha256") and not old.get("skipped_samples"):
        raise ValueError(
            f"{folder / FIGURES} holds the figures of all cases and stays: {len(skipped)} case(s) could not be used "
            f"now: {skipped[0]['reason']} Restore the files, or give an --output_dir of its own."
        )
    title = figures["task"] + (f", HD95 in {figures['unit']}" if "unit" in figures else "")
    tables = [format_table(figures["summary"], title)]
    if seen["cases"]:
        apart = f"{title}: {len(seen['cases'])} case(s) of the student's training, in no figure above"
        tables.append(format_table(seen["summary"], apart))
        write_case_csv(folder / SEEN_CASES, [row for row in rows if row["id"] in seen["cases"]])
    write_case_csv(folder / CASES, [row for row in rows if row["id"] not in seen["cases"]])
    atomic_write_json(folder / FIGURES, jsonable({"written": now(), **facts, **figures}))
    return "\n".join(tables)
