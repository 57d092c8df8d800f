"""Shared by the foundation teachers: reading official weight files, and preprocessing in 8-bit pixels."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from amkd_monai.teachers.base import Teacher
from amkd_monai.teachers.catalogue import entry, how_to_get, official_file
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict


@dataclass
class OfficialWeights:
    """The flat state dict of a weight file, and the file; both empty for random weights."""

    state: dict[str, Tensor]
    path: Path | None

    def shape(self, key: str, axes: int, layout: str) -> tuple[int, ...]:
        """Return the shape of a tensor that tells the network's size; another number of axes is refused."""
        shape = tuple(self.state[key].shape)
        if len(shape) != axes or 0 in shape:
            raise self.misshapen(key, layout)
        return shape

    def misshapen(self, key: str, layout: str) -> CheckpointError:
        """Return the error for a tensor of a shape that no file of its teacher has."""
        found = "x".join(map(str, self.state[key].shape)) or "a single number"
        return CheckpointError(f"{self.path} holds '{key}' as {found}, not {layout}: give the authors' own file.")


def read_official(key: str, weights: str | Path | None) -> OfficialWeights:
    """Find and read the weights of a teacher by its key in the catalogue; a CheckpointError if there are none.

    ``weights``: a file, a folder that holds it, None to search for it (:func:`find_weights`), or ``random``.
    """
    if str(weights) == "random":
        return OfficialWeights({}, None)
    teacher = entry(key)
    if (path := official_file(teacher, weights)) is None:
        raise CheckpointError(how_to_get(teacher, weights))
    return OfficialWeights(load_state_dict(path), path)


def pooled_patches(grid: Tensor) -> Tensor:
    """Mean of the raw patch tokens (B, C, h, w), then a LayerNorm without weights: (B, C), as upstream pools."""
    mean = grid.mean((2, 3))
    return F.layer_norm(mean, mean.shape[-1:], eps=1e-6)


def each_image(image: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply a function of 8-bit pixels, (H, W, 3) uint8 -> (h, w, 3), to every image of a batch (B, 3, H, W) in [0, 1].

    Returns (B, 3, h, w), in the function's units. Images on the meta device count as black.
    """
    known = torch.zeros(image.shape, device="cpu") if image.is_meta else image.detach()
    pixels = (known.clamp(0, 1) * 255).round().byte()
    results = [function(one.permute(1, 2, 0).cpu().numpy()) for one in pixels]  # (3, H, W) -> (H, W, 3)
    stacked = torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)  # (B, h, w, 3) -> (B, 3, h, w)
    return stacked.to(image.device, torch.float32).contiguous()


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) with Pillow's bicubic filter; the aspect ratio is not kept."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """Scale (B, 3, h, w) from [0, 255] to [0, 1], subtract ImageNet's mean, divide by its standard deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels / 255 - mean) / std


class OfficialTeacher(Teacher):
    """A foundation teacher: a network of fixed input size, filled from an official weight file.

    The default preprocessing is that of most authors: 8-bit RGB, squashed to a square, ImageNet's statistics.
    """

    image_size: int  # side of the network's input in pixels
    grid_limit: int
    network: nn.Module
    resize = "Pillow bicubic, squashed"  # how images get that size; part of the fingerprint
    normalisation = "ImageNet"
    settings: tuple[str, ...] = ("image_size", "resize", "normalisation", "grid_limit", "precision")

    def patches(self, size: int) -> int:
        """Return the number of patches of a size along a side of the input."""
        if not isinstance(self.image_size, int) or self.image_size < size or self.image_size % size:
            raise ValueError(f"The teacher '{self.name}' has image_size {self.image_size}: use a multiple of {size}.")
        return self.image_size // size

    def fill(self, official: OfficialWeights, surplus: Collection[str] = ()) -> None:
        """Load a file's weights, whose keys may begin with ``surplus`` in excess, or mark random ones; freeze them."""
        self.is_random = official.path is None
        if official.path is not None:
            load_strict(self.network, official.state, official.path, surplus)
            self.came_from(official.path)
        self.freeze()

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) for images (B, 3, H, W), RGB in [0, 1]."""
        return imagenet_normalised(each_image(image, lambda pixels: squash(pixels, self.image_size)))
