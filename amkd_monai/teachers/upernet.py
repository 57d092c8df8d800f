"""UPerNet on a plain transformer, in mmsegmentation's layout of keys.

Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLED_SIZES = (1, 2, 3, 6)


def _conv(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
        )
    )


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def add_pyramid(backbone: nn.Module, channels: int) -> None:
    """Give a transformer the up-sampling layers ``fpn1`` (x4) and ``fpn2`` (x2) of its two finest maps."""
    backbone.fpn1 = nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
        nn.BatchNorm2d(channels),
        nn.GELU(),
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
    )
    backbone.fpn2 = nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, stride=2))


def pyramid(backbone: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Turn four maps (B, C, h, w) of a backbone with :func:`add_pyramid` into strides 4, 8, 16, 32 (patch 16)."""
    return [backbone.fpn1(maps[0]), backbone.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all four, one 1x1 classifier.

    Args:
        in_channels: channels of every map.
        channels: channels inside.
        num_classes: logits.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), _conv(in_channels, channels, 1)) for size in POOLED_SIZES
        )
        self.bottleneck = _conv(in_channels + len(POOLED_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_conv(in_channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = _conv(4 * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, num_classes, h, w) at the size of the finest of four maps, finest first."""
        coarsest = maps[-1]
        scene = [coarsest, *(_resize(module(coarsest), coarsest) for module in self.psp_modules)]
        levels = [self.bottleneck(torch.cat(scene, dim=1))]
        for lateral, level in zip(reversed(self.lateral_convs), reversed(maps[:-1]), strict=True):
            levels.insert(0, lateral(level) + _resize(levels[0], level))
        fused = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([_resize(level, fused[0]) for level in fused], dim=1)))
