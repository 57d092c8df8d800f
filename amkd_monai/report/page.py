"""Turns the files of runs, read without torch, into one page: tables, figures and pictures for the template."""

import itertools
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

import amkd_monai
from amkd_monai.files.names import some
from amkd_monai.files.pictures import class_colours, contrasting
from amkd_monai.metrics.classification import labels_and_probabilities, problems_of, slug
from amkd_monai.metrics.compare import compare_runs
from amkd_monai.metrics.run_folder import (
    FAILED,
    RunFolder,
    badness,
    failures,
    outcomes,
    read_arrays,
    teachers_of,
)
from amkd_monai.metrics.summary import TEACHERS, Row, class_summaries, part_of, preview_file
from amkd_monai.report import figures
from amkd_monai.report.previews import PLANES, SIDE, SLICES
from amkd_monai.storage import atomic_write_bytes
from amkd_monai.terminal import number

PAGE = Path(__file__).with_name("page.html")
SHOWN = {"best": 3, "median": 3, "worst": 6}  # cases that are shown of one run; of several, each has its share
LISTED = 50  # failures that are listed
LARGEST = 15_000_000  # bytes of a page; above, volumes show fewer slices
MARKS = (("A", "P", "S", "I"), ("R", "L", "S", "I"), ("R", "L", "A", "P"))
"""Sides of the patient on the left, right, top and bottom of each of ``PLANES``."""
NAMES = {"dice": "Dice", "iou": "IoU", "nsd": "NSD", "hd95": "HD95", "qwk": "Quadratic weighted kappa", "ece": "ECE"}
NAMES |= {"mean_auc": "Mean AUC", "macro_auroc": "Macro AUROC"}


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one self-contained HTML page about the output folders of runs of one task, and return its file.

    The first run is the reference of all comparisons. Runs of different tasks and damaged files are a ValueError, a
    folder without a run is a FileNotFoundError.
    """
    different = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [RunFolder(folder, name) for folder, name in zip(different, _names(different), strict=True)]
    tasks = {run.task.name for run in runs}
    if len(tasks) != 1:
        raise ValueError(f"The runs have different tasks ({', '.join(sorted(tasks))}): make one report for each.")
    rows, why = _comparison(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": partial(number, digits=3), "some": some}
    environment.filters |= {"basename": lambda path: Path(str(path)).name}
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    task, names = runs[0].task, [run.name for run in runs]
    about = f"{task.modality}, {task.kind} of {', '.join(task.classes[0 if task.is_classification else 1 :])}"
    shown: dict[str, Any] = {"title": task.name if names == [task.name] else f"{task.name} ({', '.join(names)})"}
    shown |= {"version": amkd_monai.__version__, "about": about, "why": why, "failed": FAILED, "listed": LISTED}
    shown |= {"comparison": [*map(_compared, rows)], "spread": _by_size(runs), "trust": _trust(runs)}
    shown |= {"several": len(task.classes) > 2, "is_volume": task.dimensions == 3}
    for slices in (SLICES, 8, 3):
        text = page.render(shown, runs=[_describe(run, runs, rows, slices) for run in runs]).encode()
        if len(text) < LARGEST:
            break
    atomic_write_bytes(Path(output), text)
    return Path(output)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell the runs apart."""
    parts = [folder.parts for folder in folders]
    if all(p[-1] == "eval" for p in parts):  # a bundle's own folder of results
        parts = [p[:-1] for p in parts]
    ends = (["/".join(p[-count:]) for p in parts] for count in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(names))


def _comparison(runs: Sequence[RunFolder]) -> tuple[list[Row], str]:
    """Rows that compare the first run with the others, and why there are none."""
    first, *others = runs
    if others and not all(run.cases for run in runs):
        return [], "Runs that were not evaluated cannot be compared."
    files = {run.name: run.folder / "per_case.csv" for run in others}
    try:
        return compare_runs(first.folder / "per_case.csv", files, task=first.task) if files else [], ""
    except ValueError as error:
        return [], f"The runs cannot be compared: {error}"


def _compared(row: Row) -> list[str]:
    of = "" if row["class"] == row["metric"] else f", {row['class']}"
    values = "{difference:+.3f}|{ci_low:+.3f} to {ci_high:+.3f}|{p:.2g}|{p_holm:.2g}".format(**row).split("|")
    return [row["name"], f"{NAMES.get(row['metric'], row['metric'])}{of}", str(row["n"]), *values]


def _trust(runs: Sequence[RunFolder]) -> str | None:
    """Heat map of the last epoch's mean weight of each teacher in the output and feature losses of each run."""
    table: dict[str, dict[str, float]] = {}
    for run, loss in itertools.product(runs, ("output", "feature")):
        last = {k.split("_", 2)[2]: v[-1] for k, v in run.history.items() if k.startswith(f"teacher_{loss}_")}
        if last:
            table[f"{run.name}, {loss}" if len(runs) > 1 else loss] = last
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    values = np.array([[row.get(name, math.nan) for name in columns] for row in table.values()])
    texts = [[number(v, 2) for v in row] for row in values]
    return figures.heat_map(values, list(table), columns, "teacher", "mean weight", texts) if table else None


def _by_size(runs: Sequence[RunFolder]) -> str | None:
    """Dice of each case over the size of its reference, a colour per run and class."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for row in () if run.task.is_classification else run.cases:
            if part_of(row) == "classes" and row["reference_volume"]:
                of = [run.name] * (len(runs) > 1) + [row["class"]] * (len(run.task.classes) > 2)
                found.setdefault(" ".join(of), []).append((row["reference_volume"], float(row["dice"])))
    return figures.by_size(found, "Dice", f"size of the reference, {runs[0].task.size_unit}") if found else None


def _describe(run: RunFolder, runs: Sequence[RunFolder], comparison: Sequence[Row], slices: int) -> dict[str, Any]:
    columns = [c for c in (run.cases or [{}])[0] if c != "label"]
    by_id: dict[Any, list[dict[str, Any]]] = {}
    for case in run.cases:
        by_id.setdefault(case["id"], []).append(case)
    groups = sorted(by_id.values(), key=lambda rows: badness(run.task, rows))
    summary = run.metrics.get("summary", {})
    scores = [
        (f"{run.name}/{f'{of} {m}'.strip()}", [_metric(run, m, of) + (f", {of}" if of else ""), *_interval(v)])
        for of, block in [("", summary.get("metrics", {})), *class_summaries(summary)]
        for m, v in block.items()
    ]
    return {
        **{"name": run.name, "missing": run.missing, "record": run.record, "metrics": run.metrics},
        "score": [*scores[0][1], run.scored] if scores else None,
        "gain": _gain(run, runs[0], comparison),
        "scores": scores,
        "curves": _training_figures(run),
        "class_figures": _class_figures(run),
        **dict(zip(("teachers", "taught"), teachers_of(run.record), strict=True)),
        "samples": _samples(run),
        **_shown(run, [rows for rows in groups if math.isfinite(badness(run.task, rows))], len(runs), slices),
        "outcomes": "" if run.task.is_classification else outcomes(run.cases),
        "failures": failures(run.task, run.cases),
        "columns": columns,
        "cases": [[_cell(row[c]) for c in columns] for rows in groups for row in rows],
    }


def _cell(value: Any) -> str:
    return str(value) if not isinstance(value, float) else number(value, 3 if value < 1000 else 0)


def _interval(value: dict[str, Any]) -> tuple[str, str]:
    mean, low, high = (number(v, 3) for v in (value.get("mean", value.get("value")), value["ci_low"], value["ci_high"]))
    return mean, f"{low} to {high}"


def _metric(run: RunFolder, metric: str, of: str = "") -> str:
    """Name of a metric with its unit or tolerance, which may be that of a class."""
    unit, tolerance = run.metrics.get("unit", ""), run.metrics.get("nsd_tolerance")
    tolerance = tolerance.get(of, "per class,") if isinstance(tolerance, dict) else tolerance
    tolerance = f"{tolerance:g}" if isinstance(tolerance, float) else tolerance
    about = {"hd95": f" ({unit})", "nsd": f" (tolerance {tolerance} {unit})"}
    words = re.sub(r" at (\d+)$", r" at \1 % sensitivity", metric.replace("_", " ").replace(" auc", " AUC"))
    return NAMES.get(metric, words) + about.get(metric, "")


def _gain(run: RunFolder, first: RunFolder, comparison: Sequence[Row]) -> str:
    """The gain over the undistilled student in words, or that it was not measured."""
    if run.record and not teachers_of(run.record)[1]:
        return ""
    rows = [row for row in comparison if row["name"] == run.name and first.record and not teachers_of(first.record)[1]]
    if not rows:
        how = "give the folder of the same training without teachers first (report UNDISTILLED RUN)."
        return f"Gain over the undistilled student: not measured; {how}"
    told = ["{1} {3} (95 % interval {4})".format(*_compared(row)) for row in rows]
    holds_0 = any(not (row["ci_low"] > 0 or row["ci_high"] < 0) for row in rows)
    unclear = "; an interval that holds 0 shows no gain" if holds_0 else ""
    same = ("seed", "max_epochs", "student_parameters", "labelled_samples", "recipe", "image_size")
    differ = [key.replace("_", " ") for key in same if run.record.get(key) != first.record.get(key)]
    splits = {of.record.get("data", {}).get("split_hash") for of in (run, first)}
    differ += ["training data"] * (len(splits) > 1)
    also = f" The two runs also differ in {', '.join(differ)}." if differ else ""
    return f"Gain over the undistilled student ({first.name}): {', '.join(told)}{unclear}.{also}"


def _training_figures(run: RunFolder) -> list[tuple[str, str]]:
    """Title and SVG of everything that has a course over epochs."""

    def pick(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in run.history.items() if k.startswith(prefix)}

    validation = {f"val_{k}": v for k, v in pick("val_").items() if k != "empty_references"}
    weights = pick("weight_")
    drawn = (
        ("Validation score", validation, "score", False),
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
    names, summary, several = list(run.task.classes), run.metrics["summary"], run.task.has_findings
    lines = {} if several else {name: (label == c, p[:, c]) for c, name in enumerate(names)}
    for name, problem in problems_of(run.task).items():
        if several or name not in map(slug, names):  # such as referable grades
            lines[name] = (problem.positive(label), problem.score(p))
    found = [("ROC", figures.roc(lines))]
    if not several:
        counts = np.array(summary["confusion"])
        of = (counts / counts.sum(1, keepdims=True).clip(1), names, names, "predicted", "share of row", counts)
        found.append(("Confusion, true classes by row", figures.heat_map(*of)))
    return [*found, ("Reliability of the probabilities", figures.reliability(summary["reliability"]))]


def _shown(run: RunFolder, ranked: Sequence[list[Row]], runs: int, slices: int) -> dict[str, Any]:
    """The best, median and worst of cases ranked from the worst on, each once, and the ``key`` of their colours."""
    count, third = len(ranked), max(min(1, len(ranked)), len(ranked) // 3)
    best, median, worst = (min(third, max(1, limit // runs)) for limit in SHOWN.values())
    places = {"worst": range(worst), "best": range(count - 1, max(-1, count - 1 - best), -1)}
    places["median"] = range((count - median) // 2, (count + median) // 2)
    chosen: dict[int, str] = {}
    for part, indices in places.items():
        chosen |= {i: part for i in indices if i not in chosen}
    cards, classes, several = [], run.task.classes, len(run.task.classes) > 2
    for i in sorted(chosen, key=lambda i: list(SHOWN).index(chosen[i])):
        case, preview = ranked[i], read_arrays(preview_file(run.folder, str(ranked[i][0]["id"])))
        if preview is not None:
            part = chosen[i] if count > 1 else "only"
            cards.append({"part": part, "id": case[0]["id"], "text": _result(run, case), "preview": preview})
    if not cards or run.task.is_classification:
        colours, key = [], []
    else:
        pixels = np.concatenate([card["preview"]["image"][0].reshape(-1, 3) for card in cards])
        colours = [*contrasting(pixels[None], 2)]
        key = [*zip(classes[1:], class_colours(range(1, len(classes))), strict=True)]
        key = key if several else [*zip(("reference", "student"), colours, strict=True)]
    for card in cards:
        card["views"] = _views(card.pop("preview"), colours, several, slices)
    return {"shown": cards, "key": [(name, "#" + bytes(colour.tolist()).hex()) for name, colour in key]}


def _result(run: RunFolder, rows: Sequence[Row]) -> str:
    """What came out of a case, in words."""
    if run.task.is_classification:
        p, task = labels_and_probabilities(run.task, rows)[1][0], run.task
        true, found = (int(rows[0][key]) for key in ("label", "prediction"))
        if task.has_findings:
            shown = ", ".join(f"{name} {v:.2f}" for name, v in zip(task.classes, p, strict=True))
            return f"true {task.text_of(true)}, predicted {task.text_of(found)} ({shown})"
        return f"true {task.classes[true]} ({p[true]:.2f}), predicted {task.classes[found]} ({p[found]:.2f})"
    told = []
    for row in (row for row in rows if part_of(row) == "classes"):
        digits = {"dice": 3, "nsd": 3, "hd95": 1}
        values = (f"{_metric(run, m, row['class'])} {number(row[m], count)}" for m, count in digits.items())
        text = ", ".join(values) if row["status"] == "ok" else str(row["status"]).replace("_", " ")
        told.append(f"{row['class']}: {text}" if len(rows) > 1 else text)
    return "; ".join(told)


def _views(
    preview: dict[str, np.ndarray], colours: Sequence[np.ndarray], several: bool, slices: int
) -> list[dict[str, Any]]:
    """Pictures of a case: ``frames`` with ``captions``, of which one is seen at a time, and ``marks`` of their sides.

    Of ``several`` classes reference and prediction lie side by side.
    """
    views: list[dict[str, Any]] = []

    def add(frames: Sequence[np.ndarray], captions: Sequence[str], plane: int | None = None) -> None:
        marks = [] if plane is None else list(zip(("left", "right", "top", "bottom"), MARKS[plane], strict=True))
        views.append({"frames": [*map(figures.data_uri, frames)], "captions": captions, "marks": marks})

    def outlines(images: np.ndarray, of: str, rows: Sequence[int], captions: Sequence[str], *plane: int) -> None:
        maps = [(preview[f"{name}{of}"], c) for name, c in zip(("reference", "prediction"), colours, strict=True)]
        for title, panel in (("reference, ", maps[:1]), ("student, ", maps[1:])) if several else (("", maps),):
            panel = [(labels.reshape(images.shape[:3]), colour) for labels, colour in panel]
            side = SIDE if len(rows) > 1 else figures.SHOWN_AT
            frames = [figures.drawn(images[i], [(m[i], c) for m, c in panel], several, side) for i in rows]
            add(frames, [title + caption for caption in captions], *plane)

    image, shape = preview["image"], preview.get("shape", np.zeros(0)).tolist()
    if "at" in preview:
        axis, rows = int(preview["axis"]), np.unique(np.linspace(0, len(image) - 1, slices).round().astype(int))
        for plane, name in enumerate(PLANES):
            caption = f"{name}, slice {preview['at'][plane]} of {shape[plane]}"
            outlines(preview[f"plane{plane}"][None], str(plane), [0], [caption], plane)
        captions = [f"{PLANES[axis]}, slice {preview['numbers'][i]} of {shape[axis]}" for i in rows]
        outlines(image, "", rows.tolist(), captions, axis)
        return views
    large = figures.enlarged(image[0])
    add([large], ["image" + (f", {shape[1]} x {shape[0]} pixels" if shape else "")])
    if "cam" in preview:
        add([figures.mapped(preview["cam"][0], large, "inferno", 0.55)], ["Grad-CAM"])
    elif "prediction" in preview:
        outlines(image, "", [0], ["outlines"])
    return views


def _samples(run: RunFolder) -> list[list[tuple[str, str]]]:
    """Caption and picture of each map of training images: image with label, student, teachers' outputs and weights."""
    arrays = read_arrays(run.folder / TEACHERS)
    if arrays is None or run.task.is_classification:
        return []
    titles = {"student": "student", "answer_": "output of ", "weight_": "weight of "}
    maps = {name: name.replace(of, title) for of, title in titles.items() for name in arrays if name.startswith(of)}
    samples = []
    for i, image in enumerate(arrays["image"]):
        image = image if run.task.dimensions == 2 else np.repeat(image[..., 1:2], 3, -1)  # without its neighbours
        label = [(arrays["label"][i], contrasting(image)[0])]
        row = [("image, label", figures.drawn(image, label, len(run.task.classes) > 2, SIDE))]
        for name, title in maps.items():
            colours, heat = "cividis" if name.startswith("weight_") else "gray", arrays[name][i]
            shown = figures.drawn(figures.mapped(heat, image, colours), label, side=SIDE)
            row.append((f"{title}, mean {heat.mean() / 255:.2f}", shown))
        samples.append([(caption, figures.data_uri(picture)) for caption, picture in row])
    return samples
