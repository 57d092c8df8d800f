"""What the foundation teachers share: reading official weight files, and preprocessing in 8-bit pixels."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from amkd_monai.teachers.base import Teacher
from amkd_monai.teachers.catalogue import entry, find_weights, weights_folders
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

SIGNATURES = (
    ("LiteMedSAM (TinyViT encoder)", "", r"image_encoder\.layers\."),
    ("MedSAM2 or SAM 2", "", r"(image_encoder\.trunk|memory_attention|memory_encoder)\."),
    ("SAM ViT-L", "", r"(image|vision)_encoder\.pos_embed .*x1024$"),
    ("SAM ViT-H", "", r"(image|vision)_encoder\.pos_embed .*x1280$"),
    ("a SAM ViT-B or MedSAM file", "medsam", r"image_encoder\.pos_embed "),
    ("a SAM ViT-B or MedSAM file in Hugging Face's layout", "medsam", r"vision_encoder\.pos_embed "),
    ("a BiomedParse v1 file", "biomedparse", r".*sem_seg_head\.predictor\.lang_encoder\."),
    ("BiomedParse v2", "", r"sem_seg_head\."),
    ("a USFM segmentation network (UPerNet)", "usfm", r"decode_head\.conv_seg\.weight "),
    ("TinyUSFM", "", r"cls_token .*x192$", r"blocks\.0\.attn\.qkv\.weight "),
    ("a USFM file", "usfm", r".*relative_position_bias_table "),
    ("RETFound's DINOv2 variant, or another DINOv2 file", "retfound_dinov2", r".*blocks\.0\.ls1\.gamma "),
    ("a fine-tuned RETFound (MAE)", "retfound_mae", r"fc_norm\.weight ", r"head\.weight ", r"blocks\.0\.attn\."),
    ("a ViT (RETFound's MAE layout)", "retfound_mae", r"cls_token ", r"pos_embed ", r"blocks\.0\.attn\.qkv\.bias "),
)
"""What a file seems to be, how the catalogue's keys of the teachers that read it begin, and patterns each of which one
of its lines "name shape" matches from its start. The first signature that fits wins."""


def recognise(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the first two entries of the signature that fits a state dict, or None."""
    lines = [f"{name} {'x'.join(map(str, value.shape))}" for name, value in state.items()]
    for what, readers, *patterns in SIGNATURES:
        if all(any(re.match(pattern, line) for line in lines) for pattern in patterns):
            return what, readers
    return None


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
    """Find and read a teacher's weights.

    Args:
        key: the teacher's key in the catalogue.
        weights: a file, a folder that holds it, None to search the weights folders and the Hugging Face cache, or
            ``random``.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    if str(weights) == "random":
        return OfficialWeights({}, None)
    teacher = entry(key)
    path: Path | None
    if weights is not None and not os.path.isdir(weights):  # noqa: PTH112 - never raises; reading says what is wrong
        path = Path(weights)
    elif (path := find_weights(teacher, weights)) is None:
        folders = ", ".join(map(str, weights_folders(weights)))
        fetching = f" or run `python -m amkd_monai fetch {key}`" if teacher.hub else ""
        raise CheckpointError(
            f"The weights of {teacher.name} ({' or '.join(teacher.files)}) are not in {folders} nor in the "
            f"Hugging Face cache: get them ({teacher.source}) and name the file as `weights`{fetching}."
        )
    state = load_state_dict(path)
    what, readers = recognise(state) or ("", key)  # what nothing recognises is left to the check of all keys
    if not readers or not key.startswith(readers):
        raise CheckpointError(
            f"{path} looks like {what}, but {teacher.name} ({teacher.files[0]}) is needed: give that file."
        )
    return OfficialWeights(state, path)


@contextlib.contextmanager
def fixed_initialisation(seed: int = 0) -> Iterator[None]:
    """Build a network with the same random weights each time, and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def pooled_patches(grid: Tensor) -> Tensor:
    """Mean of the raw patch tokens (B, C, h, w), then a LayerNorm without weights: (B, C).

    This is what upstream's global pooling computes once a pretrained file without ``fc_norm`` is loaded; the
    pretrained final norm has no part in it.
    """
    mean = grid.mean((2, 3))
    return F.layer_norm(mean, mean.shape[-1:], eps=1e-6)


def each_image(image: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply a function of 8-bit pixels, (H, W, 3) uint8 -> (h, w, 3), to every image of a batch.

    Args:
        image: (B, 3, H, W), RGB in [0, 1]; rounded to 256 steps.
        function: of the pixels of one image.

    Returns:
        (B, 3, h, w) float32, in the function's units.
    """
    pixels = (image.detach().clamp(0, 1) * 255).round().byte()
    results = [function(one.permute(1, 2, 0).cpu().numpy()) for one in pixels]  # (3, H, W) -> (H, W, 3)
    stacked = torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)  # (B, h, w, 3) -> (B, 3, h, w)
    return stacked.to(image.device, torch.float32).contiguous()


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) with Pillow's bicubic filter; the aspect ratio is not kept."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """Scale (B, 3, h, w) from [0, 255] to [0, 1], subtract ImageNet's mean, divide by its standard deviation."""
    return normalize(pixels / 255, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


class OfficialTeacher(Teacher):
    """A foundation teacher: a network of fixed input size, filled from an official weight file.

    The default preprocessing is that of most authors: 8-bit RGB, squashed to a square, ImageNet's statistics.

    Attributes:
        image_size: side of the network's input in pixels.
        resize: how images get that size; part of the fingerprint, like ``normalisation`` and what ``settings`` names.
        settings: further attributes on which the outputs depend.
    """

    image_size: int
    grid_limit: int
    network: nn.Module
    resize = "Pillow bicubic, squashed"
    normalisation = "ImageNet"
    settings: tuple[str, ...] = ()

    def patches(self, size: int) -> int:
        """Return the number of patches of a size along a side of the input."""
        if self.image_size < size or self.image_size % size:
            raise ValueError(
                f"The teacher '{self.name}' has image_size {self.image_size}: use a positive multiple of {size}."
            )
        return self.image_size // size

    def fill(self, official: OfficialWeights, surplus: Collection[str] = ()) -> None:
        """Load a file's weights, whose keys may begin with ``surplus`` in excess, or mark random ones; freeze them."""
        self.is_random = official.path is None
        if official.path is not None:
            load_strict(self.network, official.state, official.path, surplus)
            self.came_from(official.path)
        self.freeze()

    def preprocessing(self) -> dict[str, Any]:
        """Return size, filter, statistics and what is read from the network."""
        names = ("image_size", "resize", "normalisation", "grid_limit", "precision", *self.settings)
        return {name: getattr(self, name) for name in names}

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) for images (B, 3, H, W), RGB in [0, 1]."""
        return imagenet_normalised(each_image(image, lambda pixels: squash(pixels, self.image_size)))
