"""Small copies of evaluated cases for the report."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from amkd_monai.files.cases import read_case
from amkd_monai.files.masks import IGNORED
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.volumes import Grid, grey_levels, reorder
from amkd_monai.storage import atomic_path

SIDE = 320  # longest side of a preview in pixels
SLICES = 24  # slices kept of a volume
PLANES = ("sagittal", "coronal", "axial")  # planes across the axes of a volume in the order LPS


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as a compressed ``.npz``, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def mask_preview(filename: str, reference: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
    """Return the small copies of an image file and its masks (H, W), or (X, Y, Z) of a volume.

    They are ``image`` (S, h, w, 3) uint8, ``reference`` and ``prediction`` (S, h, w) uint8, and ``shape``, that of the
    file's array. S = 1 for an image. A volume gives evenly spaced slices across its widest voxels, ``plane0`` to
    ``plane2`` (h, w, 3), see ``PLANES``, with ``reference0``, ``prediction0`` and so on through the centre of the
    reference, ``axis`` and ``numbers`` (S,) of the slices, and ``at`` (3,), the numbers of the planes. Numbers count
    from 1 along the axis of the file. Slices stand as radiologists look at them: the patient's right on the left,
    the front on top of axial and on the left of sagittal ones; pixels are square.
    """
    known = reference != IGNORED
    reference, prediction = ((mask * known).astype(np.uint8) for mask in (reference, prediction))
    if reference.ndim == 2:
        named = {"image": read_picture(filename), "reference": reference, "prediction": prediction}
        shape = {"shape": np.array(reference.shape)}
        return {name: small(array[None], smooth=name == "image") for name, array in named.items()} | shape
    channels, grid = read_case([filename])
    turned = {"image": grey_levels(channels[0]), "reference": reference, "prediction": prediction}
    turned = {name: reorder(array, grid, "LPS") for name, array in turned.items()}
    own, spacing = grid.reordered("LPS"), np.array(grid.reordered("LPS").spacing)
    axis = 2 if np.ptp(spacing) < 0.01 * spacing.max() else int(spacing.argmax())
    inside = np.argwhere(turned["reference"] if reference.any() else np.ones(own.shape, np.uint8))
    first, last = inside[:, axis].min(), inside[:, axis].max()
    ends = max(first - 2, 0), min(last + 2, own.shape[axis] - 1)
    chosen, at = np.unique(np.linspace(*ends, SLICES).round().astype(int)), inside.mean(0).round().astype(int)
    arrays = {"shape": np.array(own.shape), "axis": np.array(axis), "numbers": _numbers(grid, chosen, axis)}
    arrays["at"] = np.array([_numbers(grid, at[plane], plane) for plane in range(3)])
    for name, array in turned.items():
        parts = {name: _seen(array, chosen, axis, spacing, name == "image")}
        for plane in range(3):
            of = f"{'plane' if name == 'image' else name}{plane}"
            parts[of] = _seen(array, at[plane : plane + 1], plane, spacing, name == "image")[0]
        arrays |= {k: np.repeat(part[..., None], 3, -1) if name == "image" else part for k, part in parts.items()}
    return arrays


def _seen(array: np.ndarray, indices: np.ndarray, axis: int, spacing: np.ndarray, smooth: bool) -> np.ndarray:
    """Slices (S, h, w) of a volume in the order LPS across an axis, turned to look at, with square pixels."""
    slices = np.moveaxis(array, axis, 0)[indices].swapaxes(1, 2)  # rows along the last axis that is left
    slices = slices if axis == 2 else slices[:, ::-1]  # up is superior
    scale = np.delete(spacing, axis)[::-1] / np.delete(spacing, axis).min()
    height, width = (np.array(slices.shape[1:]) * scale).round().astype(int).tolist()
    return small(slices, (height, width), smooth)


def _numbers(grid: Grid, indices: np.ndarray, axis: int) -> np.ndarray:
    """Numbers, from 1, along an axis of the file, of indices along an axis of its volume in the order LPS."""
    order = grid.order_to("LPS")
    own = int(np.flatnonzero(order[:, 0] == axis)[0])
    return indices + 1 if order[own, 1] > 0 else grid.shape[own] - indices


def small(array: np.ndarray, size: tuple[int, int] | None = None, smooth: bool = True) -> np.ndarray:
    """Scale pixels (S, H, W[, 3]) to a size (h, w), by default their own, of which no side is longer than ``SIDE``.

    What is not ``smooth``, as labels, takes the nearest pixel.
    """
    height, width = size or array.shape[1:3]
    factor = min(1.0, SIDE / max(height, width))
    shape = max(1, round(width * factor)), max(1, round(height * factor))
    method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(part).resize(shape, method)) for part in array])
