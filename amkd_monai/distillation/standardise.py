"""Teacher features are made comparable: each channel to mean 0 and standard deviation 1 over the training split."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanStdStandardiser(nn.Module):
    """Fixed affine standardisation per channel, t' = (t - mean) / std.

    Args:
        mean: (C,) over the training split.
        std: (C,); channels that never change are given 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.ones_like(std)).float())

    def forward(self, features: Tensor) -> Tensor:
        """Standardise a map (B, C, h, w)."""
        return (features.float() - self.mean[:, None, None]) / self.std[:, None, None]
