"""Writes the student-only bundle; compares formats with the student: outputs, metric, size, latency, memory.

Everything is written to a temporary folder and appears only when it is complete.
"""

import copy
import importlib.metadata
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from amkd_monai import __version__
from amkd_monai.data.datasets import Task
from amkd_monai.data.splits import Item, spread
from amkd_monai.errors import root_cause
from amkd_monai.export import formats
from amkd_monai.export.page import write_page
from amkd_monai.export.predict import SEEN, VERSION
from amkd_monai.export.repositories import write_hub, write_triton
from amkd_monai.export.runners import Runner, peak_memory, runner, torch_runner
from amkd_monai.export.source import Case, Source
from amkd_monai.export.windows import first_input, logits_of
from amkd_monai.files.masks import IGNORED
from amkd_monai.files.names import DICOM_SUFFIX, PICTURE_SUFFIXES, VOLUME_SUFFIXES
from amkd_monai.files.steps import softmax
from amkd_monai.metrics.classification import class_metrics
from amkd_monai.metrics.summary import class_summaries
from amkd_monai.storage import atomic_folder, atomic_write_json
from amkd_monai.terminal import align, logger, number, progress
from amkd_monai.weights import file_sha256

CALIBRATION_SLICES = 8  # slices taken from each volume to calibrate 8 bits
TOLERANCE = 1e-4  # largest difference of a probability between the student and a float format
LARGEST_LOSS = 0.005  # Dice (half a point) or AUC that 8 bits may cost
REPEATS = 20
BATCH = 8  # pictures, or slices of a volume, that a network takes at once
INFERENCE, CARD = (Path(__file__).with_name(name) for name in ("inference.json", "card.md"))
"""Config of a bundle that needs MONAI and TorchScript alone, and template of the model card.

In the config, ``datalist_of_channels`` lists a folder whose channels are files ending in ``_0000`` and so on, and
``one_mask_each`` refuses images of which MONAI's writer would keep the last one's mask alone.
"""
SIZED = {
    "Spacingd": ("resampled to {} mm", "pixdim"),
    "Resized": ("resized to {}", "spatial_size"),
    "CenterSpatialCropd": ("centre-cropped to {}", "roi_size"),
    "SpatialPadd": ("padded to {}", "spatial_size"),
}
"""Words of a transform that sets a size, and its setting."""


class Row(NamedTuple):
    """What was measured about one format."""

    name: str  # ``eager`` is the student itself
    megabytes: float
    p50: float  # latency of one image, ms, like ``p95``
    p95: float
    memory: float | None  # peak of a fresh process that answers one image, MB; None for the student itself
    difference: float  # largest, of a probability from the student's
    metric: float | None  # mean Dice over cases with foreground, or macro AUC; None where the cases do not define it


def export_bundle(
    source: Source,
    to: Path,
    names: Sequence[str],
    accept_loss: bool,
    cases: int,
    calibration: int,
    web_runtime: Path | None = None,
) -> list[str]:
    """Export a student to a new folder, print how each format compares with it, and return why some were left out.

    A format that fails, or does not answer as the student does, is left out; of TorchScript that is a ValueError.

    Args:
        source: the opened training bundle.
        to: new folder; one that exists is a FileExistsError.
        names: formats, as from :func:`~amkd_monai.export.formats.chosen_formats`.
        accept_loss: keep 8 bits whatever they cost.
        cases: validation images that each format answers, at most.
        calibration: training images that calibrate 8 bits, at most.
        web_runtime: archive of ONNX Runtime Web; with it the page is written.
    """
    with atomic_folder(to) as folder:
        networks = [name for name in names if name in formats.FORMATS]
        checked = [source.case(item) for item in spread(source.data.validation, cases)]
        facts = _write_models(source, folder / "models", networks, accept_loss, checked, calibration)
        for name, content in configs(source, facts).items():
            atomic_write_json(folder / "configs" / f"{name}.json", content)
        seen = [image for of_folder in source.identity.get("seen", {}).values() for image in of_folder.items()]
        atomic_write_json(folder / SEEN, dict(seen))
        origin = f"Student exported from the bundle {source.bundle.resolve().name} by amkd_monai {__version__}."
        changelog = f"# Changelog\n\n## {source.metadata['version']}\n\n{origin}\n"
        for file, text in (("docs/README.md", model_card(source, facts, to.name)), ("CHANGELOG.md", changelog)):
            (folder / file).write_text(text, encoding="utf-8")
        for place in ("LICENSE", "docs/data_license.txt", "configs/logging.conf"):
            shutil.copyfile(source.bundle / place, folder / place)
        for name in (name for name in names if name in formats.REPOSITORIES):
            if not (folder / "models" / formats.FORMATS["onnx"]).is_file():
                facts["left_out"].append(f"{name} is left out: it needs the format onnx.")
            elif name == "hub":
                write_hub(folder, source)
            else:
                write_triton(folder, to.name)
        atomic_write_json(folder / "docs" / "export.json", facts)
        try:
            if web_runtime:
                write_page(folder, web_runtime)
        except ValueError as error:
            facts["left_out"].append(f"{formats.PAGE} is left out: {error}")
            atomic_write_json(folder / "docs" / "export.json", facts)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
        (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    return list(facts["left_out"])


def _write_models(
    source: Source, folder: Path, names: Sequence[str], accept_loss: bool, cases: list[Case], most_calibration: int
) -> dict[str, Any]:
    """Write and check every format; return the content of ``export.json``."""
    folder.mkdir()
    image = first_input(cases[0].batch, source.window)
    patch = image.shape[1:] if source.window else None
    if not patch:
        formats.check_size(names, image.shape[-2:])
    run, threads = torch_runner(source.student), torch.get_num_threads()
    expected = [softmax(source.logits_of(case), 1) for case in cases]
    torch.save(source.state, folder / "model.pt")
    rows = [_measure("eager", run, folder / "model.pt", None, cases, expected, source)]
    calibration = spread(source.data.train, most_calibration) if any(map(formats.is_int8, names)) else []
    slices, metadata = calibration_batches(source, calibration), _metadata(source, image.shape[1:])
    remarks, left_out = list[str](), list[str]()
    for name in progress(names, desc="export"):
        before = {*folder.iterdir()}
        try:
            path = formats.write(name, source.student, folder, slices, metadata, patch)
            memory = peak_memory(name, path, image, threads)
            row = _measure(name, runner(name, path, threads), path, memory, cases, expected, source)
            remarks += [remark] if (remark := judge(row, rows[0], accept_loss)) else []
            rows.append(row)
        except Exception as error:  # exporters and runtimes raise whatever they like
            if name == "ts":
                raise
            logger.debug("The format %s failed.", name, exc_info=True)
            for file in {*folder.iterdir()} - before:
                file.unlink()
            reason = " ".join(str(root_cause(error)).split()) or type(error).__name__
            left_out.append(f"{name} is left out: {reason}")
    written = {row.name for row in rows}
    facts = {
        "formats": [row._asdict() for row in rows],
        "threads": threads,
        "metric": "macro_auroc" if source.task.is_classification else "dice",
        "validation_cases": [case.id for case in cases],
        "calibration_images": [str(item["id"]) for item in calibration],
        "input_shape": list(image.shape[1:]),
        "window": source.window,
        "remarks": remarks,
        "left_out": left_out,
        "sha256": {n: file_sha256(folder / formats.FORMATS[n]) for n in ("onnx", "ort-int8") if n in written},
    }
    of = "patch" if patch else "image"
    print(align(format_cells(facts)), f"(one {of}, CPU, threads: {threads})", *remarks, sep="\n")
    return facts


def calibration_batches(source: Source, items: Sequence[Item]) -> list[np.ndarray]:
    """Load what calibrates 8 bits: pictures, or some slices of each volume, (1, 3, H, W)."""
    batches = [source.case(item).batch for item in items]
    places = [np.linspace(0, len(b) - 1, min(len(b), CALIBRATION_SLICES), dtype=int) for b in batches]
    return [batch[i : i + 1] for batch, of_batch in zip(batches, places, strict=True) for i in of_batch]


def _measure(
    name: str,
    run: Runner,
    path: Path,
    memory: float | None,
    cases: list[Case],
    expected: list[np.ndarray],
    source: Source,
) -> Row:
    """Measure a format against the student's probabilities, ``expected``."""
    answers = [softmax(logits_of(run, case.batch, BATCH, source.window), 1) for case in cases]
    difference = max(float(np.abs(a - e).max()) for a, e in zip(answers, expected, strict=True))
    image, times = first_input(cases[0].batch, source.window), []
    for _ in range(3 + REPEATS):
        start = time.perf_counter()
        run(image)
        times.append((time.perf_counter() - start) * 1e3)
    p50, p95 = np.percentile(times[3:], (50, 95)).tolist()  # the first are a warm-up
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]  # OpenVINO keeps weights aside
    size = sum(file.stat().st_size for file in files) / 1e6
    return Row(name, size, p50, p95, memory, difference, _score(answers, cases, source.task))


def _score(answers: Sequence[np.ndarray], cases: Sequence[Case], task: Task) -> float | None:
    """Macro AUC of the probabilities, or the mean Dice of cases, at the network's resolution; None if undefined."""
    if task.is_classification:
        found = np.concatenate(answers)
        found = found[:, 1] if task.has_findings else found
        area = class_metrics(task)["macro_auroc"](np.array([int(case.label) for case in cases]), found)
        return None if math.isnan(area) else area
    values = []
    for answer, case in zip(answers, cases, strict=True):
        found = np.where(case.label == IGNORED, IGNORED, answer.argmax(1))
        masks = ((found == label, case.label == label) for label in range(1, len(task.classes)))
        if dices := [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in masks if b.any()]:
            values.append(float(np.mean(dices)))
    return float(np.mean(values)) if values else None


def judge(row: Row, student: Row, accept_loss: bool) -> str:
    """Return a remark on what a format costs, empty if it costs nothing.

    A float format that differs from the student, and 8 bits that lose too much unless accepted, are a ValueError.
    """
    is_int8 = formats.is_int8(row.name)
    tolerance = 1.0 if is_int8 else TOLERANCE  # 1: not a number is refused for 8 bits too
    if not row.difference <= tolerance:
        difference = f"by {row.difference:.2g} in a probability, more than {tolerance:g}"
        raise ValueError(f"The format {row.name} differs from the PyTorch student {difference}.")
    if not is_int8:
        return ""
    if row.metric is None or student.metric is None:
        what = "cannot be judged on these cases"
    elif (loss := student.metric - row.metric) > LARGEST_LOSS:
        what = f"loses {loss:.4f} of {student.metric:.4f}"
    else:
        return ""
    remark = f"The format {row.name} {what} (at most {LARGEST_LOSS:g} Dice or AUC is allowed)"
    if not accept_loss:
        raise ValueError(f"{remark}: add --accept-loss to keep it.")
    return f"{remark}, accepted by --accept-loss."


def configs(source: Source, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contents of ``configs/`` by name; ``facts`` is the content of ``docs/export.json``."""
    inference, task = json.loads(INFERENCE.read_text(encoding="utf-8")), source.task
    is_there = " and ".join(f"monai.utils.optional_import('{module}')[1]" for module in _modules(source.network))
    inference |= {
        "student": source.network | {"_disabled_": f"$not ({is_there})"},
        "torchscript": formats.network_text(source.student),
        "not_in_checkpoints": [name for name, _ in source.student.named_buffers() if name not in source.state],
        "suffixes": [s for s in (PICTURE_SUFFIXES if task.dimensions == 2 else VOLUME_SUFFIXES) if s != DICOM_SUFFIX],
        "inferer": source.inferer,
    }
    datalist, one_mask_each = inference.pop("datalist_of_channels"), inference.pop("one_mask_each")
    if not task.is_classification:
        inference["run"].insert(0, one_mask_each)
        del inference["handlers"][1:]  # masks are saved by the postprocessing
    if channels := len(task.channels):
        single = f" or {inference['datalist'][1:]}" if task.dimensions == 3 else ""
        inference["channels"], inference["datalist"] = channels, datalist + single
    present = [{"_target_": "Lambdad", "keys": "pred", "func": "$lambda p: p[1]"}] * task.has_findings
    inference["preprocessing"]["transforms"] = source.transforms
    inference["postprocessing"]["transforms"] = [*source.postprocessing, *present]
    parts = [t["applied_labels"] for t in source.postprocessing if t["_target_"] == "KeepLargestConnectedComponentd"]
    predict = {
        "version": VERSION,
        **task.identity,
        **{"kind": task.kind, "dimensions": task.dimensions, "classes": list(task.classes)},
        "channels": max(1, len(task.channels)),
        "models": {name: f"models/{formats.FORMATS[name]}" for name in facts["sha256"]},
        "sha256": facts["sha256"],
        "steps": source.steps,
        **({"window": source.window} if source.window else {}),
        "largest_component": np.hstack([[], *parts]).astype(int).tolist(),
        "batch_size": BATCH,
        "mask_codes": source.mask_codes,
        "run": source.identity.get("run"),
    }
    return {"inference": inference, "metadata": _metadata(source, facts["input_shape"]), "predict": predict}


def _modules(network: Mapping[str, Any]) -> list[str]:
    """Modules of the classes in a network's config."""
    inner = [_modules(value) for value in network.values() if isinstance(value, Mapping) and "_target_" in value]
    return sorted({network["_target_"].rpartition(".")[0] or "monai", *itertools.chain(*inner)})


def _metadata(source: Source, shape: Sequence[int]) -> dict[str, Any]:
    """``metadata.json``: the training bundle's with what was measured, without the packages of training.

    ``shape`` is that of an input, (C, H, W) or (C, D, H, W).
    """
    values = source.metrics.get("summary", {}).get("metrics", {})
    measured = {name: value.get("mean", value.get("value")) for name, value in values.items()}
    reader = ["pillow"] if source.task.dimensions == 2 else ["nibabel", "scikit-image"]
    version = importlib.metadata.version
    result = copy.deepcopy(source.metadata) | {
        "image_classes": image_text(source),
        "eval_metrics": {name: value for name, value in measured.items() if value is not None},
        "required_packages_version": {name: version(name) for name in ("pytorch-ignite", *reader)},
    }
    for key, package in (("monai_version", "monai"), ("pytorch_version", "torch"), ("numpy_version", "numpy")):
        result[key] = version(package).split("+")[0]
    tensors = [result["network_data_format"]["inputs"]["image"]]
    tensors[0]["num_channels"] = shape[0]
    if not source.task.is_classification:
        tensors.append(result["network_data_format"]["outputs"]["pred"])
    for tensor in tensors:
        tensor["spatial_shape"] = list(shape[1:])
    return result


def image_text(source: Source) -> str:
    """Describe an image and its preparation, with the sizes of this student's preprocessing."""
    text = [part for part in source.metadata["image_classes"].split(", ") if not re.search(r"\d x \d", part)]
    for step in source.transforms:
        if step["_target_"] in SIZED:
            words, key = SIZED[step["_target_"]]
            text.append(words.format(" x ".join("any" if n == -1 else f"{n:g}" for n in step[key])))
    return ", ".join(text)


def format_cells(facts: dict[str, Any]) -> list[Sequence[str]]:
    """Return the table of formats, header first."""
    metric = {"macro_auroc": "macro AUC", "dice": "Dice"}[facts["metric"]]
    cells: list[Sequence[str]] = [("format", "MB", "p50 ms", "p95 ms", "peak MB", "max difference", metric)]
    for row in facts["formats"]:
        sizes = [number(row[key], digits) for key, digits in (("megabytes", 1), ("p50", 1), ("p95", 1), ("memory", 0))]
        cells.append([row["name"], *sizes, f"{row['difference']:.1e}", number(row["metric"])])
    return cells


def model_card(source: Source, facts: dict[str, Any], name: str) -> str:
    """Return ``docs/README.md``; ``facts`` is the content of ``docs/export.json``, ``name`` the folder's."""
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "class_summaries": class_summaries}
    template, table = environment.from_string(CARD.read_text(encoding="utf-8")), format_cells(facts)
    parameters = sum(p.numel() for p in source.student.parameters())
    return template.render(
        source=source, facts=facts, name=name, images=image_text(source), parameters=parameters, table=table
    )
