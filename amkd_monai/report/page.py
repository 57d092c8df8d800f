"""From the files of runs, read without torch, to one page: tables, figures and pictures as values for the template."""

import itertools
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

import amkd_monai
from amkd_monai.data.datasets import Task, recorded_task
from amkd_monai.files.pictures import class_colours
from amkd_monai.metrics.classification import labels_and_probabilities, positive_classes
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.metrics.summary import PREVIEWS, TEACHERS, class_summaries, part_of, preview_file, read_case_csv
from amkd_monai.report import figures
from amkd_monai.storage import atomic_write_bytes, read_json

SHOWN = {"worst": 6, "median": 3, "best": 3}
"""Cases that are shown of a run."""


@dataclass(frozen=True)
class RunFolder:
    """A run's files, empty where missing, ``history`` by column with NaN for no value, and what is missing in words."""

    name: str
    folder: Path
    task: Task
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: dict[str, np.ndarray]
    cases: list[dict[str, Any]]
    missing: list[str]


def read_run(folder: str | Path, name: str | None = None) -> RunFolder:
    """Read a run's output folder; one without a run record and evaluation, and a damaged file, are refused."""
    folder = Path(folder)
    record, metrics = read_json(folder / "run.json"), read_json(folder / "metrics.json")
    known = metrics if "task" in metrics else record.get("data", {})
    if "task" not in known:
        raise FileNotFoundError(f"{folder} holds neither run.json nor metrics.json: give the output folder of a run.")
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
    return RunFolder(name or folder.name, folder, recorded_task(known), record, metrics, history, cases, missing)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read an ``.npz`` file of a run; None where it was not kept."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again.") from error


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one self-contained HTML page about the output folders of runs of one task, and return its file.

    The first run is the reference of all comparisons. Runs of different tasks and damaged files are refused.
    """
    different = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [read_run(folder, name) for folder, name in zip(different, _names(different), strict=True)]
    tasks = {run.task.name for run in runs}
    if len(tasks) != 1:
        raise ValueError(f"The runs have different tasks ({', '.join(sorted(tasks))}): make one report for each.")
    comparison, why = _comparison(runs)
    dice: dict[str, list[float]] = {}
    for run in runs:
        for case in run.cases if not run.task.is_classification else ():
            if part_of(case) != "background":
                column = f"{run.name} {case['class']}" if len(run.task.classes) > 2 else run.name
                dice.setdefault(column, []).append(float(case["dice"]))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    )
    text = page.render(
        title=f"{runs[0].task.name}: {', '.join(run.name for run in runs)}",
        version=amkd_monai.__version__,
        runs=[_describe(run) for run in runs],
        comparison=comparison,
        why=why,
        spread=("Dice", figures.scatter(dice, "Dice")) if dice else None,
        trust=_trust(runs),
    )
    atomic_write_bytes(Path(output), text.encode())
    return Path(output)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell the runs apart."""
    parts = [folder.parts for folder in folders]
    if all(p[-1] == "eval" for p in parts):  # a bundle's own folder of results
        parts = [p[:-1] for p in parts]
    ends = (["/".join(p[-count:]) for p in parts] for count in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(names))


def _comparison(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], str]:
    """Rows that compare the first run with the others, and why there are none."""
    first, *others = runs
    if others and not all(run.cases for run in runs):
        return [], "Runs that were not evaluated cannot be compared."
    files = {run.name: run.folder / "per_case.csv" for run in others}
    try:
        return compare_runs(first.folder / "per_case.csv", files, task=first.task) if files else [], ""
    except ValueError as error:
        return [], f"The runs cannot be compared: {error}"


def _trust(runs: Sequence[RunFolder]) -> str | None:
    """Heat map run x teacher of the last epoch's mean weight in the output loss, or the feature loss."""
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        for loss in ("output", "feature"):
            last = {k.split("_", 2)[2]: v[-1] for k, v in run.history.items() if k.startswith(f"teacher_{loss}_")}
            if last:
                table[f"{run.name} ({run.task.name}, {loss})"] = last
                break
    if not table:
        return None
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    values = np.array([[row.get(name, math.nan) for name in columns] for row in table.values()])
    return figures.heat_map(values, list(table), columns, "mean weight in the last epoch")


def _describe(run: RunFolder) -> dict[str, Any]:
    columns = [c for c in (run.cases or [{}])[0] if c != "label"]
    ranked = sorted(run.cases, key=lambda case: _badness(run, [case]))
    by_id: dict[Any, list[dict[str, Any]]] = {}
    for case in run.cases:
        by_id.setdefault(case["id"], []).append(case)
    groups = sorted(by_id.values(), key=lambda rows: _badness(run, rows))
    teacher_columns, teacher_rows = _teacher_rows(run)
    summary, several = run.metrics.get("summary", {}), not run.task.is_classification and len(run.task.classes) > 2
    scores = [
        (
            f"{of} {m}".strip(),
            _number(v.get("mean", v.get("value"))),
            f"[{_number(v.get('ci_low'))}, {_number(v.get('ci_high'))}]",
        )
        for of, block in [("", summary.get("metrics", {})), *class_summaries(summary)]
        for m, v in block.items()
    ]
    colours = ["#" + bytes(rgb).hex() for rgb in class_colours(range(1, len(run.task.classes))).tolist()]
    return {
        "name": run.name,
        "heading": _heading(run),
        "missing": run.missing,
        "scores": scores,
        "curves": _training_figures(run),
        "class_figures": _class_figures(run),
        "teacher_columns": teacher_columns,
        "teacher_rows": teacher_rows,
        "shown": _chosen_cases(run, [rows for rows in groups if math.isfinite(_badness(run, rows))]),
        "class_key": list(zip(run.task.classes[1:], colours, strict=True)) if several else [],
        "masks": not run.task.is_classification,
        "columns": columns,
        "cases": [[_cell(c, case[c]) for c in columns] for case in ranked],
    }


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _cell(column: str, value: Any) -> str:
    if column.endswith("_volume"):
        return f"{value:.0f}"
    return _number(value) if isinstance(value, float) else str(value)


def _heading(run: RunFolder) -> dict[str, Any]:
    """What ran on what, and the warnings that are shown above every figure."""
    record, data = run.record, run.record.get("data") or run.metrics.get("data") or {}
    name = Path(str(data.get("root", "unknown"))).name
    teachers = _teachers(run)
    facts = {
        "task": f"{run.task.name} ({run.task.modality}, {run.task.kind})",
        "data": name,
        "images": ", ".join(f"{n} {v}" for n, v in data.get("counts", {}).items()),
        "split hash": str(data.get("split_hash", ""))[:16],
        "seed": record.get("seed", ""),
        "gate": record.get("gate", "") if teachers else "none: undistilled",
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items()),
    }
    if "student_parameters" in record:
        facts["student"] = f"{record['student_parameters'] / 1e6:.2f} M parameters"
        facts["epochs"] = f"{record['epochs_done']} of {record['max_epochs']}"
        facts["CPU time, peak memory"] = f"{record['cpu_seconds'] / 60:.1f} min, {record['peak_rss_mb']} MB"
    warnings = []
    for used in (record.get("data") or {}, run.metrics.get("data") or {}):
        if used.get("phantom"):
            warnings.append("PHANTOM DATA: generated images. No figure on this page says anything about patients.")
        if used.get("stand_in"):
            warnings.append(f"STAND-IN DATA: {used['stand_in']}")
    if record.get("is_test"):
        warnings.append("TEST RUN: a teacher had random weights.")
    if overridden := run.metrics.get("overridden"):
        warnings.append(f"Scored otherwise than by the bundle: {', '.join(overridden)}.")
    if apart := run.metrics.get("seen"):
        warnings.append(
            f"{len(apart['cases'])} image(s) took part in the student's training: they are in no figure here."
        )
    if run.metrics.get("seen_is_known") is False:
        warnings.append("Whether these images took part in the student's training could not be checked.")
    shown = {key: value for key, value in facts.items() if value != ""}
    return {"data": f"Data: {name}", "warnings": list(dict.fromkeys(warnings)), "facts": shown, "teachers": teachers}


def _teachers(run: RunFolder) -> list[dict[str, Any]]:
    distillation = run.record.get("distillation")  # a sentence for an undistilled student
    return distillation.get("teachers", []) if isinstance(distillation, dict) else []


def _training_figures(run: RunFolder) -> list[tuple[str, str]]:
    """Title and SVG of everything that has a course over epochs."""

    def pick(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in run.history.items() if k.startswith(prefix)}

    validation = {f"val_{k}": v for k, v in pick("val_").items() if k != "empty_references"}
    weights = pick("weight_")
    drawn = (
        ("Validation", validation, "score", False),
        ("Losses", pick("loss_"), "loss", True),
        ("Losses as they enter the total", pick("weighted_"), "weight x loss", True),
        ("Loss weights", weights if len(weights) > 1 else {}, "weight", False),
        ("Gradient of each loss at the shared student map", pick("gradient_"), "norm", True),
        ("Weights of the teachers, by loss", pick("teacher_"), "mean weight", False),
        ("Effective number of teachers", pick("effective_teachers_"), "exp(entropy)", False),
        ("Learning rate", pick("learning_"), "learning rate", False),
        ("Agreement of the gate with reliability", pick("gate_auc"), "AUC", False),
    )
    epochs = run.history.get("epoch", np.zeros(0))
    return [(title, figures.curves(lines, epochs, label, log)) for title, lines, label, log in drawn if lines]


def _class_figures(run: RunFolder) -> list[tuple[str, str]]:
    """ROC, confusion matrix and reliability diagram of an evaluated classification."""
    if not run.task.is_classification or not run.cases:
        return []
    label, p = labels_and_probabilities(run.task, run.cases)
    lines = {name: (label == c, p[:, c]) for c, name in enumerate(run.task.classes)}
    for name, mask in positive_classes(run.task).items():
        if mask.sum() > 1:  # several classes together, such as referable grades
            lines[name] = (mask[label], p[:, mask].sum(1))
    summary, names = run.metrics["summary"], list(run.task.classes)
    confusion = np.array(summary["confusion"])
    return [
        ("ROC", figures.roc(lines)),
        ("Confusion, true classes by row", figures.heat_map(confusion, names, names, "predicted", digits=0)),
        ("Reliability", figures.reliability(summary["reliability"])),
    ]


def _badness(run: RunFolder, rows: Sequence[dict[str, Any]]) -> float:
    """Sort key of a case's rows, worst first: mean Dice of its classes, or the probability of the true class.

    A false positive counts as -1; cases without anything come last.
    """
    if run.task.is_classification:
        return float(labels_and_probabilities(run.task, rows)[1][0][int(rows[0]["label"])])
    own = [row for row in rows if part_of(row) == "classes" or len(rows) == 1]
    values = [
        -1.0 if row["status"] == "false_positive" else float(row["dice"])
        for row in own
        if row["status"] != "empty_both"
    ]
    return math.fsum(values) / len(values) if values else math.inf


def _chosen_cases(run: RunFolder, ranked: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Worst, median and best cases with their pictures, those that have a preview."""
    middle = max(0, len(ranked) // 2 - SHOWN["median"] // 2)
    chosen = [("worst", rows) for rows in ranked[: SHOWN["worst"]]]
    chosen += [("median", rows) for rows in ranked[middle : middle + SHOWN["median"]]]
    chosen += [("best", rows) for rows in ranked[-SHOWN["best"] :][::-1]]
    shown: dict[str, dict[str, Any]] = {}
    for part, (case, *others) in chosen:
        if case["id"] in shown or (preview := read_arrays(preview_file(run.folder, str(case["id"])))) is None:
            continue
        if run.task.is_classification:
            true, predicted = (run.task.classes[int(case[key])] for key in ("label", "prediction"))
            text = f"true {true}, predicted {predicted}"
        else:
            own = [row for row in (case, *others) if part_of(row) == "classes"]
            text = "; ".join((f"{row['class']}: " if others else "") + _outcome(run, row) for row in own)
        views = _views(preview, len(run.task.classes) > 2)
        shown[case["id"]] = {"part": part, "id": case["id"], "text": text, **views}
    return list(shown.values())


def _outcome(run: RunFolder, row: dict[str, Any]) -> str:
    if row["status"] == "ok":
        return f"Dice {row['dice']:.3f}, HD95 {row['hd95']:.1f} {run.metrics.get('unit', '')}"
    return str(row["status"]).replace("_", " ")


def _views(preview: dict[str, np.ndarray], several: bool) -> dict[str, list[str]]:
    """Pictures of a case, and of a volume its slices; of ``several`` classes reference and prediction side by side."""

    def drawn(image: np.ndarray, reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        panels = [(reference, None), (None, prediction)] if several else [(reference, prediction)]
        turned = [np.rot90(figures.outlined(image, r, p, several), "plane0" in preview) for r, p in panels]
        return np.concatenate(turned, axis=1)

    views, slices = [figures.enlarged(preview["image"][0])[0]], []
    if "cam" in preview:
        views.append(figures.tinted(preview["image"][0], preview["cam"][0]))
    elif "prediction" in preview:
        parts = (preview["image"], preview["reference"], preview["prediction"])
        pictures = [drawn(*masks) for masks in zip(*parts, strict=True)]
        if "plane0" in preview:
            planes = [[preview[f"{name}{a}"] for name in ("plane", "reference", "prediction")] for a in range(3)]
            views, slices = [drawn(*plane) for plane in planes], pictures
        else:
            views += pictures
    return {"views": list(map(figures.data_uri, views)), "slices": list(map(figures.data_uri, slices))}


def _teacher_rows(run: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of pictures: image with label, student, each teacher's output, each teacher's weight."""
    arrays = read_arrays(run.folder / TEACHERS)
    if arrays is None or run.task.is_classification:
        return [], []
    answers, weights = ([n for n in arrays if n.startswith(prefix)] for prefix in ("answer_", "weight_"))
    maps = {"student": "student", **{n: f"output of {n[7:]}" for n in answers}}
    maps |= {n: f"weight of {n[7:]}" for n in weights}
    rows = []
    for i, image in enumerate(arrays["image"]):
        row = [figures.outlined(image, arrays["label"][i], None, len(run.task.classes) > 2)]
        row += [figures.tinted(image, arrays[name][i]) for name in maps]
        rows.append([figures.data_uri(picture, 70) for picture in row])
    return ["image, label", *maps.values()], rows
