"""Reads the output folder of a run, ranks its cases from the worst, and lists those that failed."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data.datasets import Task, recorded_task
from amkd_monai.metrics.classification import labels_and_probabilities, of_truth
from amkd_monai.metrics.summary import PREVIEWS, Row, part_of, read_case_csv
from amkd_monai.storage import file_sha256, read_json

FAILED = 0.5  # Dice below which a mask failed
FEW = 20  # cases below which an interval is said to be rough


class RunFolder:
    """The output folder of a run; without a run record and an evaluation it is a FileNotFoundError.

    ``record``, ``metrics`` and ``cases`` are empty where missing, ``history`` is by column with NaN for no value, and
    ``missing`` says in words what is; ``scored`` counts the cases of the first metric. The folder of several tasks, and
    a damaged file, are a ValueError.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        folder = Path(folder)
        metrics = read_json(folder / "metrics.json")
        record, place = read_json(folder / "run.json"), folder
        if not record and metrics.get("run"):  # figures on other data or of one of several tasks lie below their run's
            above = read_json(folder.parent / "run.json")
            record, place = (above, folder.parent) if above.get("run") == metrics["run"] else ({}, folder)
        shared, prefix = record.get("tasks", {}), ""
        if shared and place != folder:
            record, prefix = {**shared.get(folder.name, {}), **record}, f"{folder.name}/"
        elif shared:
            raise ValueError(f"{folder} is of a student for {len(shared)} tasks: give one, as {folder / min(shared)}.")
        known = metrics if "task" in metrics else record.get("data", {})
        if "task" not in known:
            raise FileNotFoundError(f"{folder} holds neither run.json nor metrics.json: give a run's output folder.")
        files = folder / "per_case.csv", place / "history.csv"
        cases, rows = (read_case_csv(file) if file.is_file() else [] for file in files)
        missing = []
        if not metrics or not cases:
            missing.append("This run was not evaluated: there are no scores and no cases. Run its evaluation.")
        summary, student = metrics.get("summary", {}), Path(metrics.get("student") or "unknown")
        first: Mapping[str, Any] = next(iter(summary.get("metrics", {}).values()), {})
        self.scored = first.get("n", summary.get("cases", 0))
        if 0 < self.scored < FEW:
            missing.append(f"The interval is rough: there are only {self.scored} cases.")
        if student.is_file() and file_sha256(student) != metrics.get("student_sha256"):
            missing.append(f"The scores are of an earlier student than {student} holds now: evaluate again.")
        if not record:
            missing.append("There is no run record (run.json): data and teachers of the training are unknown.")
        elif record.get("status") != "completed":
            missing.append(f"The training stopped after epoch {record.get('epochs_done', 0)}: resume it.")
        if record and len(rows) < 2:
            missing.append("The training has one epoch: curves are points." if rows else "There is no history.csv.")
        if cases and not (folder / PREVIEWS).is_dir():
            missing.append("No pictures of the cases were kept: evaluate the run again to see them.")
        history = {column: np.array([row[column] for row in rows], float) for column in (rows[0] if rows else ())}
        history |= {k.removeprefix(prefix): history.pop(k) for k in list(history) if prefix and k.startswith(prefix)}
        self.name, self.folder, self.task = name or folder.name, folder, recorded_task(known)
        self.record, self.metrics, self.cases, self.missing = record, metrics, cases, missing
        self.history = {column: values for column, values in history.items() if "/" not in column}


def teachers_of(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the teachers in the record of a run, and those of them whose outputs or features were distilled."""
    distillation = record.get("distillation")  # a sentence for an undistilled student
    teachers = distillation.get("teachers", []) if isinstance(distillation, Mapping) else []
    parts = ("outputs_admitted", "features_admitted")
    return teachers, [teacher for teacher in teachers if any(teacher.get(part, True) for part in parts)]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read an ``.npz`` file of a run; None where it was not kept, ValueError where it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): run again.") from error


def badness(task: Task, rows: Sequence[Row]) -> float:
    """Sort key of a case's rows, worst first: mean Dice (false positives -1), or the probability of what is true."""
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
