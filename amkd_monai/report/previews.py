"""Small copies of the cases of an evaluation, which the report shows."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from amkd_monai.files.masks import IGNORED
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.volumes import grey_levels, read_volume
from amkd_monai.storage import atomic_path

SIDE = 256
"""Longest side of a preview in pixels."""
SLICES = 24
"""Slices kept of a volume."""


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as a compressed ``.npz``, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def mask_preview(filename: str, reference: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
    """Return the small copies of an image file and its masks (H, W), or (X, Y, Z) of a volume.

    They are ``image`` (S, h, w, 3) uint8, ``reference`` and ``prediction`` (S, h, w) uint8, S = 1 for an image and
    evenly spaced slices along the last axis for a volume; of a volume also ``plane0`` to ``plane2`` (h, w, 3) with
    ``reference0``, ``prediction0`` and so on, through the centre of the reference.
    """
    known = reference != IGNORED
    reference, prediction = ((mask * known).astype(np.uint8) for mask in (reference, prediction))
    if reference.ndim == 2:
        named = {"image": read_picture(filename), "reference": reference, "prediction": prediction}
        return {name: small(array[None]) for name, array in named.items()}
    grey = grey_levels(read_volume(filename)[0])
    inside = np.argwhere(reference if reference.any() else np.ones_like(reference))
    centre, first, last = inside.mean(0).round().astype(int), inside[:, 2].min(), inside[:, 2].max()
    chosen = np.unique(np.linspace(max(first - 2, 0), min(last + 2, grey.shape[2] - 1), SLICES).round().astype(int))
    arrays: dict[str, np.ndarray] = {}
    for name, volume in (("image", grey), ("reference", reference), ("prediction", prediction)):
        parts = {name: small(np.moveaxis(volume[..., chosen], 2, 0))}
        for axis in range(3):
            plane = "plane" if name == "image" else name
            parts[f"{plane}{axis}"] = small(np.take(volume, centre[axis], axis)[None])[0]
        arrays |= {k: np.repeat(a[..., None], 3, -1) if name == "image" else a for k, a in parts.items()}
    return arrays


def small(array: np.ndarray) -> np.ndarray:
    """Take every n-th pixel (S, H, W[, 3]) so that no side is longer than ``SIDE``."""
    step = math.ceil(max(array.shape[1:3]) / SIDE)
    return array[:, ::step, ::step]
