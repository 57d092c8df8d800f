"""MONAI transforms around the reading and writing of files in :mod:`amkd_monai.files`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from torch import Tensor

from amkd_monai.files.masks import IGNORED, MaskCodes, read_mask
from amkd_monai.files.names import expanded, file_id, file_of
from amkd_monai.files.pictures import read_picture, write_png
from amkd_monai.files.steps import disc_box, squared
from amkd_monai.files.volumes import (
    CT_VALUES,
    Grid,
    ct_extremes,
    ct_range,
    read_label_volume,
    read_volume,
    write_mask_volume,
)

FILENAME = "filename_or_obj"
CODING = "mask_coding"
"""Keys of meta data: the file; how the values of a mask were coded, where that was guessed."""


def _loaded(array: np.ndarray, file: Any, affine: np.ndarray | None = None) -> MetaTensor:
    """Values (C, ...) with MONAI's meta data."""
    meta = {FILENAME: str(file), "spatial_shape": np.array(array.shape[1:]), "original_channel_dim": 0}
    matrix = torch.eye(3 if array.ndim == 3 else 4, dtype=torch.float64) if affine is None else torch.as_tensor(affine)
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(array)), matrix, {**meta, "original_affine": matrix.clone()}
    )


class LoadPictured(MapTransform):
    """Load pictures of any mode as RGB (3, H, W), levels 0 to 255, float32, upright; see :mod:`..files.pictures`.

    Args:
        keys: of the files.
        allow_missing_keys: whether a key may be absent.
        size: (H, W) to resize to while decoding, many times faster for large JPEGs; ``Invertd`` does not undo it, so it
            is for chains whose result is not mapped back to the original size.
    """

    def __init__(
        self, keys: KeysCollection = "image", allow_missing_keys: bool = False, size: Sequence[int] | None = None
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.size = None if size is None else (int(size[0]), int(size[1]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's path by the picture."""
        result = dict(data)
        for key in self.key_iterator(result):
            picture = read_picture(result[key], self.size)
            result[key] = _loaded(picture.transpose(2, 0, 1).astype(np.float32), result[key])
        return result


class LoadMaskd(MapTransform):
    """Load masks of pictures as class indices (1, H, W), float32, 255 where there is no label.

    Args:
        keys: of one file or several, which are combined.
        allow_missing_keys: whether a key may be absent.
        image_key: of the picture, a path or loaded from one, on which the mask must lie.
        classes: number of classes, background included.
        codes: what the values of the files mean, see :func:`amkd_monai.files.masks.decode`.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        allow_missing_keys: bool = True,
        image_key: str = "image",
        classes: int = 2,
        codes: MaskCodes = "auto",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key, self.classes, self.codes = image_key, classes, codes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's paths by the mask."""
        result = dict(data)
        for key in self.key_iterator(result):
            files = [str(file) for file in ensure_tuple(result[key])]
            used: set[str] = set()
            mask = read_mask(files, _file_of(data, self.image_key), self.classes, self.codes, used)
            result[key] = _loaded(mask[None].astype(np.float32), files[0])
            result[key].meta[CODING] = sorted(used) if self.codes == "auto" else []
        return result


class LoadVolumed(LoadMaskd):
    """Load NIfTI volumes (1, X, Y, Z), float32, in the order of the image's file, with affines in mm.

    Labels become class indices, 255 where there is no label, on the grid of the image.

    Args:
        keys: of the files; give both keys, or that of the image.
        allow_missing_keys: whether a key may be absent.
        image_key: the key that is an image; every other key is a label of it.
        classes: number of classes of labels, background included.
        codes: what the values of labels mean, see :func:`amkd_monai.files.masks.decode`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's path by the volume."""
        result = dict(data)
        grid: Grid | None = None
        for key in sorted(self.key_iterator(result), key=lambda key: key != self.image_key):
            file = result[key]
            if key == self.image_key:
                array, grid = read_volume(file)
            else:
                used: set[str] = set()
                mask, of_label = read_label_volume(file, grid, self.classes, self.codes, used)
                array, grid = mask.astype(np.float32), grid or of_label
            result[key] = _loaded(array[None], file, grid.affine)
            if key != self.image_key:
                result[key].meta[CODING] = sorted(used) if self.codes == "auto" else []
        return result


load_rgb, load_mask, load_volume = LoadPictured, LoadMaskd, LoadVolumed
"""The names that configs use."""


def _file_of(data: Mapping[Hashable, Any], key: str) -> Any:
    """Path of an image, loaded or not; None if there is none."""
    value = data.get(key)
    if isinstance(value, MetaTensor):
        return value.meta.get(FILENAME)
    return value if isinstance(value, (str, Path)) else None


class CtWindowd(MapTransform):
    """Scale a CT to [0, 1] by a window; a CT that was windowed to 0..255 or 0..1 before is scaled from there.

    Args:
        keys: of the volumes.
        low: lower end of the window in HU; -1250 for lungs.
        high: upper end in HU; 250 for lungs.
        values: what the volumes hold, see :func:`amkd_monai.files.volumes.ct_range`, which refuses what fits nothing.
    """

    def __init__(
        self, keys: KeysCollection, low: float = -1250.0, high: float = 250.0, values: str = CT_VALUES[0]
    ) -> None:
        super().__init__(keys)
        self.low, self.high, self.values = low, high, values

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale each key's volume."""
        result = dict(data)
        for key in self.key_iterator(result):
            volume = result[key]
            try:
                low, high = ct_range(*ct_extremes(np.asarray(volume)), self.low, self.high, self.values)
            except ValueError as error:
                raise ValueError(f"{_file_of(data, key) or key}: {error}.") from error
            result[key] = ((volume - low) / (high - low)).clip(0, 1)
        return result


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


class DropUnlabelledd(MapTransform):
    """Make both answer and label background where the label is 255, so that no metric counts these pixels.

    Args:
        keys: the answer, probabilities (C, ...), and the label, class indices (1, ...), in this order.
    """

    def __init__(self, keys: KeysCollection = ("pred", "label")) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace both; data without a label stay."""
        pred, label = (data.get(key) for key in self.keys)
        if pred is None or label is None or not (ignored := label == IGNORED).any():
            return dict(data)
        answer, known = pred.clone(), label.clone()
        for channel, values in enumerate(answer):
            values[ignored[0]] = float(channel == 0)
        known[ignored] = 0
        return {**data, self.keys[0]: answer, self.keys[1]: known}


class SaveMaskd(MapTransform):
    """Write a label map (1, H, W) or (1, X, Y, Z) as ``<id>_mask.png`` (0 and 255) or ``<id>_mask.nii.gz``.

    A volume's mask has the grid, order and header geometry of the image file.

    Args:
        keys: of the label maps, on the grid of the image file.
        output_dir: folder of the files.
        image_key: of the loaded image.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | Path, image_key: str = "image") -> None:
        super().__init__(keys)
        self.output_dir, self.image_key = output_dir, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each key's map; the data stay."""
        source = Path(data[self.image_key].meta[FILENAME])
        name = str(data.get("id") or file_id(source))
        for key in self.key_iterator(data):
            mask = np.asarray(data[key])[0].astype(np.uint8)
            folder = expanded(self.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if mask.ndim == 2:
                write_png(file_of(folder, f"{name}_mask.png"), (mask > 0).astype(np.uint8) * 255)
            else:
                affine = np.asarray(data[self.image_key].meta["original_affine"], float)
                write_mask_volume(file_of(folder, f"{name}_mask.nii.gz"), mask, Grid(mask.shape, affine), source)
        return dict(data)
