"""Answers as files and JSON that MONAI Label's clients read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from amkd_monai.data.volumes import VOLUME_SUFFIXES
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
        source = nibabel.load(image)
        header = source.header.copy()
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
        nibabel.save(nibabel.Nifti1Image(mask, source.affine, header), name)
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
