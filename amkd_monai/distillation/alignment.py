"""Student features are projected into a teacher's space, whose channels fixed statistics make comparable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a map (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each location over its channels."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, h, w) -> (B, h, w, C) and back


class Alignment(nn.Module):
    """Sum over student levels of LayerNorm, 1x1, GELU, 1x1, at the teacher's grid.

    The student is resized to the teacher's grid, the teacher's map never is. A finer level is area-pooled before it is
    projected, a coarser one is projected before it is made larger: each is projected where it has fewer cells.

    Args:
        channels: {stride: channels} of the student levels used.
        out_channels: channels of the teacher.
        hidden: width between the two convolutions.
    """

    def __init__(self, channels: Mapping[int, int], out_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {
                str(stride): nn.Sequential(
                    ChannelNorm(count), nn.Conv2d(count, hidden, 1), nn.GELU(), nn.Conv2d(hidden, out_channels, 1)
                )
                for stride, count in channels.items()
            }
        )

    def forward(self, features: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Project student features and bring them to a teacher's grid.

        Args:
            features: {stride: (B, C, H / stride, W / stride)}, or what :func:`pool_finer` made of them.
            size: (h, w) of the grid.

        Returns:
            (B, out_channels, h, w).
        """
        projected = (project(pool_finer(features[int(s)], size)) for s, project in self.levels.items())
        return reduce(torch.add, (to_grid(level, size) for level in projected))


def pool_finer(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-pool student features (B, C, H, W) that are finer than a grid (h, w); others pass through."""
    return to_grid(features, size) if _is_finer(features, size) else features


def to_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring student features (B, C, H, W) to a grid (h, w): area-pooled down, bilinear up."""
    if tuple(features.shape[-2:]) == tuple(size):
        return features
    if _is_finer(features, size):
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def _is_finer(features: Tensor, size: tuple[int, int]) -> bool:
    return features.shape[-2] >= size[0] and features.shape[-1] >= size[1]


class MeanStdStandardiser(nn.Module):
    """Fixed affine standardisation per channel, t' = (t - mean) / std.

    Args:
        mean: (C,) over the training split.
        std: (C,); channels that never change are given 1.
        covariance: (C, C), for standardisers that need it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, covariance: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.ones_like(std)).float())

    def forward(self, features: Tensor) -> Tensor:
        """Standardise a map (B, C, h, w)."""
        return (features.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def covariance_after(self, covariance: Tensor) -> Tensor:
        """Covariance (C, C) of the standardised features, from that of the features."""
        return covariance.double() / self.std.double()[:, None] / self.std.double()[None, :]
