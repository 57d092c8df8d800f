"""BiomedParse v1 as a teacher: features of the image, and a mask for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amkd_monai.checkpoints.signatures import BIOMEDPARSE
from amkd_monai.teachers.base import Teacher, TeacherFeatures, binary_to_two_class, pool_to_grid
from amkd_monai.teachers.biomedparse.checkpoint import load_official
from amkd_monai.teachers.biomedparse.network import BiomedParse, Sizes
from amkd_monai.teachers.biomedparse.preprocessing import MULTIPLE, to_pixels
from amkd_monai.teachers.biomedparse.tokens import Vocabulary, check_ids
from amkd_monai.teachers.official import fixed_initialisation, read_official

STRIDES = (4, 8, 16, 32)
MASK_STRIDE = 4


class BiomedParseTeacher(Teacher):
    """BiomedParse v1 (Zhao et al., Nature Methods 2025), prompted once for each foreground class.

    Prompts are decoded one by one, since prompts in one pass change each other's masks.

    Args:
        name: name of the teacher in a run.
        weights: ``biomedparse_v1.pt`` or a file of its layout, a folder with it, None to search for it, or ``random``
            (marks the run as a test).
        prompts: one text per foreground class, in the order of the task's classes.
        token_ids: CLIP's ids of the prompts instead, each from 49406 to 49407.
        vocabulary: CLIP's merge list, needed for ``prompts`` unless ``open_clip_torch`` is installed.
        image_size: side in pixels to which images are squashed; 1024 is what the network was trained for. None takes
            them as they come.
        stride: stride of the feature map wanted: 4, 8, 16 or 32.
        grid_limit: feature maps are area-pooled down to at most this many cells a side.
        images_at_once: images per pass; each takes about 2 GB at 1024 pixels.
        sizes: depths and widths other than the official ones (:class:`Sizes`), for tests.
        precision: ``float32``, or ``bfloat16`` for autocast of the pixel decoder.
        licence: licence of the weights.

    Raises:
        ValueError: no prompts, or options out of range.
        CheckpointError: weights that are missing or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        prompts: Sequence[str] | None = None,
        token_ids: Sequence[Sequence[int]] | None = None,
        vocabulary: str | Path | None = None,
        image_size: int | None = 1024,
        stride: int = 32,
        grid_limit: int = 16,
        images_at_once: int = 1,
        sizes: Mapping[str, Any] | None = None,
        precision: str = "float32",
        licence: str = "research use only; see its card",
    ) -> None:
        super().__init__(name, licence, precision)
        if image_size is not None and (image_size < 32 or image_size % MULTIPLE):
            raise ValueError(f"The teacher '{name}' has image_size {image_size}: give a multiple of 32, such as 1024.")
        if stride not in STRIDES:
            raise ValueError(f"The teacher '{name}' has no map of stride {stride}: use one of {STRIDES}.")
        if images_at_once < 1:
            raise ValueError(f"The teacher '{name}' has images_at_once {images_at_once}: give 1 or more.")
        self.token_ids = self._ids(prompts, token_ids, vocabulary)
        self.image_size, self.stride, self.grid_limit = image_size, stride, grid_limit
        self.images_at_once = images_at_once
        try:
            self.sizes = Sizes(**(sizes or {}))
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(Sizes))
            raise ValueError(f"The teacher '{name}' has unknown sizes {dict(sizes or {})}: use {known}.") from error
        official = read_official("biomedparse", weights, "BiomedParse v1 (biomedparse_v1.pt)", {BIOMEDPARSE})
        with fixed_initialisation():
            self.network = BiomedParse(self.sizes)
        self.is_random = official is None
        if official is not None:
            load_official(self.network, official.state, official.path)
            self.came_from(official.path)
        self.freeze()

    def _ids(
        self,
        prompts: Sequence[str] | None,
        token_ids: Sequence[Sequence[int]] | None,
        vocabulary: str | Path | None,
    ) -> list[list[int]]:
        if isinstance(prompts, str) or not (prompts or token_ids) or (prompts and token_ids):
            raise ValueError(
                f"The teacher '{self.name}' needs a list of `prompts` or of `token_ids`, one for each foreground class."
            )
        if token_ids:
            return [check_ids(ids, str(number)) for number, ids in enumerate(token_ids, start=1)]
        words = Vocabulary(vocabulary)
        return [words.tokenise(prompt) for prompt in prompts or ()]

    def preprocessing(self) -> dict[str, Any]:
        """Return size, statistics, prompts and what is read out."""
        return {
            "image_size": self.image_size,
            "resize": "Pillow bicubic, squashed",
            "normalisation": "ImageNet",
            "token_ids": self.token_ids,
            "stride": self.stride,
            "grid_limit": self.grid_limit,
            "precision": self.precision,
        }

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled vector (B, C') and logits (B, 1 + prompts, S/4, S/4) of (B, 3, H, W)."""
        prompts = [self.network.read(torch.tensor(ids, device=image.device)) for ids in self.token_ids]
        parts = [self._look(images, prompts) for images in image.split(self.images_at_once)]
        grids, pooled, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return TeacherFeatures(grid=grids, pooled=pooled, logits=logits)

    def _look(self, image: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Answer for a few images (B, 3, H, W) and all prompts, each (1, T, C)."""
        with self.autocast(image):
            maps, features = self.network.look(to_pixels(image, self.image_size))
        masks = torch.cat([self.network.segment(features, words) for words in prompts], dim=1)
        height, width = (self.image_size or side for side in image.shape[-2:])

        def cut(grid: Tensor, stride: int) -> Tensor:  # to the part that is no padding
            return grid[..., : -(-height // stride), : -(-width // stride)]

        masks = cut(masks, MASK_STRIDE)
        logits = torch.cat([binary_to_two_class(masks[:, :1]), masks[:, 1:]], dim=1)
        grid = cut(maps[STRIDES.index(self.stride)], self.stride)
        return pool_to_grid(grid, self.grid_limit), cut(maps[-1], STRIDES[-1]).mean((2, 3)), logits
