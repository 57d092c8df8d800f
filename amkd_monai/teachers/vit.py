"""What the plain vision transformers among the teachers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6


def resample_positions(positions: Tensor, side: int) -> Tensor:
    """Resize a learned position embedding by plain bicubic interpolation, as RETFound's authors do.

    timm's own rule (anti-aliased, other cubic coefficient) gives different numbers.

    Args:
        positions: (1, 1 + n * n, C), the class token's first.
        side: new number of patches per side.

    Returns:
        (1, 1 + side * side, C).
    """
    channels, old = positions.shape[-1], round((positions.shape[1] - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[:, 1:].reshape(1, old, old, channels).permute(0, 3, 1, 2)  # (1, n*n, C) -> (1, C, n, n)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, C, m, m) -> (1, m*m, C)


def pooled_patches(grid: Tensor) -> Tensor:
    """Mean of the raw patch tokens (B, C, h, w), then a LayerNorm without weights: (B, C).

    This is what upstream's global pooling computes once a pretrained file without ``fc_norm`` is loaded; the
    pretrained final norm has no part in it.
    """
    mean = grid.mean((2, 3))
    return F.layer_norm(mean, mean.shape[-1:], eps=LAYER_NORM_EPS)


def patches_per_side(teacher: str, image_size: int, patch: int) -> int:
    """Return ``image_size / patch``.

    Raises:
        ValueError: the size is not a positive multiple of the patch.
    """
    if image_size < patch or image_size % patch:
        raise ValueError(f"The teacher '{teacher}' has image_size {image_size}: use a positive multiple of {patch}.")
    return image_size // patch
