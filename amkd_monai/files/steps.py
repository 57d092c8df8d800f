"""Preprocessing of an image before the network, and postprocessing after it, in NumPy alone.

Resizing and resampling are linear and separable, so each axis has a matrix; the values are those of MONAI's transforms.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from amkd_monai.files.volumes import Grid, ct_range

Inverse = Callable[[np.ndarray], np.ndarray]
Stepped = tuple[np.ndarray, Inverse]

SPACING_TOLERANCE = 1e-3  # voxel sizes (mm) closer than this count as equal, as in MONAI
TILT = 1e-8  # voxels: where rounding of oblique axes tilts them by more, MONAI aligns centres in place of first corners
TRUNCATED = 4.0  # standard deviations at which MONAI cuts a Gaussian
BACKGROUND_LEVEL = 0.06  # part of the brightest level up to which a pixel is border: JPEG noise there stays below
LEAST_PART = 0.02  # part of a row or column that must be brighter to belong to the disc: dust and text are not


def _interpolation(place: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation of one axis at places within it, (len(place), size)."""
    place = place.clip(0, size - 1)
    low = place.astype(int)
    part, rows = place - low, np.arange(len(place))
    matrix = np.zeros((len(place), size), np.float32)
    np.add.at(matrix, (rows, low), 1 - part)
    np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), part)
    return matrix


def _resize_matrix(size: int, new: int, smooth: bool) -> np.ndarray:
    """Resizing of one axis with pixel areas aligned, (new, size); a Gaussian comes first where it shrinks."""
    matrix = _interpolation((np.arange(new) + 0.5) * size / new - 0.5, size)
    sigma = (size / new - 1) / 2
    if not smooth or sigma <= 0:
        return matrix
    tail = int(max(sigma * TRUNCATED, 0.5) + 0.5)
    scale = math.sqrt(0.5) / sigma
    blurred = np.zeros_like(matrix)
    for tap in range(-tail, tail + 1):  # integrated over each pixel, with zeros beyond the border
        weight = 0.5 * (math.erf(scale * (tap + 0.5)) - math.erf(scale * (tap - 0.5)))
        source = matrix[:, max(-tap, 0) : size - max(tap, 0)]
        blurred[:, max(tap, 0) : size - max(-tap, 0)] += weight * source
    return blurred


def _along_axes(array: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Apply one matrix to each spatial axis of (C, ...)."""
    for axis, matrix in enumerate(matrices, start=1):
        array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(array, np.float32)


def scale(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map values of any shape from ``low`` to ``high`` to [0, 1]; others are clipped."""
    return ((array - np.float32(low)) / np.float32((high - low) or 1.0)).clip(0, 1)


def _scale_percentiles(array: np.ndarray, lower: float, upper: float, channel_wise: bool = False) -> np.ndarray:
    parts = array if channel_wise else array[None]
    scaled = [scale(part, *map(float, np.percentile(part, [lower, upper]))) for part in parts]
    return np.stack(scaled) if channel_wise else scaled[0]


def crop_disc(
    image: np.ndarray, background_level: float = BACKGROUND_LEVEL, least_part: float = LEAST_PART
) -> np.ndarray:
    """Cut what is dark around the retina from (C, H, W), and pad the shorter side with 0 on both ends to (C, S, S)."""
    brightest = image.max(0)
    inside = brightest > background_level * max(float(brightest.max()), 1e-6)
    used = [np.flatnonzero(inside.mean(axis) > least_part) for axis in (1, 0)]
    image = image[:, *(slice(int(u[0]), int(u[-1]) + 1) if len(u) else slice(None) for u in used)]
    missing = [max(image.shape[1:]) - n for n in image.shape[1:]]
    return np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])


def neighbours(array: np.ndarray) -> np.ndarray:
    """Slices of a volume (C, D, H, W) with their two neighbours as channels (3 C, D, H, W), see NeighbourSlicesd."""
    index = np.arange(array.shape[1])
    shifted = np.stack([array[:, (index + shift).clip(0, index[-1])] for shift in (-1, 0, 1)], 1)
    return shifted.reshape(-1, *array.shape[1:])


def _orientation(array: np.ndarray, grid: Grid, axes: str) -> Stepped:
    order = grid.order_to(axes)
    places = (0, *(int(i) + 1 for i in np.argsort(order[:, 0])))
    turned = tuple(int(new) + 1 for new, sign in order if sign < 0)
    back = np.argsort(places)
    return np.flip(array.transpose(places), turned), lambda answer: np.flip(answer, turned).transpose(back)


def _resize(array: np.ndarray, grid: Grid | None, size: Sequence[int], anti_aliasing: bool) -> Stepped:
    sizes = array.shape[1:]
    if tuple(sizes) == tuple(size):
        return array, lambda answer: answer
    there = [_resize_matrix(a, b, anti_aliasing) for a, b in zip(sizes, size, strict=True)]
    back = [_resize_matrix(b, a, False) for a, b in zip(sizes, size, strict=True)]
    return _along_axes(array, there), lambda answer: _along_axes(answer, back)


def _spacing(array: np.ndarray, grid: Grid, pixdim: Sequence[float]) -> Stepped:
    there, back, old, sizes = [], [], np.array(grid.spacing), np.array(array.shape[1:])
    target = np.where(np.abs(old - pixdim) <= SPACING_TOLERANCE, old, pixdim)
    axes, wanted = grid.affine[:3, :3], np.eye(4)
    wanted[:3, :3] = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T) @ np.diag(target)
    corners = np.indices((2, 2, 2)).reshape(3, -1) * (sizes[:, None] - 1)
    corners = (np.linalg.solve(wanted, grid.affine) @ np.vstack([corners, np.ones(8)]))[:3]  # halves round as in MONAI
    counts, is_tilted = np.round(np.ptp(corners, axis=1) + 1).astype(int), (corners - corners[:, :1]).min() < -TILT
    for size, new, ratio in zip(sizes, counts, target / old, strict=True):
        first = (size - new * ratio) / 2 if is_tilted else 0.0
        there.append(_interpolation(first + np.arange(new) * ratio, size))
        back.append(_interpolation((np.arange(size) - first) / ratio, new))
    return _along_axes(array, there), lambda answer: _along_axes(answer, back)


def _crop(array: np.ndarray, grid: Grid | None, size: Sequence[int]) -> Stepped:
    inside, widths = [slice(None)], [(0, 0)]
    for n, wanted in zip(array.shape[1:], size, strict=True):
        kept = n if wanted < 0 else min(wanted, n)
        start = max(n // 2 - kept // 2, 0)
        inside.append(slice(start, start + kept))
        widths.append((start, n - start - kept))
    return array[tuple(inside)], lambda answer: np.pad(answer, widths)


def _pad(array: np.ndarray, grid: Grid | None, size: Sequence[int]) -> Stepped:
    missing = [max(wanted - n, 0) for n, wanted in zip(array.shape[1:], size, strict=True)]
    inside = [slice(m // 2, m // 2 + n) for n, m in zip(array.shape[1:], missing, strict=True)]
    return np.pad(array, [(0, 0), *((m // 2, m - m // 2) for m in missing)]), lambda answer: answer[:, *inside]


ONE_WAY: dict[str, Callable[..., np.ndarray]] = {
    "scale": scale,
    "scale_percentiles": _scale_percentiles,
    "ct_window": lambda array, low, high, values: scale(array, *ct_range(array, low, high, values)),
    "crop_disc": crop_disc,
    "neighbours": neighbours,
}
"""Steps without a way back, by name, as an exported bundle's ``configs/predict.json`` lists them."""
INVERTIBLE: dict[str, Callable[..., Stepped]] = {
    "orientation": _orientation,
    "resize": _resize,
    "spacing": _spacing,
    "crop": _crop,
    "pad": _pad,
}


def prepare(
    array: np.ndarray, steps: Sequence[Mapping[str, Any]], grid: Grid | None = None
) -> tuple[np.ndarray, list[Inverse]]:
    """Apply steps, given by name under ``step`` with their settings, to (3, H, W), 0 to 255, or a volume (1, D, H, W).

    Returns the network input (3, h, w) or (3, d, h, w), and the ways back. An unknown step is a ValueError.
    """
    inverses = []
    for step in steps:
        settings = dict(step)
        if (name := settings.pop("step")) in ONE_WAY:
            array = ONE_WAY[name](array, **settings)
            continue
        if name not in INVERTIBLE:
            raise ValueError(f"There is no step '{name}' in this version: update amkd_monai or export again.")
        array, inverse = INVERTIBLE[name](array, grid, **settings)
        inverses.append(inverse)
        if name == "orientation" and grid is not None:
            grid = grid.reordered(settings["axes"])
    return array, inverses


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    """Probabilities along an axis of logits, of the same shape."""
    exponent = np.exp(logits - logits.max(axis, keepdims=True))
    return exponent / exponent.sum(axis, keepdims=True)


def largest_component(mask: np.ndarray, label: int) -> np.ndarray:
    """Keep only the largest connected part of a label of a mask, (H, W) or (X, Y, Z), diagonal neighbours included."""
    from scipy import ndimage

    parts, count = ndimage.label(mask == label, structure=np.ones((3,) * mask.ndim))
    largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:])) if count else 0
    return np.where((mask == label) & (parts != largest), 0, mask)
