"""Layers that treat every location of a map alike: a normalisation and a linear map over the channels."""

from __future__ import annotations

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


class Pointwise(nn.Conv2d):
    """A 1x1 convolution (B, C, h, w) -> (B, D, h, w), computed as one matrix product over all locations.

    Parameters and initial values are those of ``nn.Conv2d``, whose CPU kernel for small maps takes several times as
    long. The result lies in memory as channels-last, as does what the student gives.

    Args:
        in_channels: C.
        out_channels: D.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map the channels of each location."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
