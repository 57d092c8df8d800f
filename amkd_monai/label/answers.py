"""Answers as files and JSON that MONAI Label's clients read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from amkd_monai.files.names import VOLUME_SUFFIXES
from amkd_monai.files.volumes import volume_grid, write_mask_volume
from amkd_monai.tasks import Task


def write_mask(mask: np.ndarray, image: str | Path) -> Path:
    """Write a label map with class indices to a new temporary file, which the caller removes.

    Args:
        mask: (H, W) or (D, H, W), uint8.
        image: the file it belongs to. A volume's mask is NIfTI with the affine of that file, a picture's is PNG.

    Returns:
        The file.
    """
    is_volume = mask.ndim == 3
    handle, name = tempfile.mkstemp(prefix="mask-", suffix=VOLUME_SUFFIXES[0] if is_volume else ".png")
    os.close(handle)
    if is_volume:
        write_mask_volume(Path(name), mask, volume_grid(image))
    else:
        Image.fromarray(mask).save(name)
    return Path(name)


def class_answer(probabilities: np.ndarray, task: Task) -> dict[str, Any]:
    """Return class probabilities (C,) as MONAI Label's ``prediction`` list, and the most probable class."""
    rows = [
        {"idx": index, "label": name, "score": float(p)}
        for index, (name, p) in enumerate(zip(task.classes, probabilities, strict=True))
    ]
    return {"prediction": rows, "class": task.classes[int(probabilities.argmax())]}
