"""What happens to an image before the network, and to its answer after it, in NumPy alone.

Each step is a small function that returns the changed array and the way back for the answer. Resizing and resampling
are linear and separable, so each axis has a matrix; the values are those of MONAI's transforms of the same settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from amkd_monai.files.volumes import Grid, ct_extremes, ct_range

Inverse = Callable[[np.ndarray], np.ndarray]
Step = Callable[[np.ndarray, Mapping[str, Any], Grid | None], tuple[np.ndarray, Inverse]]

SPACING_TOLERANCE = 1e-3
"""Voxel sizes (mm) closer than this count as equal, as in MONAI."""
TRUNCATED = 4.0
"""Standard deviations at which MONAI cuts a Gaussian."""
BACKGROUND_LEVEL = 0.06
"""Part of the brightest level up to which a pixel counts as border: JPEG noise there stays below."""
LEAST_PART = 0.02
"""Part of a row or column that must be brighter for it to belong to the disc: dust and text don't."""


def resize_matrix(size: int, new: int, smooth: bool) -> np.ndarray:
    """Linear resizing of one axis with pixel areas aligned, (new, size); a Gaussian comes first where it shrinks."""
    place = np.maximum((np.arange(new) + 0.5) * size / new - 0.5, 0)
    matrix = _interpolation(place, size)
    sigma = (size / new - 1) / 2
    return _blurred(matrix, sigma) if smooth and sigma > 0 else matrix


def spacing_matrix(size: int, new: int, ratio: float) -> np.ndarray:
    """Linear resampling of one axis with the centres of the first voxels aligned, (new, size)."""
    return _interpolation(np.clip(np.arange(new) * ratio, 0, size - 1), size)


def _interpolation(place: np.ndarray, size: int) -> np.ndarray:
    low = np.minimum(place.astype(int), size - 1)
    high, part = np.minimum(low + 1, size - 1), place - low
    matrix = np.zeros((len(place), size), np.float32)
    rows = np.arange(len(place))
    np.add.at(matrix, (rows, low), 1 - part)
    np.add.at(matrix, (rows, high), part)
    return matrix


def _blurred(matrix: np.ndarray, sigma: float) -> np.ndarray:
    """The matrix after a Gaussian of integrated taps, with zeros beyond the border."""
    tail = int(max(sigma * TRUNCATED, 0.5) + 0.5)
    scale = math.sqrt(0.5) / sigma
    result = np.zeros_like(matrix)
    for tap in range(-tail, tail + 1):
        weight = 0.5 * (math.erf(scale * (tap + 0.5)) - math.erf(scale * (tap - 0.5)))
        source = matrix[:, max(-tap, 0) : matrix.shape[1] - max(tap, 0)]
        result[:, max(tap, 0) : matrix.shape[1] - max(-tap, 0)] += weight * source
    return result


def along_axes(array: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Apply one matrix to each spatial axis of (C, ...)."""
    for axis, matrix in enumerate(matrices, start=1):
        array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(array, np.float32)


def disc_box(
    image: np.ndarray, background_level: float = BACKGROUND_LEVEL, least_part: float = LEAST_PART
) -> tuple[slice, slice]:
    """Rows and columns of (C, H, W) that show the retina; all of them where everything is dark."""
    brightest = image.max(0)
    inside = brightest > background_level * max(float(brightest.max()), 1e-6)
    box = []
    for axis in (1, 0):
        used = np.flatnonzero(inside.mean(axis) > least_part)
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None))
    return box[0], box[1]


def squared(image: np.ndarray) -> np.ndarray:
    """Pad the shorter side of (C, H, W) with 0 on both ends to (C, S, S)."""
    height, width = image.shape[-2:]
    side = max(height, width)
    square = np.zeros((len(image), side, side), dtype=image.dtype)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _scale(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    return _to_unit(array, step["low"], step["high"]), _same


def _scale_percentiles(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    low, high = np.percentile(array, [step["lower"], step["upper"]])
    return _to_unit(array, float(low), float(high)), _same


def _ct_window(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    return _to_unit(array, *ct_range(*ct_extremes(array), step["low"], step["high"], step["values"])), _same


def _orientation(array: np.ndarray, step: Mapping[str, Any], grid: Grid | None) -> tuple[np.ndarray, Inverse]:
    assert grid is not None
    order = grid.order_to(step["axes"])
    axes = (0, *(int(i) + 1 for i in np.argsort(order[:, 0])))
    turned = tuple(int(new) + 1 for new, sign in order if sign < 0)
    return np.flip(array.transpose(axes), turned), lambda answer: np.flip(answer, turned).transpose(np.argsort(axes))


def _to_unit(array: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((array - np.float32(low)) / np.float32((high - low) or 1.0)).clip(0, 1)


def _crop_disc(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    rows, columns = disc_box(array, step["background_level"], step["least_part"])
    return squared(array[:, rows, columns]), _same


def _resize(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    sizes, new = array.shape[1:], step["size"]
    if tuple(sizes) == tuple(new):
        return array, _same
    there = [resize_matrix(a, b, step["anti_aliasing"]) for a, b in zip(sizes, new, strict=True)]
    back = [resize_matrix(b, a, False) for a, b in zip(sizes, new, strict=True)]
    return along_axes(array, there), lambda answer: along_axes(answer, back)


def _spacing(array: np.ndarray, step: Mapping[str, Any], grid: Grid | None) -> tuple[np.ndarray, Inverse]:
    assert grid is not None
    there, back = [], []
    for size, old, wanted in zip(array.shape[1:], grid.spacing, step["pixdim"], strict=True):
        target = old if abs(old - wanted) <= SPACING_TOLERANCE else wanted
        new = int(np.round((size - 1) * old / target + 1.0))
        there.append(spacing_matrix(size, new, target / old))
        back.append(spacing_matrix(new, size, old / target))
    return along_axes(array, there), lambda answer: along_axes(answer, back)


def _crop(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    sizes = array.shape[1:]
    wanted = [n if s < 0 else min(s, n) for n, s in zip(sizes, step["size"], strict=True)]
    starts = [max(n // 2 - s // 2, 0) for n, s in zip(sizes, wanted, strict=True)]
    slices = tuple(slice(start, start + s) for start, s in zip(starts, wanted, strict=True))
    widths = [(c.start, n - c.stop) for c, n in zip(slices, sizes, strict=True)]
    return array[(slice(None), *slices)], lambda answer: np.pad(answer, [(0, 0), *widths])


def _pad(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    missing = [max(s - n, 0) for n, s in zip(array.shape[1:], step["size"], strict=True)]
    widths = [(m // 2, m - m // 2) for m in missing]
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, array.shape[1:], strict=True))
    return np.pad(array, [(0, 0), *widths]), lambda answer: answer[(slice(None), *inside)]


def _neighbours(array: np.ndarray, step: Mapping[str, Any], _: Grid | None) -> tuple[np.ndarray, Inverse]:
    index = np.arange(array.shape[1])
    return np.concatenate([array[:, (index + shift).clip(0, index[-1])] for shift in (-1, 0, 1)]), _same


STEPS: dict[str, Step] = {
    "scale": _scale,
    "scale_percentiles": _scale_percentiles,
    "ct_window": _ct_window,
    "orientation": _orientation,
    "crop_disc": _crop_disc,
    "resize": _resize,
    "spacing": _spacing,
    "crop": _crop,
    "pad": _pad,
    "neighbours": _neighbours,
}
"""By name, as an exported bundle's ``configs/predict.json`` lists them."""


def prepare(
    array: np.ndarray, steps: Sequence[Mapping[str, Any]], grid: Grid | None = None
) -> tuple[np.ndarray, list[Inverse]]:
    """Apply all steps.

    Args:
        array: (3, H, W) with levels 0 to 255, or a volume (1, D, H, W).
        steps: their names under ``step`` and their settings.
        grid: of a volume.

    Returns:
        Network input (3, h, w) or (3, d, h, w), and the ways back, first step first.

    Raises:
        ValueError: a step of another version of this package.
    """
    inverses = []
    for step in steps:
        if step["step"] not in STEPS:
            raise ValueError(f"There is no step '{step['step']}' in this version: update amkd_monai or export again.")
        array, inverse = STEPS[step["step"]](array, step, grid)
        inverses.append(inverse)
        if step["step"] == "orientation" and grid is not None:
            grid = grid.reordered(step["axes"])
    return array, inverses


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    """Probabilities along an axis."""
    exponent = np.exp(logits - logits.max(axis, keepdims=True))
    return exponent / exponent.sum(axis, keepdims=True)


def largest_component(mask: np.ndarray, label: int) -> np.ndarray:
    """Keep only the largest connected part of a label, diagonal neighbours included."""
    from scipy import ndimage

    parts, count = ndimage.label(mask == label, structure=np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    return np.where((mask == label) & (parts != largest), 0, mask)
