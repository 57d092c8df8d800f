"""Runs an exported network over an image: in batches, or patch by patch over a volume, with NumPy alone.

The windows, their weights and so the logits are those of MONAI's ``SlidingWindowInferer``.
"""

import itertools
import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np

from amkd_monai.export.runners import Runner
from amkd_monai.files.steps import INVERTIBLE

LEAST_WEIGHT = 1e-3  # of a voxel at the edge of a window with Gaussian weights, as in MONAI


def logits_of(run: Runner, batch: np.ndarray, size: int, window: Mapping[str, Any] | None = None) -> np.ndarray:
    """Return the logits (B, classes, H, W) of pictures or slices of a volume, or (B, classes).

    Args:
        run: the network.
        batch: (B, C, H, W).
        size: images that the network takes at once.
        window: of a network of patches, the settings of :func:`slide`; ``batch`` is then one volume of B slices.
    """
    if window is not None:
        return np.moveaxis(slide(run, np.moveaxis(batch, 0, 1), **window), 0, 1)
    parts = [np.ascontiguousarray(batch[i : i + size], np.float32) for i in range(0, len(batch), size)]
    return np.concatenate([run(part) for part in parts])


def slide(
    run: Runner,
    volume: np.ndarray,
    roi_size: list[int],
    overlap: list[float],
    mode: str,
    sigma_scale: list[float],
) -> np.ndarray:
    """Return the logits (classes, D, H, W) of a volume (C, D, H, W): the weighted mean of those of overlapping patches.

    ``run`` takes patches (1, C, d, h, w) of ``roi_size`` (d, h, w); ``overlap`` is the part that the next one along an
    axis covers, 0 to below 1. A volume is padded with 0 on both ends of an axis that is shorter than a patch. ``mode``
    is ``gaussian``, of standard deviations ``sigma_scale`` in patches, or ``constant`` for equal weights.
    """
    padded, back = INVERTIBLE["pad"](volume, None, size=roi_size)
    weight, size = _weights(roi_size, mode, sigma_scale), padded.shape[1:]
    total, weights = np.zeros((0, *size), np.float32), np.zeros(size, np.float32)
    for place in itertools.product(*map(_starts, size, roi_size, overlap)):
        inside = tuple(slice(start, start + n) for start, n in zip(place, roi_size, strict=True))
        (logits,) = run(np.ascontiguousarray(padded[:, *inside][None], np.float32))
        if not len(total):
            total = np.zeros((len(logits), *size), np.float32)
        total[:, *inside] += logits * weight
        weights[inside] += weight
    total /= weights
    return back(total)


def first_input(batch: np.ndarray, window: Mapping[str, Any] | None = None) -> np.ndarray:
    """Return what the network takes first of a batch (B, C, H, W): (1, C, H, W), or a patch (1, C, d, h, w)."""
    if window is None:
        return np.ascontiguousarray(batch[:1])
    size = window["roi_size"]
    padded, _ = INVERTIBLE["pad"](np.moveaxis(batch, 0, 1), None, size=size)
    return np.ascontiguousarray(padded[None, :, *map(slice, size)])


def _starts(size: int, patch: int, overlap: float) -> list[int]:
    """First indices of the patches along an axis of at least one patch."""
    step = max(int(patch * (1 - overlap)), 1)
    return [min(number * step, size - patch) for number in range(math.ceil((size - patch) / step) + 1)]


def _weights(size: list[int], mode: str, sigma_scale: list[float]) -> np.ndarray:
    """Weights (d, h, w) of the voxels of a patch."""
    if mode == "constant":
        return np.ones(size, np.float32)
    places = [np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2) for n in size]
    lines = [np.exp(p**2 / np.float32(-2 * (n * s) ** 2)) for p, n, s in zip(places, size, sigma_scale, strict=True)]
    weights = reduce(np.multiply.outer, lines)
    return weights.clip(max(float(weights.min()), LEAST_WEIGHT)).astype(np.float32)
