"""Where in a fundus photograph the retina is; plain NumPy, so that prediction without torch reads it too."""

from __future__ import annotations

import numpy as np

BACKGROUND_LEVEL = 0.06
"""Part of the brightest level up to which a pixel counts as border: JPEG noise there stays below."""
LEAST_PART = 0.02
"""Part of a row or column that must be brighter for it to belong to the disc: dust and text don't."""


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
