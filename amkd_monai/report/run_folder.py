"""The files of a run's output folder, read without torch; missing ones are reported, never guessed."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import TASKS, Task
from amkd_monai.metrics.summary import PREVIEWS, read_case_csv
from amkd_monai.storage import read_json


@dataclass(frozen=True)
class RunFolder:
    """A run.

    Attributes:
        name: shown name.
        folder: where it lies.
        task: what was asked.
        record: ``run.json``; empty where missing.
        metrics: ``metrics.json``; empty where missing.
        history: columns of ``history.csv`` over epochs, NaN where a column has no value.
        cases: rows of ``per_case.csv``.
        missing: what the run lacks, one sentence each.
    """

    name: str
    folder: Path
    task: Task
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]
    cases: list[dict[str, Any]]
    missing: list[str]


def read_run(folder: str | Path, name: str | None = None) -> RunFolder:
    """Read a run's output folder.

    Raises:
        FileNotFoundError: there is neither a run record nor an evaluation.
        ValueError: a file is damaged, or the task is unknown.
    """
    folder = Path(folder)
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    task = metrics.get("task") or record.get("data", {}).get("task")
    if task is None:
        raise FileNotFoundError(f"{folder} holds neither run.json nor metrics.json: give the output folder of a run.")
    if task not in TASKS:
        raise ValueError(f"{folder} is a run of the unknown task '{task}': use the version that made it.")
    cases, rows = (
        read_case_csv(folder / file) if (folder / file).is_file() else [] for file in ("per_case.csv", "history.csv")
    )
    missing = []
    if not metrics or not cases:
        missing.append("This run was not evaluated: there are no scores and no cases. Run its evaluation.")
    if not record:
        missing.append("There is no run record (run.json): what was trained on what is not known here.")
    elif record.get("status") != "completed":
        missing.append(f"The training was broken off after epoch {record.get('epochs_done', 0)}: resume it.")
    if len(rows) < 2:
        missing.append("The training has one epoch: curves are points." if rows else "There is no history.csv.")
    if cases and not (folder / PREVIEWS).is_dir():
        missing.append("No pictures of the cases were kept: evaluate the run again to see them.")
    history = {column: np.array([row[column] for row in rows], float) for column in (rows[0] if rows else ())}
    return RunFolder(name or folder.name, folder, TASKS[task], record, metrics, history, cases, missing)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read an ``.npz`` file of a run; None where it was not kept.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again.") from error
