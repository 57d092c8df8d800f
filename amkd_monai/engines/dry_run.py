"""``python -m amkd_monai teachers <bundle>``: the table of what a bundle's teachers would do and cost here."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from amkd_monai.data.datasets import Task, get_task
from amkd_monai.engines.prepare import open_bundle
from amkd_monai.teachers.base import CROSS_FITTED_KINDS, build_teacher
from amkd_monai.teachers.catalogue import how_to_get
from amkd_monai.teachers.plan import Plan, check, choose, official_entry, official_teachers, seen
from amkd_monai.terminal import align

HEADER = ("teacher", "file", "teaches", "prompt", "input", "s/image", "MB/image", "licence", "seen in training")


def format_bundle(bundle: str | Path, settings: Mapping[str, Any], weights_dir: str | None = None) -> str:
    """Return the table of a bundle's teachers, one for each task where it has several, and how to get missing ones.

    Every teacher is built and asked once, with an image of noise; ``settings`` are those that a run would change.
    """
    parser = open_bundle(bundle, {**settings, **({"weights_dir": weights_dir} if weights_dir else {})})
    if "task_set" not in parser.config:
        return format_task(parser)
    tasks = parser.get_parsed_content("task_set").bundles
    return "\n\n".join(f"{name}\n{format_task(of_task.parser)}" for name, of_task in tasks.items())


def format_task(parser: ConfigParser) -> str:
    """Return the table of the teachers of one task, whose bundle's config was read."""
    names = ("teachers", "weights_dir", "fallback_teachers", "device")
    (teachers, weights_dir, fallback, device), task = map(parser.get_parsed_content, names), get_task(parser["task"])
    described, lines = choose(teachers, task, weights_dir, fallback)
    height, width = parser.get("volume_size", [0, *[parser.get("image_size")] * 2])[1:]
    size = int(height), int(width)
    plans = check(described, task.answers, task.per_image, weights_dir, size, device)
    rows = [_row(d, found, task, size, device, weights_dir) for d, found in zip(described, plans, strict=True)]
    missing = [how_to_get(e, weights_dir) for e, file in official_teachers("auto", task, weights_dir) if file is None]
    return "\n".join([align([HEADER, *rows], left=None, ruled=True), *lines, *missing])


def _row(
    description: Mapping[str, Any],
    found: Plan,
    task: Task,
    size: tuple[int, int],
    device: torch.device,
    weights_dir: str | None,
) -> tuple[str, ...]:
    name, kind, file = found.name, description["kind"], found.file[0].name if found.file else "packaged"
    if kind in CROSS_FITTED_KINDS:
        return name, "none", "answers of networks trained in folds", "", "", "", "", "yours", "your training split"
    teacher = build_teacher(description, weights_dir).to(device)
    sides = (found.image_size,) * 2 if isinstance(found.image_size, int) else found.image_size or size
    image = torch.rand(1, 3, *sides, device=device)
    inputs = [image, *([torch.zeros_like(image[:, :1]).long()] if teacher.uses_labels else [])]
    start = time.perf_counter()
    with torch.inference_mode():
        outputs = teacher(*inputs)
    values = [v for v in (outputs.grid, outputs.pooled, outputs.logits) if v is not None]
    if not all(value.isfinite().all() for value in values):  # reading a value waits for the device
        raise ValueError(f"The teacher '{name}' answers with NaN or infinity: check its weights.")
    seconds, megabytes = time.perf_counter() - start, sum(v.numel() for v in values) * 2 / 1e6
    own = outputs.logits is not None and outputs.logits.ndim == 4 and description.get("own_answers", True)
    features = outputs.grid is not None
    probed = features and description.get("cross_fit", True)
    teaches = [*(["features"] if features else []), *(["its own answers"] if own else ["a probe's answers"] * probed)]
    prompt = description.get("prompts") or description.get("token_ids") or description.get("prompt") or "none"
    known = official_entry(description)
    learned = seen(known, task) if known else "no" if file == "packaged" else "not known"
    side = " x ".join(map(str, image.shape[-2:]))
    text = ", ".join(map(str, prompt)) if isinstance(prompt, list) else str(prompt)
    return name, file, " and ".join(teaches), text, side, f"{seconds:.2f}", f"{megabytes:.2f}", teacher.licence, learned
