"""Finer images: a student's frame read again from the file at finer sampling, with one interpolation.

A preprocessing chain maps a file onto the student's frame (H, W): a whole picture, or the slices of a volume on a grid
in mm. A network of a larger input sees the same frame in more samples; intensities are those of the chain.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose, GaussianSmooth, MapTransform, Transform
from monai.transforms.spatial.dictionary import Affined, Resized, Rotated, Spacingd, SpatialResampled, Zoomd
from monai.transforms.traits import LazyTrait

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.files.names import files_of
from amkd_monai.storage import file_sha256, joint_hash

INTERPOLATING = (Affined, Resized, Rotated, Spacingd, SpatialResampled, Zoomd)
"""The first of these ends what is done to the file's own samples; from there a chain is an affine map and a shape."""


@dataclass(frozen=True)
class Frame:
    """A student's frame over samples in the file's own resolution."""

    samples: MetaTensor  # (C, h, w), or (C, d, h, w) of a volume, with the intensities that the student is shown
    matrix: np.ndarray  # (r + 1, r + 1), from indices of the student's samples to indices of ``samples``, r axes
    shape: tuple[int, ...]  # of the student's image, (H, W) or (D, H, W)

    def within_file(self, size: tuple[int, int]) -> tuple[int, int]:
        """The largest (H', W') up to ``size``, in the frame's proportions, that is no finer than frame and file."""
        factor = max(1.0, *np.linalg.norm(self.matrix[:-1, -3:-1], axis=0))
        factor = min(factor, *(wanted / have for wanted, have in zip(size, self.shape[-2:], strict=True)))
        height, width = (max(1, round(factor * n)) for n in self.shape[-2:])
        return height, width

    def at(self, size: tuple[int, int], smooth: bool) -> Frame:
        """The same frame in (H', W') samples; with ``smooth``, the file's are low-passed where that is coarser."""
        scale = np.eye(len(self.matrix))
        for axis, new in zip((-3, -2), size, strict=True):  # areas of samples are aligned, not their centres
            scale[axis, axis] = self.shape[axis + 1] / new
            scale[axis, -1] = (scale[axis, axis] - 1) / 2
        matrix = self.matrix @ scale
        steps = np.abs(matrix[:-1, -3:-1]).max(1)
        samples = self.samples
        if smooth and (steps > 1).any():  # the Gaussian of MONAI's and scikit-image's anti-aliased resizing
            samples = GaussianSmooth(sigma=np.maximum((steps - 1) / 2, 0).tolist())(samples)
        return Frame(samples, matrix, (*self.shape[:-2], *size))

    def read(self, mode: str = "bilinear", slices: Sequence[int] | None = None) -> MetaTensor:
        """Sample the frame: (C, *shape) float32, 0 beyond the file; of a volume only some ``slices`` if given."""
        source, rank = self.samples.as_tensor().float()[None], len(self.shape)
        planes = [0] if rank == 2 else range(self.shape[0]) if slices is None else slices
        shape = (1, *self.shape[1:]) if rank == 3 else self.shape
        parts = []
        for plane in planes:
            matrix = self.matrix.copy()
            matrix[:, -1] += matrix[:, 0] * plane
            # torch's coordinates: -1 and 1 at the borders of the first and last sample, last axis first
            theta = _normalised(source.shape[2:]) @ matrix @ np.linalg.inv(_normalised(shape))
            theta = np.ascontiguousarray(theta[-2::-1][:, [*range(rank - 1, -1, -1), rank]])
            grid = F.affine_grid(torch.from_numpy(theta)[None], [1, 1, *shape], align_corners=False).float()
            inside = (grid.abs() <= 1 + 1e-4).all(-1)[:, None]
            values = F.grid_sample(source, grid, mode=mode, padding_mode="border", align_corners=False)
            parts.append((values * inside)[0])
        result = parts[0] if rank == 2 else torch.cat(parts, 1)
        affine = np.asarray(self.samples.affine) @ self.matrix
        meta = {name: value for name, value in self.samples.meta.items() if name != "affine"}
        return MetaTensor(result, torch.as_tensor(affine), meta)


def _normalised(shape: Sequence[int]) -> np.ndarray:
    """The matrix from indices to coordinates that are -1 and 1 at the outer borders of the first and last sample."""
    matrix = np.diag([*(2 / n for n in shape), 1.0])
    matrix[:-1, -1] = [1 / n - 1 for n in shape]
    return matrix


class Finer(Transform):
    """Map what was read onto a student's frame in (H', W') samples, in place of the chain's own geometry.

    ``geometry`` are the steps of the chain from the first one that interpolates, ``size`` is (H', W').
    """

    def __init__(self, geometry: Sequence[MapTransform], size: tuple[int, int]) -> None:
        self.geometry, self.size = list(geometry), size
        smoothing = (zip(step.keys, step.anti_aliasing, strict=True) for step in geometry if isinstance(step, Resized))
        self.smoothed = {key for step in smoothing for key, smooth in step if smooth}

    def frame(self, data: Mapping[Hashable, Any], key: str = "image") -> Frame:
        """The student's frame for one key of data as they come out of the steps before ``geometry``."""
        samples: MetaTensor = data[key]
        placed: Any = {key: samples.clone()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "anti-aliasing is not compatible")  # :meth:`Frame.at` smooths
            for step in self.geometry:
                if key in step.keys:
                    step = copy.copy(step)
                    step.allow_missing_keys = True
                    placed = step(placed, lazy=True)
        shape = tuple(int(n) for n in placed[key].peek_pending_shape())
        own, new = (np.asarray(a, np.float64) for a in (samples.affine, placed[key].peek_pending_affine()))
        return Frame(samples, np.linalg.solve(own, new), shape)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the image (bilinear) and, where there is one, the label (nearest)."""
        result = dict(data)
        for key, mode in (("image", "bilinear"), ("label", "nearest")):
            if isinstance(result.get(key), MetaTensor):
                result[key] = self.frame(data, key).at(self.size, key in self.smoothed).read(mode)
        return result


def finer(transform: Callable, size: tuple[int, int]) -> Compose:
    """Return the chain whose samples are (H', W') = ``size`` in the frame of ``transform``.

    Steps before the first that interpolates the image (:data:`INTERPOLATING`) are the chain's own; the rest, which must
    be MONAI's spatial steps, becomes one interpolation of image and label. Slices keep their axis. A ValueError if no
    step is known to interpolate, or one after it is not known to be spatial alone.
    """
    if not isinstance(transform, Compose):
        raise ValueError(f"the preprocessing is a {type(transform).__name__}, not a Compose of steps")
    steps: list[Any] = list(transform.flatten().transforms)
    resampled = [i for i, step in enumerate(steps) if isinstance(step, INTERPOLATING) and "image" in step.keys]
    if not resampled:
        raise ValueError("no step of the preprocessing is known to change the sampling of the image")
    first = resampled[0]
    for step in steps[first:]:
        if not isinstance(step, LazyTrait) or step.requires_current_data:
            after = type(steps[first]).__name__
            raise ValueError(f"the preprocessing's {type(step).__name__} comes after {after}: put it before")
    return Compose([*steps[:first], Finer(steps[first:], (int(size[0]), int(size[1])))])


class FinerImages:
    """The images of a decoded data set, read from their files at finer sampling whenever they are asked for.

    The shorter side of the frame has ``side`` pixels, fewer where a file has fewer; ``size`` is (H', W') at most. A
    ValueError if the preprocessing is not understood (:func:`finer`).
    """

    def __init__(self, dataset: DecodedDataset, side: int) -> None:
        height, width = dataset.images.shape[-2:]
        self.dataset, shorter = dataset, min(height, width)
        self.size = round(side * height / shorter), round(side * width / shorter)
        *own, self._finer = finer(dataset.transform, self.size).transforms
        self._own, self._items = Compose(own), {item["id"]: item for item in dataset.data}
        self._case = ""
        self._frame: Frame | None = None

    def image(self, index: int) -> np.ndarray:
        """Return the image (3, H', W') uint8 of a sample; a ValueError if its file or frame is not what was decoded."""
        dataset = self.dataset
        if self._frame is None or self._case != dataset.cases[index]:
            self._case, self._frame = dataset.cases[index], self._read(index)
        if self._frame.shape[-2:] == dataset.images.shape[-2:]:
            return dataset.shown(index)
        is_volume = len(self._frame.shape) == 3
        slices = dataset.neighbours(index) - dataset.first[index] if is_volume else None
        values = dataset.view(np.asarray(self._frame.read(slices=slices)))
        return np.round(values.clip(0, 1) * 255).astype(np.uint8)

    def _read(self, index: int) -> Frame:
        dataset, item = self.dataset, self._items[self.dataset.cases[index]]
        content = joint_hash([file_sha256(file) for file in files_of(item["image"])])
        if not content.startswith(dataset.hashes[index].split("-")[0]):
            raise ValueError(f"{item['image']} changed after it was decoded: start again.")
        frame = self._finer.frame(self._own(dict(item)))
        count, size = int(dataset.last[index] - dataset.first[index]) + 1, frame.within_file(self.size)
        decoded = (*([count] if len(frame.shape) == 3 else []), *dataset.images.shape[-2:])
        if frame.shape != decoded:
            found = f"its spatial steps are to give {frame.shape}, but gave {decoded}"
            raise ValueError(f"The preprocessing of {item['image']} cannot be repeated finer, {found}: change it.")
        return frame if size == decoded[-2:] else frame.at(size, "image" in self._finer.smoothed)
