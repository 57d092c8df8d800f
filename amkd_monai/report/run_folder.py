"""What a run left behind, read without torch; what is missing is said, never guessed."""

from __future__ import annotations

import csv
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import TASKS, Task
from amkd_monai.metrics.summary import FEATURES, PREVIEWS, TEACHERS, preview_file, read_case_csv


@dataclass(frozen=True)
class RunFolder:
    """A run.

    Attributes:
        name: shown name; folder: where it lies.
        task: what was asked.
        record: ``run.json``; metrics: ``metrics.json``; both {} where missing.
        history: columns of ``history.csv`` over epochs, NaN where a column has no value.
        cases: rows of ``per_case.csv``.
        missing: what the run has not, one sentence each.
    """

    name: str
    folder: Path
    task: Task
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]
    cases: list[dict[str, Any]]
    missing: list[str]

    def preview(self, case: str) -> dict[str, np.ndarray] | None:
        """Small copies of a case, None where there are none."""
        return _arrays(preview_file(self.folder, case))

    def teachers(self) -> dict[str, np.ndarray] | None:
        """What teachers say about a few training samples, None where that was not kept."""
        return _arrays(self.folder / TEACHERS)

    def features(self) -> dict[str, np.ndarray] | None:
        """Pooled features of training images, None where they were not kept."""
        return _arrays(self.folder / FEATURES)


def read_run(folder: str | Path, name: str | None = None) -> RunFolder:
    """Read a run's output folder.

    Raises:
        FileNotFoundError: there is neither a run record nor an evaluation.
        ValueError: a file is not what its name says.
    """
    folder = Path(folder)
    record, metrics = _json(folder / "run.json"), _json(folder / "metrics.json")
    task = metrics.get("task") or record.get("data", {}).get("task")
    if task is None:
        raise FileNotFoundError(f"{folder} holds neither run.json nor metrics.json: give the output folder of a run.")
    if task not in TASKS:
        raise ValueError(
            f"{folder} is a run of the unknown task '{task}': make its report with the version that made it."
        )
    cases = read_case_csv(folder / "per_case.csv") if (folder / "per_case.csv").is_file() else []
    history = _history(folder / "history.csv")
    missing = []
    if not metrics or not cases:
        missing.append("This run was not evaluated: there are no scores and no cases. Run its evaluation.")
    if not record:
        missing.append("There is no run record (run.json): what was trained on what is not known here.")
    elif record.get("status") != "completed":
        missing.append(f"The training was broken off after epoch {record.get('epochs_done', 0)}: resume it.")
    if not history:
        missing.append("There is no history of epochs (history.csv).")
    elif len(history["epoch"]) == 1:
        missing.append("The training has one epoch: curves are points.")
    if cases and not (folder / PREVIEWS).is_dir():
        missing.append("No pictures of the cases were kept: evaluate the run again to see them.")
    return RunFolder(name or folder.name, folder, TASKS[task], record, metrics, history, cases, missing)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): make the run again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: make the run again.")
    return found


def _history(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return {}
    return {name: np.array([float(row[name] or math.nan) for row in rows]) for name in rows[0]}


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again.") from error
