"""What an exported bundle says about its student: its configs and its model card, from what the run recorded."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from amkd_monai.export.formats import FORMATS
from amkd_monai.export.predict import VERSION
from amkd_monai.export.source import Source
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES

BATCH = 8
"""Pictures, or slices of a volume, that a network takes at once."""
INFERENCE, CARD = (Path(__file__).with_name(name) for name in ("inference.json", "card.md"))
"""Config of a bundle that needs MONAI and TorchScript alone, and template of the model card."""


def configs(source: Source, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the contents of ``configs/`` by name; ``facts`` is the content of ``docs/export.json``."""
    inference, task = json.loads(INFERENCE.read_text(encoding="utf-8")), source.task
    inference["suffixes"] = list(PICTURE_SUFFIXES if task.dimensions == 2 else VOLUME_SUFFIXES)
    inference["preprocessing"]["transforms"] = source.transforms
    inference["inferer"] = source.inferer
    inference["postprocessing"]["transforms"] = source.postprocessing
    if not task.is_classification:
        inference["handlers"] = []  # masks are saved by the postprocessing
    written = {row["name"] for row in facts["formats"]}
    parts = [t["applied_labels"] for t in source.postprocessing if t["_target_"] == "KeepLargestConnectedComponentd"]
    predict = {
        "version": VERSION,
        **{"task": task.name, "kind": task.kind, "dimensions": task.dimensions, "classes": list(task.classes)},
        "models": {name: f"models/{FORMATS[name]}" for name in ("onnx", "ort-int8") if name in written},
        "steps": source.steps,
        "largest_component": [label for labels in parts for label in labels],
        "batch_size": BATCH,
    }
    return {"inference": inference, "metadata": _metadata(source, facts), "predict": predict}


def _metadata(source: Source, facts: dict[str, Any]) -> dict[str, Any]:
    """``metadata.json``: the training bundle's, with what was measured and without the packages of training."""
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
    shape, formats = facts["input_shape"][1:], result["network_data_format"]
    formats["inputs"]["image"]["spatial_shape"] = shape
    if not source.task.is_classification:
        formats["outputs"]["pred"]["spatial_shape"] = shape
    return result


def image_text(source: Source) -> str:
    """Describe an image and its preparation, with the sizes of this student's preprocessing."""
    text = [part for part in source.metadata["image_classes"].split(", ") if not re.search(r"\d x \d", part)]
    words = {
        "Spacingd": ("resampled to", "pixdim", " mm"),
        "Resized": ("resized to", "spatial_size", ""),
        "CenterSpatialCropd": ("centre-cropped to", "roi_size", ""),
        "SpatialPadd": ("padded to", "spatial_size", ""),
    }
    for step in source.image_steps:
        if step["transform"] in words:
            verb, key, unit = words[step["transform"]]
            sizes = " x ".join("any" if n == -1 else f"{n:g}" for n in step[key])
            text.append(f"{verb} {sizes}{unit}")
    return ", ".join(text)


def format_cells(facts: dict[str, Any]) -> list[Sequence[str]]:
    """Return the table of formats, header first."""
    metric = {"macro_auroc": "macro AUC", "dice": "Dice"}[facts["metric"]]
    cells: list[Sequence[str]] = [("format", "MB", "p50 ms", "p95 ms", "peak MB", "max difference", metric)]
    for row in facts["formats"]:
        sizes = [_number(row[key], 1) for key in ("megabytes", "p50", "p95")]
        cells.append(
            [row["name"], *sizes, _number(row["memory"], 0), f"{row['difference']:.1e}", _number(row["metric"])]
        )
    return cells


def model_card(source: Source, facts: dict[str, Any], name: str) -> str:
    """Return ``docs/README.md``; ``facts`` is the content of ``docs/export.json``, ``name`` the folder's."""
    unknown = "not recorded: the run left no run.json"
    recorded, distillation = source.record.get("data", {}), source.record.get("distillation", {})
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        about=source.metadata,
        facts=facts,
        name=name,
        images=image_text(source),
        is_phantom=source.data.is_phantom,
        no_teachers="none: trained with labels alone" if "distillation" in source.record else unknown,
        parameters=sum(p.numel() for p in source.student.parameters()),
        recorded=recorded,
        samples=", ".join(f"{k} {v}" for k, v in recorded.get("counts", {}).items()) or unknown,
        summary=source.metrics.get("summary", {"metrics": {}}),
        table=format_cells(facts),
        teachers=distillation.get("teachers", []) if isinstance(distillation, dict) else [],
        temperature=float(source.state["temperature"]) if "temperature" in source.state else None,
        unknown=unknown,
        unscored=source.unscored,
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
