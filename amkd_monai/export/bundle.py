"""Write the student-only bundle: everything is made beside its place and appears only when it is complete."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import amkd_monai
from amkd_monai.atomic import atomic_folder
from amkd_monai.export import check, formats
from amkd_monai.export.card import model_card
from amkd_monai.export.memory import peak_memory
from amkd_monai.export.runners import runner, torch_runner
from amkd_monai.export.source import Source, spread
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES
from amkd_monai.terminal import progress
from amkd_monai.weights import file_sha256

PREDICT_VERSION = 2
"""Of ``configs/predict.json``."""
CALIBRATION_SLICES = 8
"""Slices taken from each volume to calibrate 8 bits."""


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        formats: as from :py:func:`amkd_monai.export.formats.chosen_formats`.
        accept_loss: keep 8 bits whatever they cost.
        cases: validation images that each format answers, at most.
        calibration: training images that calibrate 8 bits, at most.
    """

    formats: list[str]
    accept_loss: bool = False
    cases: int = 100
    calibration: int = 32


def export_bundle(source: Source, to: str | Path, options: Options, say: Callable[[str], None] = print) -> Path:
    """Export a student.

    Args:
        source: the opened training bundle.
        to: folder to make.
        options: how.
        say: gets the table and remarks.

    Raises:
        ValueError: a format does not answer as the student does.
        FileExistsError: ``to`` is there already.
    """
    to = Path(to)
    with atomic_folder(to) as partial:
        for folder in ("configs", "docs", "models"):
            (partial / folder).mkdir()
        facts = _write_models(source, partial / "models", options, say)
        _write_texts(source, partial, to.name, facts)
        _write_digests(partial)
    return to


def _write_models(source: Source, folder: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Write and check every format; return what is to be told about it."""
    chosen = spread(source.validation, options.cases)
    cases = [source.case(item) for item in chosen]
    formats.check_size(options.formats, cases[0].batch.shape[-2:])
    run = torch_runner(source.student)
    expected = [check.probabilities(run, case) for case in cases]
    torch.save(source.state, folder / "model.pt")
    size = (folder / "model.pt").stat().st_size
    student = check.measure("eager", run, size, math.nan, cases, expected, source.task)
    rows = [student]
    calibration = spread(source.train, options.calibration) if any(map(formats.is_int8, options.formats)) else []
    batches: list[np.ndarray] = []
    for item in calibration:
        batch = source.case(item).batch
        batches += [
            batch[i : i + 1] for i in np.linspace(0, len(batch) - 1, min(len(batch), CALIBRATION_SLICES), dtype=int)
        ]
    image, threads = np.ascontiguousarray(cases[0].batch[:1]), torch.get_num_threads()
    for name in progress(options.formats, desc="export"):
        path = formats.write(name, source.student, torch.from_numpy(image), folder, batches)
        size, memory = formats.file_size(path), peak_memory(name, path, image, threads)
        run = runner(name, path, threads)
        rows.append(check.measure(name, run, size, memory, cases, expected, source.task))
    say(check.format_rows(rows, source.task, threads))
    remarks = [remark for row in rows[1:] if (remark := check.judge(row, student, options.accept_loss))]
    for remark in remarks:
        say(remark)
    return {
        "formats": [row.as_json() for row in rows],
        "threads": threads,
        "metric": "macro_auroc" if source.task.is_classification else "dice",
        "validation_cases": [case.id for case in cases],
        "calibration_images": [str(item["id"]) for item in calibration],
        "remarks": remarks,
        "input_shape": list(cases[0].batch.shape[1:]),
    }


def _write_texts(source: Source, folder: Path, name: str, facts: dict[str, Any]) -> None:
    _dump(folder / "configs" / "inference.json", inference_config(source))
    _dump(folder / "configs" / "metadata.json", metadata(source, facts))
    _dump(folder / "configs" / "predict.json", predict_config(source, facts))
    _dump(folder / "docs" / "export.json", facts)
    (folder / "docs" / "README.md").write_text(model_card(source, facts, name, image_text(source)), encoding="utf-8")
    version = source.metadata["version"]
    (folder / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## {version}\n\nStudent exported from the bundle {source.bundle.resolve().name} by amkd_monai "
        f"{amkd_monai.__version__}.\n",
        encoding="utf-8",
    )
    for place in ("LICENSE", "docs/data_license.txt", "configs/logging.conf"):
        shutil.copyfile(source.bundle / place, folder / place)


def _write_digests(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def inference_config(source: Source) -> dict[str, Any]:
    """``inference.json``: MONAI and TorchScript alone."""
    suffixes = list(PICTURE_SUFFIXES if source.task.dimensions == 2 else VOLUME_SUFFIXES)
    config: dict[str, Any] = {
        "imports": [
            "$import os",
            "$import glob",
            "$import numpy as np",
            "$import torch",
            "$from PIL import Image",
            "$from PIL import ImageOps",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "suffixes": suffixes,
        "datalist": "$[{'image': p} for p in sorted(glob.glob(os.path.join(glob.escape(@dataset_dir), '*'))) "
        "if p.lower().endswith(tuple(@suffixes)) and os.path.isfile(p) "
        "and not os.path.basename(p).split('.')[0].endswith(('_mask', '_overlay'))]",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": source.transforms},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": source.inferer,
        "postprocessing": {"_target_": "Compose", "transforms": source.postprocessing},
        "handlers": [],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
    if source.task.is_classification:
        saver = {
            "_target_": "ClassificationSaver",
            "output_dir": "@output_dir",
            "filename": "predictions.csv",
            "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
            "output_transform": "$lambda output: [item['pred'] for item in output]",
        }
        config["handlers"] = [saver]
    return config


def predict_config(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """``predict.json``: all that prediction by ONNX Runtime needs to know."""
    written = {row["name"] for row in facts["formats"]}
    labels = [t for t in source.postprocessing if t["_target_"] == "KeepLargestConnectedComponentd"]
    return {
        "version": PREDICT_VERSION,
        "task": source.task.name,
        "kind": source.task.kind,
        "dimensions": source.task.dimensions,
        "classes": list(source.task.classes),
        "models": {name: f"models/{formats.FORMATS[name]}" for name in ("onnx", "ort-int8") if name in written},
        "steps": source.steps,
        "largest_component": [label for t in labels for label in t["applied_labels"]],
        "batch_size": check.BATCH,
    }


def image_text(source: Source) -> str:
    """What an image is and how it is prepared, sizes as they are in this student's preprocessing."""
    text = [part for part in source.metadata["image_classes"].split(", ") if not re.search(r"\d x \d", part)]
    words = {"Resized": "resized to", "CenterSpatialCropd": "centre-cropped to", "SpatialPadd": "padded to"}
    for step in source.image_steps:
        name = step["transform"]
        if name == "Spacingd":
            text.append(f"resampled to {_times(step['pixdim'])} mm")
        elif name in words:
            text.append(f"{words[name]} {_times(step['roi_size' if 'roi_size' in step else 'spatial_size'])}")
    return ", ".join(text)


def _times(numbers: Sequence[float]) -> str:
    return " x ".join("any" if n == -1 else f"{n:g}" for n in numbers)


def metadata(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """``metadata.json``: the training bundle's, with what was measured and without the packages of training."""
    values = source.metrics.get("summary", {}).get("metrics", {})
    measured = {name: value.get("mean", value.get("value")) for name, value in values.items()}
    result = {**source.metadata, "image_classes": image_text(source)}
    result["eval_metrics"] = {name: value for name, value in measured.items() if value is not None}
    reader = "pillow" if source.task.dimensions == 2 else "nibabel"
    needed = ("pytorch-ignite", reader, *(("scikit-image",) if source.task.dimensions == 3 else ()))
    result["required_packages_version"] = {name: importlib.metadata.version(name) for name in needed}
    for key, package in (("monai_version", "monai"), ("pytorch_version", "torch"), ("numpy_version", "numpy")):
        result[key] = importlib.metadata.version(package).split("+")[0]
    formats_of_network = json.loads(json.dumps(result["network_data_format"]))
    formats_of_network["inputs"]["image"]["spatial_shape"] = facts["input_shape"][1:]
    if not source.task.is_classification:
        formats_of_network["outputs"]["pred"]["spatial_shape"] = facts["input_shape"][1:]
    result["network_data_format"] = formats_of_network
    return result
