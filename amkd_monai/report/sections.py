"""From runs to what the page shows: tables, figures and pictures, each a plain value for the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.metrics.classification import labels_and_probabilities, positive_classes
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.report import figures, pictures
from amkd_monai.report.run_folder import RunFolder

SHOWN = {"best": 3, "median": 3, "worst": 6}
"""Cases that are shown of a run."""
QUALITY = 78


def heading(run: RunFolder) -> dict[str, Any]:
    """What ran on what."""
    record, data = run.record, run.record.get("data") or run.metrics.get("data") or {}
    name = Path(str(data.get("root", "unknown"))).name
    distillation = record.get("distillation")
    teachers = distillation.get("teachers", []) if isinstance(distillation, dict) else []
    facts = {
        "task": f"{run.task.name} ({run.task.modality}, {run.task.kind})",
        "data": name,
        "images": ", ".join(f"{n} {v}" for n, v in data.get("counts", {}).items()),
        "split hash": str(data.get("split_hash", ""))[:16],
        "seed": record.get("seed", ""),
        "epochs": f"{record['epochs_done']} of {record['max_epochs']}" if "epochs_done" in record else "",
        "student": f"{record['student_parameters'] / 1e6:.2f} M parameters" if "student_parameters" in record else "",
        "gate": record.get("gate", "") if teachers else "none: undistilled",
        "CPU time": f"{record['cpu_seconds'] / 60:.1f} min" if "cpu_seconds" in record else "",
        "peak memory": f"{record['peak_rss_mb']} MB" if "peak_rss_mb" in record else "",
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items()),
    }
    return {
        "data": f"Data: {name}",
        "warnings": _warnings(run),
        "facts": {k: v for k, v in facts.items() if v != ""},
        "teachers": teachers,
    }


def _warnings(run: RunFolder) -> list[str]:
    """What whoever sees a figure must know first: of the data of the training, of those of the evaluation, the run."""
    found = []
    for data in (run.record.get("data") or {}, run.metrics.get("data") or {}):
        if data.get("phantom"):
            found.append("PHANTOM DATA: images made by a formula. No figure on this page says anything about patients.")
        if data.get("stand_in"):
            found.append(f"STAND-IN DATA: {data['stand_in']}")
    if run.record.get("is_test"):
        found.append("TEST RUN: a teacher had random weights.")
    return list(dict.fromkeys(found))


def scores(run: RunFolder) -> list[tuple[str, str, str]]:
    """Metric, value, 95 % interval."""
    rows = []
    for name, v in run.metrics.get("summary", {}).get("metrics", {}).items():
        value = v.get("mean", v.get("value"))
        rows.append((name, number(value), f"[{number(v.get('ci_low'))}, {number(v.get('ci_high'))}]"))
    return rows


def number(value: Any) -> str:
    """Three digits behind the point; a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def comparison(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], str]:
    """Rows that compare the first run with the others, and why there are none."""
    first, *others = runs
    if not others:
        return [], ""
    files = {run.name: run.folder / "per_case.csv" for run in others}
    if any(not run.cases for run in runs):
        return [], "Runs that were not evaluated cannot be compared."
    try:
        return compare_runs(first.folder / "per_case.csv", files, task=first.task), ""
    except ValueError as error:
        return [], f"The runs cannot be compared: {error}"


def training_figures(run: RunFolder) -> list[tuple[str, str]]:
    """Title and SVG of everything that has a course over epochs."""
    history, found = run.history, []
    if not history:
        return []

    def pick(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in history.items() if k.startswith(prefix)}

    validation = {k: v for k, v in history.items() if k.startswith("val_") and k != "val_empty_references"}
    weights = pick("weight_")
    for title, lines, label, logarithmic in (
        ("Validation", validation, "score", False),
        ("Losses", pick("loss_"), "loss", True),
        ("Losses as they enter the total", pick("weighted_"), "weight x loss", True),
        ("Loss weights", weights if len(weights) > 1 else {}, "weight", False),
        ("Gradient of each loss at the shared student map", pick("gradient_"), "norm", True),
        ("Weights of the teachers, by loss", pick("teacher_"), "mean weight", False),
        ("Effective number of teachers", pick("effective_teachers_"), "exp(entropy)", False),
        ("Learning rate", pick("learning_"), "learning rate", False),
        ("Agreement of the gate with reliability", {k: v for k, v in history.items() if k == "gate_auc"}, "AUC", False),
    ):
        if lines:
            found.append((title, figures.curves(lines, history["epoch"], label, logarithmic)))
    return found


def trust(runs: Sequence[RunFolder]) -> str | None:
    """Heat map run x teacher of the last epoch's mean weight in the output loss, or the feature loss."""
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        for loss in ("output", "feature"):
            last = {k.split("_", 2)[2]: v[-1] for k, v in run.history.items() if k.startswith(f"teacher_{loss}_")}
            if last:
                table[f"{run.name} ({run.task.name}, {loss})"] = last
                break
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    if not columns:
        return None
    values = np.array([[row.get(name, math.nan) for name in columns] for row in table.values()])
    return figures.heat_map(values, list(table), columns, "mean weight in the last epoch")


def class_figures(run: RunFolder) -> list[tuple[str, str]]:
    """ROC, confusion matrix and reliability diagram of an evaluated classification."""
    if not run.task.is_classification or not run.cases:
        return []
    label, p = labels_and_probabilities(run.task, run.cases)
    lines = {name: (label == c, p[:, c]) for c, name in enumerate(run.task.classes)}
    for name, mask in positive_classes(run.task).items():
        if mask.sum() > 1:  # several classes together, such as referable grades
            lines[name] = (mask[label], p[:, mask].sum(1))
    summary = run.metrics["summary"]
    confusion = np.array(summary["confusion"], dtype=float)
    names = list(run.task.classes)
    return [
        ("ROC", figures.roc(lines)),
        ("Confusion, true classes by row", figures.heat_map(confusion, names, names, "predicted", digits=0)),
        ("Reliability", figures.reliability(summary["reliability"])),
    ]


def badness(run: RunFolder, case: dict[str, Any]) -> float:
    """By what cases are sorted, worst first: Dice, or the probability of the true class; empty references first."""
    if run.task.is_classification:
        return float(labels_and_probabilities(run.task, [case])[1][0][int(case["label"])])
    if case["status"] == "empty_both":
        return math.inf
    return -1.0 if case["status"] == "false_positive" else float(case["dice"])


def chosen_cases(run: RunFolder) -> list[dict[str, Any]]:
    """Best, median and worst cases with their pictures, those that have a preview."""
    ranked = sorted((c for c in run.cases if math.isfinite(badness(run, c))), key=lambda c: badness(run, c))
    middle = max(0, len(ranked) // 2 - SHOWN["median"] // 2)
    parts = {
        "worst": ranked[: SHOWN["worst"]],
        "median": ranked[middle : middle + SHOWN["median"]],
        "best": ranked[-SHOWN["best"] :][::-1],
    }
    shown, seen = [], set()
    for part, cases in parts.items():
        for case in cases:
            preview = run.preview(str(case["id"]))
            if preview is not None and case["id"] not in seen:
                seen.add(case["id"])
                shown.append({"part": part, "id": case["id"], "text": _says(run, case), **_views(preview)})
    return shown


def _says(run: RunFolder, case: dict[str, Any]) -> str:
    if run.task.is_classification:
        names = run.task.classes
        return f"true {names[int(case['label'])]}, predicted {names[int(case['prediction'])]}"
    if case["status"] != "ok":
        return str(case["status"]).replace("_", " ")
    return f"Dice {case['dice']:.3f}, HD95 {case['hd95']:.1f} {run.metrics.get('unit', '')}"


def _views(preview: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Pictures of a case, and of a volume its slices."""
    if "prediction" not in preview:
        views = [pictures.enlarged(preview["image"][0])[0]]
        views += [pictures.tinted(preview["image"][0], preview["cam"][0])] if "cam" in preview else []
        return {"views": [pictures.data_uri(v, QUALITY) for v in views], "slices": []}
    outlined = [
        pictures.outlined(image, reference, prediction)
        for image, reference, prediction in zip(
            preview["image"], preview["reference"], preview["prediction"], strict=True
        )
    ]
    if "plane0" not in preview:
        both = pictures.enlarged(preview["image"][0])[0], outlined[0]
        return {"views": [pictures.data_uri(picture, QUALITY) for picture in both], "slices": []}
    planes = [
        pictures.outlined(preview[f"plane{a}"], preview[f"reference{a}"], preview[f"prediction{a}"]) for a in range(3)
    ]
    turned = [np.rot90(picture) for picture in (*planes, *outlined)]
    uris = [pictures.data_uri(picture, QUALITY) for picture in turned]
    return {"views": uris[:3], "slices": uris[3:]}


def teacher_rows(run: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of pictures: image with label, student, each teacher's answer, each teacher's weight."""
    arrays = run.teachers()
    if arrays is None or run.task.is_classification:
        return [], []
    answers = [n for n in arrays if n.startswith("answer_")]
    weights = [n for n in arrays if n.startswith("weight_")]
    columns = ["image, label", "student", *(f"{n[7:]} says" for n in answers), *(f"weight of {n[7:]}" for n in weights)]
    rows = []
    for i, image in enumerate(arrays["image"]):
        row = [pictures.outlined(image, arrays["label"][i], None), pictures.tinted(image, arrays["student"][i])]
        row += [pictures.tinted(image, arrays[name][i]) for name in (*answers, *weights)]
        rows.append([pictures.data_uri(picture, 70) for picture in row])
    return columns, rows
