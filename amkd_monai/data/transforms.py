"""MONAI transforms around the reading and writing of files in :mod:`amkd_monai.files`."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, ensure_tuple

from amkd_monai.files import cases, volumes
from amkd_monai.files.masks import IGNORED, MaskCodes, read_mask
from amkd_monai.files.names import file_id, file_of, files_of
from amkd_monai.files.pictures import read_channels, write_mask
from amkd_monai.files.steps import crop_disc, neighbours

FILENAME = "filename_or_obj"  # keys of meta data: the file, and how its values were coded
CODING = "mask_coding"
FOREGROUND = "foreground_box"  # two corners (4, 2) of all foreground of a label, mm, homogeneous


def _loaded(array: np.ndarray, file: Any, affine: np.ndarray | None = None, used: set[str] | None = None) -> MetaTensor:
    """Values (C, ...) as float32 with MONAI's meta data; ``used`` is how its values are coded."""
    matrix = torch.as_tensor(np.eye(3) if affine is None else affine)
    meta = {FILENAME: str(file), "spatial_shape": np.array(array.shape[1:]), "original_channel_dim": 0}
    meta |= {"original_affine": matrix.clone()} | ({} if used is None else {CODING: sorted(used)})
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array, np.float32)), matrix, meta)


class _PerKey(MapTransform):
    """A transform that replaces the value of each key by ``_changed(value, data)``."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the values; the given data stay."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self._changed(result[key], data)
        return result


class LoadPictured(_PerKey):
    """Load pictures of any mode as RGB (3, H, W), levels 0 to 255, float32, upright; see :mod:`..files.pictures`.

    Several files are the grey channels (C, H, W) of one image.
    """

    def __init__(self, keys: KeysCollection = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def _changed(self, file: Any, data: Mapping[Hashable, Any]) -> MetaTensor:
        files, used = files_of(file), set[str]()
        return _loaded(read_channels(files, used).transpose(2, 0, 1), files[0], used=used)


class LoadMaskd(_PerKey):
    """Load masks of pictures as class indices (1, H, W), float32, 255 where there is no label.

    Several files are combined. The "image", a path or loaded from one, is the picture on which the mask must lie;
    ``classes`` and ``codes`` are as for :func:`amkd_monai.files.masks.decode`.
    """

    def __init__(
        self,
        keys: KeysCollection = "label",
        allow_missing_keys: bool = True,
        classes: int = 2,
        codes: MaskCodes = "auto",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.classes, self.codes = classes, codes

    def _changed(self, value: Any, data: Mapping[Hashable, Any]) -> MetaTensor:
        files, used, image = [str(file) for file in ensure_tuple(value)], set[str](), data.get("image")
        if not isinstance(image, (str, Path)):
            image = getattr(image, "meta", {}).get(FILENAME)
        mask = read_mask(files, image, self.classes, self.codes, used)
        return _loaded(mask[None], files[0], used=used)


class LoadVolumed(LoadMaskd):
    """Load volumes (C, X, Y, Z), float32, in the order of the image's first file, with affines in mm.

    Images are read by :func:`amkd_monai.files.cases.read_case`. Arguments are those of :class:`LoadMaskd`; keys other
    than "image" are labels, which become class indices on the grid of the image, 255 where there is no label.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each key's path by the volume."""
        result = dict(data)
        grid: volumes.Grid | None = None
        for key in sorted(self.key_iterator(result), key=lambda key: key != "image"):
            if key == "image":
                array, grid = cases.read_case(files := files_of(result[key]))
                result[key] = _loaded(array, files[0], grid.affine)
            else:
                file, used = result[key], set[str]()
                label, grid = volumes.read_label_volume(file, grid, self.classes, self.codes, used)
                result[key] = _loaded(label[None], file, grid.affine, used)
                if len(places := np.argwhere((label > 0) & (label != IGNORED))):
                    ends = np.append([places.min(0), places.max(0)], [[1], [1]], 1)
                    result[key].meta[FOREGROUND] = grid.affine @ ends.T
        return result


load_rgb, load_mask, load_volume = LoadPictured, LoadMaskd, LoadVolumed
"""The names that configs use."""


class CtWindowd(_PerKey):
    """Scale a CT to [0, 1] by a window in HU, lungs by default, see :func:`amkd_monai.files.volumes.ct_range`."""

    def __init__(
        self, keys: KeysCollection, low: float = -1250.0, high: float = 250.0, values: str = volumes.CT_VALUES[0]
    ) -> None:
        super().__init__(keys)
        self.low, self.high, self.values = low, high, values

    def _changed(self, volume: Any, data: Mapping[Hashable, Any]) -> Any:
        try:
            low, high = volumes.ct_range(np.asarray(volume), self.low, self.high, self.values)
        except ValueError as error:
            raise ValueError(f"{getattr(volume, 'meta', {}).get(FILENAME, 'a CT')}: {error}.") from error
        return ((volume - low) / (high - low)).clip(0, 1)


class CropFundusd(_PerKey):
    """Cut the black borders of (C, H, W) and pad the shorter side with black to a square, so that a disc stays round.

    The size of the image, which in some data sets tells the camera and so the grade, is lost with the borders.
    """

    def _changed(self, image: Any, data: Mapping[Hashable, Any]) -> Any:
        return convert_to_dst_type(crop_disc(np.asarray(image)), image)[0]


class NeighbourSlicesd(_PerKey):
    """Turn a volume (C, D, H, W) into (3 C, D, H, W): each slice with its two neighbours as channels (2.5D).

    The three of one channel follow one another; the first and last slice are their own missing neighbour.
    """

    def _changed(self, volume: Any, data: Mapping[Hashable, Any]) -> Any:
        return convert_to_dst_type(neighbours(np.asarray(volume)), volume)[0]


class DropUnlabelledd(MapTransform):
    """Make both answer and label background where the label is 255, so that no metric counts these pixels.

    The keys are the answer, probabilities (C, ...), and the label, class indices (1, ...), in this order.
    """

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
    """Write a label map (1, H, W) or (1, X, Y, Z) as ``<id>_mask.png`` or ``<id>_mask.nii.gz``.

    Files hold class indices, a PNG of two ``classes`` 0 and 255. The maps lie on the grid of the image file, whose
    order and header geometry a volume's mask gets.
    """

    def __init__(self, keys: KeysCollection, output_dir: str | Path, classes: int = 2) -> None:
        super().__init__(keys)
        self.output_dir, self.classes = output_dir, classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each key's map; the data stay."""
        source, folder = Path(data["image"].meta[FILENAME]), Path(self.output_dir).expanduser()
        name = str(data.get("id") or file_id(source))
        folder.mkdir(parents=True, exist_ok=True)
        for key in self.key_iterator(data):
            mask = np.asarray(data[key])[0].astype(np.uint8)
            if mask.ndim == 2:
                write_mask(file_of(folder, f"{name}_mask.png"), mask, self.classes)
            else:
                volumes.write_mask_volume(file_of(folder, f"{name}_mask.nii.gz"), mask, cases.case_grid([source])[0])
        return dict(data)
