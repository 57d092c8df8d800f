"""Fundus photographs: the retina's disc without the black borders that differ from camera to camera."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from amkd_monai.data.disc import disc_box, squared


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
            square = squared(pixels[:, rows, columns])
            meta = image.meta if isinstance(image, MetaTensor) else None
            result[key] = MetaTensor(square, meta=meta) if isinstance(image, Tensor) else square
        return result
