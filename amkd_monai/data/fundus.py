"""Fundus photographs: the retina's disc without the black borders that differ from camera to camera."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

BACKGROUND_LEVEL = 0.06
"""Part of the brightest level up to which a pixel counts as border: JPEG noise there stays below."""
LEAST_PART = 0.02
"""Part of a row or column that must be brighter for it to belong to the disc: dust and text don't."""


def disc_box(image: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of (C, H, W) that show the retina; all of them where everything is dark."""
    brightest = image.max(0)
    inside = brightest > BACKGROUND_LEVEL * max(float(brightest.max()), 1e-6)
    box = []
    for axis in (1, 0):
        used = np.flatnonzero(inside.mean(axis) > LEAST_PART)
        box.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None))
    return box[0], box[1]


class CropFundusd(MapTransform):
    """Cut the black borders of (C, H, W) and pad the shorter side with black to a square, so that a disc stays round.

    Deterministic: nothing is drawn. The size of the image, which in some data sets tells the camera and so the grade,
    is lost with the borders.

    Args:
        keys: images, of any range that starts at 0.
        allow_missing_keys: as in MONAI.
    """

    def __init__(self, keys: KeysCollection = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's image by (C, S, S); meta data are kept."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            pixels = np.asarray(image)
            rows, columns = disc_box(pixels)
            cut = pixels[:, rows, columns]
            height, width = cut.shape[-2:]
            side = max(height, width)
            square = np.zeros((len(cut), side, side), dtype=cut.dtype)
            top, left = (side - height) // 2, (side - width) // 2
            square[:, top : top + height, left : left + width] = cut
            meta = image.meta if isinstance(image, MetaTensor) else None
            result[key] = MetaTensor(square, meta=meta) if isinstance(image, Tensor) else square
        return result
