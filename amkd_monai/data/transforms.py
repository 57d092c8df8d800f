"""MONAI transforms for what the datasets' files really hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, PILReader
from monai.transforms import LoadImaged, MapTransform
from PIL import Image

MASK_THRESHOLD = 127
"""Masks stored as JPEG hold every grey level; at > 0 the compression's ringing would count as foreground."""


def _to_rgb(image: Any) -> Any:
    if image.mode.startswith("I"):  # PIL's own conversion of 16-bit grey cuts every level above 255 to white
        levels = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((levels // 257 if levels.max() > 255 else levels).astype(np.uint8))
    return image.convert("RGB")


def _to_mask(image: Any) -> Any:
    return image.convert("L").point(lambda level: 255 if level > MASK_THRESHOLD else 0)


def load_rgb(keys: KeysCollection = "image", allow_missing_keys: bool = False) -> LoadImaged:
    """Load photographs of any mode (grey of 8 or 16 bits, palette, RGBA) as RGB, (3, H, W), values 0 to 255."""
    reader = PILReader(converter=_to_rgb, reverse_indexing=False)
    return LoadImaged(keys, reader=reader, ensure_channel_first=True, allow_missing_keys=allow_missing_keys)


def load_mask(keys: KeysCollection = "label", allow_missing_keys: bool = True) -> LoadImaged:
    """Load masks of any mode as (1, H, W) with values 0 and 255; grey levels are cut at 127."""
    reader = PILReader(converter=_to_mask, reverse_indexing=False)
    return LoadImaged(keys, reader=reader, ensure_channel_first=True, allow_missing_keys=allow_missing_keys)


class NeighbourSlicesd(MapTransform):
    """Turn a volume (1, D, H, W) into (3, D, H, W): each slice with its two neighbours as channels (2.5D).

    The first and last slice are their own missing neighbour.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's volume; meta data are kept."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            index = torch.arange(volume.shape[1])
            last = volume.shape[1] - 1
            channels = [volume[0][(index + shift).clamp(0, last)] for shift in (-1, 0, 1)]
            stacked = torch.stack([torch.as_tensor(np.asarray(c)) for c in channels])
            meta = volume.meta if isinstance(volume, MetaTensor) else None
            applied = volume.applied_operations if isinstance(volume, MetaTensor) else None
            result[key] = MetaTensor(stacked, meta=meta, applied_operations=applied)
        return result


class TransposeHWd(MapTransform):
    """Swap the two spatial axes of (C, H, W): MONAI's PNG writer takes (C, W, H)."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transpose each key's map."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = result[key].transpose(-1, -2)
        return result
