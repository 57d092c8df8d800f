"""USFM: a BEiT-B for ultrasound images, pretrained by masked image modelling, and its UPerNet segmentation networks.

Jiao et al., USFM: A universal ultrasound foundation model generalized to tasks and organs, Medical Image Analysis 2024.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from amkd_monai.checkpoints.signatures import USFM, USFM_UPERNET
from amkd_monai.teachers.base import Teacher, TeacherFeatures, pool_to_grid
from amkd_monai.teachers.images import each_image, imagenet_normalised, squash
from amkd_monai.teachers.official import OfficialWeights, fixed_initialisation, read_official
from amkd_monai.teachers.upernet import UPerHead, add_pyramid, pyramid
from amkd_monai.teachers.vit import patches_per_side, pooled_patches
from amkd_monai.weights import load_strict

TABLE = "relative_position_bias_table"
PATCH = 16


class USFMTeacher(Teacher):
    """USFM's encoder: raw patch tokens of the last block as the grid, their normed mean as the pooled vector.

    A UPerNet file (fine-tuned with the authors' code) also gives mask logits at a quarter of the input's size.

    Args:
        name: name of the teacher in a run.
        weights: weight file, a folder with it, None to search for it, or ``random`` (marks the run as a test).
        image_size: side of the network's input in pixels; None takes the size the file was trained for. Other sizes
            resize the tables of relative positions.
        num_classes: classes of a random UPerNet; a file decides by itself whether it has a head.
        taps: the blocks (from 0) whose outputs a UPerNet reads.
        grid_limit: feature maps are area-pooled down to at most this many cells a side.
        embed_dim: width; smaller ones are for tests.
        depth: number of blocks.
        num_heads: attention heads.
        precision: ``float32`` or ``bfloat16`` (autocast).
        licence: licence of the weights.

    Raises:
        ValueError: a size that is no multiple of 16.
        CheckpointError: weights that are missing or do not fit.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        image_size: int | None = None,
        num_classes: int = 0,
        taps: tuple[int, int, int, int] = (3, 5, 7, 11),
        grid_limit: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        precision: str = "float32",
        licence: str = "CC BY-NC 4.0",
    ) -> None:
        super().__init__(name, licence, precision)
        self.taps, self.grid_limit = list(taps), grid_limit
        official = read_official("usfm", weights, "USFM (USFM_latest.pth, or its UPerNet)", {USFM, USFM_UPERNET})
        self.is_random = official is None
        state = {} if official is None else official.state
        sides = {_side(official, k) for k in state if k.endswith(TABLE)} if official else set()
        trained = max(sides, default=14)
        self.image_size = image_size or trained * PATCH
        side = patches_per_side(name, self.image_size, PATCH)
        segments = num_classes > 0 if official is None else "decode_head.conv_seg.weight" in state
        shared = official is None or any(k.endswith(f"rel_pos_bias.{TABLE}") for k in state)
        with fixed_initialisation():
            backbone: nn.Module = timm.create_model(
                "beit_base_patch16_224",
                img_size=self.image_size,
                num_classes=0,
                global_pool="token",
                use_shared_rel_pos_bias=shared,
                use_rel_pos_bias=not shared,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=num_heads,
            )
            self.network = nn.ModuleDict({"backbone": backbone})
            if segments:
                classes, width = (num_classes, embed_dim) if official is None else _head_size(official)
                backbone.norm = nn.Identity()
                add_pyramid(backbone, embed_dim)
                self.network["decode_head"] = UPerHead(embed_dim, width, classes)
        if official is not None:
            for key in [k for k in state if k.endswith(TABLE)]:
                heads, rows = state[key].shape[1], (2 * side - 1) ** 2 + 3
                state[key] = resize_rel_pos_bias_table(state[key], (side, side), (rows, heads))
            state = state if segments else {f"backbone.{k}": v for k, v in state.items()}
            state = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
            load_strict(self.network, state, official.path, ("backbone.mask_token", "auxiliary_head."))
            self.came_from(official.path)
        self.freeze()

    def preprocessing(self) -> dict[str, Any]:
        """Return size, filter and what is read from the network."""
        return {
            "image_size": self.image_size,
            "resize": "bilinear, squashed" if "decode_head" in self.network else "Pillow bicubic, squashed",
            "normalisation": "ImageNet",
            "taps": self.taps,
            "grid_limit": self.grid_limit,
            "precision": self.precision,
        }

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) for images (B, 3, H, W), RGB in [0, 1]."""
        size = self.image_size
        if "decode_head" in self.network:  # its authors' segmentation code resizes without anti-aliasing
            levels = (image.clamp(0, 1) * 255).round()
            resized = F.interpolate(levels, size=(size, size), mode="bilinear", align_corners=False)
            return imagenet_normalised(resized.round())
        return imagenet_normalised(each_image(image, lambda pixels: squash(pixels, size)))

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled (B, C) and, for a UPerNet, logits (B, classes, S/4, S/4)."""
        pixels, backbone, logits = self.prepare(image), self.network["backbone"], None
        with self.autocast(image):
            maps = backbone.forward_intermediates(
                pixels, indices=[*self.taps, len(backbone.blocks) - 1], intermediates_only=True
            )
            if "decode_head" in self.network:
                logits = self.network["decode_head"](pyramid(backbone, maps[:4])).float()
        grid = maps[-1].float()
        return TeacherFeatures(pool_to_grid(grid, self.grid_limit), pooled_patches(grid), logits)


def _side(official: OfficialWeights, key: str) -> int:
    """Return the patches per side, n, that a table of relative positions ((2n - 1)^2 + 3, heads) is for."""
    layout = "((2n - 1)^2 + 3, heads) relative positions of n x n patches"
    rows, _ = official.shape(key, 2, layout)
    side = round((max(rows - 3, 0) ** 0.5 + 1) / 2)
    if (2 * side - 1) ** 2 + 3 != rows:
        raise official.misshapen(key, layout)
    return side


def _head_size(official: OfficialWeights) -> tuple[int, int]:
    """Return number of classes and channels of a UPerNet file's head."""
    classes, channels, *_ = official.shape("decode_head.conv_seg.weight", 4, "(classes, channels, 1, 1)")
    return classes, channels
