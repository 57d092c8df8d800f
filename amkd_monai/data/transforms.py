"""MONAI transforms for what the datasets' files really hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader, PILReader
from monai.transforms import LoadImaged, MapTransform
from monai.utils import ensure_tuple
from PIL import Image

from amkd_monai.data.masks import read_mask
from amkd_monai.data.pictures import to_rgb
from amkd_monai.data.volumes import affine_problem


class _Reader(PILReader):
    """Opens files in ``get_data``, as MONAI's loader hides the error of a reader that fails in ``read``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(reverse_indexing=False, **options)

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Return the paths."""
        return [str(path) for path in ensure_tuple(data)]


class RgbReader(_Reader):
    """Reads a photograph as RGB.

    Args:
        size: (H, W) to resize to while decoding: a JPEG is decoded at the smallest of its own scales that is not below
            it, then resized with anti-aliasing. None keeps the size.
    """

    def __init__(self, size: Sequence[int] | None = None) -> None:
        super().__init__()
        self.size = None if size is None else (int(size[0]), int(size[1]))

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Return the pixels (H, W, 3) and the meta data."""
        (path,) = img
        with Image.open(path) as image:
            if self.size is None:
                return super().get_data(to_rgb(image))
            target = (self.size[1], self.size[0])
            image.draft("RGB", target)
            return super().get_data(to_rgb(image).resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0))


class MaskReader(_Reader):
    """Reads one mask file or several, combined by OR, as 0 and 255; see :func:`amkd_monai.data.masks.foreground`."""

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Return the mask (H, W) and the meta data."""
        return super().get_data(Image.fromarray(read_mask(img).astype(np.uint8) * 255))


class VolumeReader(NibabelReader):
    """Reads NIfTI volumes; refuses what resampling would spread or hide: NaN, infinity, a singular affine."""

    def get_data(self, img: Any) -> tuple[np.ndarray, dict]:
        """Return the voxels and the meta data."""
        (volume,) = ensure_tuple(img)
        name = volume.get_filename()
        if problem := affine_problem(nibabel.load(name).affine):  # MONAI has replaced a singular one while reading
            raise ValueError(f"{name} {problem}: replace the file.")
        array, meta = super().get_data(img)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds values that are not finite: replace the file.")
        return array, meta


def load_rgb(
    keys: KeysCollection = "image", allow_missing_keys: bool = False, size: Sequence[int] | None = None
) -> LoadImaged:
    """Load photographs of any mode (grey of 8 or 16 bits, palette, RGBA) as RGB, (3, H, W), values 0 to 255.

    Args:
        keys: of the files.
        allow_missing_keys: whether a key may be absent.
        size: (H, W) to resize to while decoding, many times faster for large JPEGs; ``Invertd`` does not undo it, so it
            is for chains whose result is not mapped back to the original size.
    """
    return LoadImaged(keys, reader=RgbReader(size), ensure_channel_first=True, allow_missing_keys=allow_missing_keys)


def load_mask(keys: KeysCollection = "label", allow_missing_keys: bool = True) -> LoadImaged:
    """Load masks of any mode and scale as (1, H, W) with values 0 and 255; several files are combined by OR."""
    return LoadImaged(keys, reader=MaskReader(), ensure_channel_first=True, allow_missing_keys=allow_missing_keys)


def load_volume(keys: KeysCollection, allow_missing_keys: bool = True) -> LoadImaged:
    """Load NIfTI volumes as (1, D, H, W); values that are not finite and singular affines are errors."""
    return LoadImaged(keys, reader=VolumeReader(), ensure_channel_first=True, allow_missing_keys=allow_missing_keys)


class CtWindowd(MapTransform):
    """Scale a CT in Hounsfield units to [0, 1] by a window; a CT that was windowed to 0..255 before is divided by 255.

    Args:
        keys: of the volumes.
        low: lower end of the window in HU; -1250 for lungs.
        high: upper end in HU; 250 for lungs.
    """

    def __init__(self, keys: KeysCollection, low: float = -1250.0, high: float = 250.0) -> None:
        super().__init__(keys)
        self.low, self.high = low, high

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale each key's volume."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            windowed = bool(volume.min() >= 0) and bool(volume.max() <= 255)
            low, high = (0.0, 255.0) if windowed else (self.low, self.high)
            result[key] = ((volume - low) / (high - low)).clip(0, 1)
        return result


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
