"""USFM: a BEiT-B for ultrasound images, pretrained by masked image modelling, and its UPerNet segmentation networks.

Jiao et al., USFM: A universal ultrasound foundation model generalized to tasks and organs, Medical Image Analysis 2024.
Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018 (UPerNet; keys in mmsegmentation's layout).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, resize_rel_pos_bias_table
from torch import Tensor, nn

from amkd_monai.teachers.base import TeacherFeatures, fixed_initialisation, pool_to_grid
from amkd_monai.teachers.official import (
    OfficialTeacher,
    OfficialWeights,
    imagenet_normalised,
    pooled_patches,
    read_official,
)

TABLE = "relative_position_bias_table"
PATCH = 16
POOLED_SIZES = (1, 2, 3, 6)


class USFMTeacher(OfficialTeacher):
    """USFM's encoder: raw patch tokens of the last block as the grid, their normed mean as the pooled vector.

    A UPerNet file (fine-tuned with the authors' code) also gives mask logits at a quarter of the input's size.

    Args:
        image_size: None takes the size the file was trained for; others resize the tables of relative positions.
        num_classes: classes of a random UPerNet; a file decides by itself whether it has a head.
        taps: the blocks (from 0) whose outputs a UPerNet reads.
        sizes: ``embed_dim``, ``depth`` and ``num_heads`` other than the official ones, for tests.
    """

    settings = (*OfficialTeacher.settings, "taps")

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        image_size: int | None = None,
        num_classes: int = 0,
        taps: tuple[int, int, int, int] = (3, 5, 7, 11),
        grid_limit: int = 16,
        sizes: Mapping[str, int] | None = None,
        precision: str = "float32",
        licence: str = "CC BY-NC 4.0",
    ) -> None:
        super().__init__(name, licence, precision)
        self.taps, self.grid_limit = list(taps), grid_limit
        official = read_official("usfm", weights)
        state, width, head = official.state, 0, "decode_head.conv_seg.weight"
        tables = [key for key in state if key.endswith(TABLE)]
        trained = max((_side(official, key) for key in tables), default=14)
        shared = not state or any(key.endswith(f"rel_pos_bias.{TABLE}") for key in tables)
        if head in state:
            num_classes, width, *_ = official.shape(head, 4, "(classes, channels, 1, 1)")
        elif state:
            num_classes = 0
        self.image_size = image_size or trained * PATCH
        side = self.patches(PATCH)
        with fixed_initialisation(replaced=bool(official.state)):
            backbone: nn.Module = timm.create_model(
                "beit_base_patch16_224",
                img_size=self.image_size,
                num_classes=0,
                global_pool="token",
                use_shared_rel_pos_bias=shared,
                use_rel_pos_bias=not shared,
                **(sizes or {}),
            )
            self.network = nn.ModuleDict({"backbone": backbone})
            if num_classes:
                backbone.norm = nn.Identity()
                channels = backbone.embed_dim
                up = [nn.ConvTranspose2d(channels, channels, 2, stride=2) for _ in range(3)]
                backbone.fpn1 = nn.Sequential(up[0], nn.BatchNorm2d(channels), nn.GELU(), up[1])  # x4, below x2
                backbone.fpn2 = nn.Sequential(up[2])
                self.resize = "bilinear, squashed"  # its authors' segmentation code does not smooth
                self.network["decode_head"] = UPerHead(channels, width or channels, num_classes)
        for key in tables:
            rows = (2 * side - 1) ** 2 + 3
            state[key] = resize_rel_pos_bias_table(state[key], (side, side), (rows, state[key].shape[1]))
        prefix = "" if num_classes else "backbone."
        official.state = {prefix + k: v for k, v in state.items() if not k.endswith("relative_position_index")}
        self.fill(official, ("backbone.mask_token", "auxiliary_head."))

    def prepare(self, image: Tensor) -> Tensor:
        """Return the network's input (B, 3, S, S) for images (B, 3, H, W), RGB in [0, 1]."""
        if "decode_head" not in self.network:
            return super().prepare(image)
        levels = _resize((image.clamp(0, 1) * 255).round(), (self.image_size, self.image_size))
        return imagenet_normalised(levels.round())

    def forward(self, image: Tensor) -> TeacherFeatures:
        """Return grid (B, C, h, w), pooled (B, C) and, for a UPerNet, logits (B, classes, S/4, S/4)."""
        pixels, backbone, logits = self.prepare(image), self.network["backbone"], None
        with self.autocast(image):
            blocks = [*self.taps, len(backbone.blocks) - 1]
            maps = backbone.forward_intermediates(pixels, indices=blocks, intermediates_only=True)
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


def pyramid(backbone: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn four maps (B, C, h, w) of a backbone with ``fpn1`` and ``fpn2`` into strides 4, 8, 16, 32 (patch 16)."""
    return [backbone.fpn1(maps[0]), backbone.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest of four maps, a feature pyramid over all four, one 1x1 classifier."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        scales = ((nn.AdaptiveAvgPool2d(size), ConvNormAct(in_channels, channels, 1)) for size in POOLED_SIZES)
        self.psp_modules = nn.ModuleList(nn.Sequential(*layers) for layers in scales)
        self.bottleneck = ConvNormAct(in_channels + len(POOLED_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(in_channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvNormAct(4 * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of the finest of four maps, finest first."""
        scene = [maps[-1], *(_resize(module(maps[-1]), maps[-1].shape[-2:]) for module in self.psp_modules)]
        levels = [self.bottleneck(torch.cat(scene, dim=1))]
        for lateral, level in zip(reversed(self.lateral_convs), reversed(maps[:-1]), strict=True):
            levels.insert(0, lateral(level) + _resize(levels[0], level.shape[-2:]))
        fused = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        resized = torch.cat([_resize(level, fused[0].shape[-2:]) for level in fused], dim=1)
        return self.conv_seg(self.fpn_bottleneck(resized))
