"""BiomedParse v1 as a teacher: features of the image, and a mask for each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amkd_monai.teachers.base import Teacher, TeacherFeatures, binary_to_two_class, pool_to_grid
from amkd_monai.teachers.biomedparse_network import CONTEXT, UNUSED, VOCABULARY, BiomedParse, Sizes
from amkd_monai.teachers.official import each_image, fixed_initialisation, imagenet_normalised, read_official, squash
from amkd_monai.weights import load_strict

STRIDES = (4, 8, 16, 32)
MULTIPLE = 32
START, END = VOCABULARY - 2, VOCABULARY - 1


class BiomedParseTeacher(Teacher):
    """BiomedParse v1 (Zhao et al., Nature Methods 2025), prompted once for each foreground class.

    Prompts are decoded one by one, since prompts in one pass change each other's masks.

    Args:
        name: name of the teacher in a run.
        weights: ``biomedparse_v1.pt`` or a file of its layout, a folder with it, None to search for it, or ``random``
            (marks the run as a test).
        prompts: one text per foreground class, in the order of the task's classes; needs ``open_clip_torch``.
        token_ids: CLIP's ids of the prompts instead, each from 49406 to 49407.
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
        if isinstance(prompts, str) or bool(prompts) == bool(token_ids):
            raise ValueError(
                f"The teacher '{name}' needs a list of `prompts` or of `token_ids`, one for each foreground class."
            )
        found = tokenised(prompts) if prompts else token_ids or ()
        self.token_ids = [_checked(ids, number) for number, ids in enumerate(found, start=1)]
        self.image_size, self.stride, self.grid_limit = image_size, stride, grid_limit
        self.images_at_once = images_at_once
        try:
            self.sizes = Sizes(**(sizes or {}))
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(Sizes))
            raise ValueError(f"The teacher '{name}' has unknown sizes {dict(sizes or {})}: use {known}.") from error
        official = read_official("biomedparse", weights)
        with fixed_initialisation():
            self.network = BiomedParse(self.sizes)
        self.is_random = official is None
        if official is not None:
            load_strict(self.network, official.state, official.path, allow_unexpected=UNUSED)
            self.came_from(official.path)
        self.freeze()

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
        parts = [self._outputs(images, prompts) for images in image.split(self.images_at_once)]
        grids, pooled, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return TeacherFeatures(grid=grids, pooled=pooled, logits=logits)

    def _outputs(self, image: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Grid, pooled vector and logits of a few images (B, 3, H, W) for all prompts, each (1, T, C)."""
        with self.autocast(image):
            maps, features = self.network.look(to_pixels(image, self.image_size))
        masks = torch.cat([self.network.segment(features, words) for words in prompts], dim=1)
        height, width = (self.image_size or side for side in image.shape[-2:])

        def cut(grid: Tensor, stride: int) -> Tensor:  # to the part that is not padding
            return grid[..., : -(-height // stride), : -(-width // stride)]

        masks = cut(masks, STRIDES[0])
        logits = torch.cat([binary_to_two_class(masks[:, :1]), masks[:, 1:]], dim=1)
        grid = cut(maps[STRIDES.index(self.stride)], self.stride)
        return pool_to_grid(grid, self.grid_limit), cut(maps[-1], STRIDES[-1]).mean((2, 3)), logits


def to_pixels(image: Tensor, size: int | None) -> Tensor:
    """Return normalised pixels (B, 3, S, S) of images (B, 3, H, W), RGB in [0, 1].

    Without a size the images keep their own and are padded with zeros after normalising, right and below, to
    multiples of 32.
    """
    pixels = imagenet_normalised(each_image(image, lambda one: one if size is None else squash(one, size)))
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE))


def tokenised(prompts: Sequence[str]) -> list[list[int]]:
    """Return CLIP's token ids of prompts, from the start to the end token; nothing is downloaded."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ValueError(
            "BiomedParse's prompts need CLIP's vocabulary, which is not installed: run `pip install open_clip_torch`, "
            "or give `token_ids`."
        ) from error
    words = SimpleTokenizer()
    return [[START, *words.encode(prompt), END] for prompt in prompts]


def _checked(ids: Sequence[int], number: int) -> list[int]:
    """Return a prompt's ids up to the first end token; the padding after it has no effect."""
    kept = list(ids[: ids.index(END) + 1]) if isinstance(ids, Sequence) and END in ids else []
    if not 3 <= len(kept) <= CONTEXT or kept[0] != START or not all(0 <= i < START for i in kept[1:-1]):
        raise ValueError(
            f"The prompt {number} has token ids that are not of its kind: give {START}, then 1 to {CONTEXT - 2} ids "
            f"of word pieces below {START}, then {END}."
        )
    return kept
