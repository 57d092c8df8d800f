"""Student features are projected into a teacher's space, or into a code of it from which its features come back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from amkd_monai.distillation.losses import reconstruction_loss


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a map (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each location over its channels."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, h, w) -> (B, h, w, C) and back


def _two_layers(channels: int, hidden: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, out_channels, 1)]


class Alignment(nn.Module):
    """Sum over student levels of LayerNorm, 1x1, GELU, 1x1, at the teacher's grid.

    The student is resized to the teacher's grid, the teacher's map never is. A finer level is area-pooled before it is
    projected, a coarser one is projected before it is made larger: each is projected where it has fewer cells.
    ``channels`` maps the strides of the student levels used to their channels; the teacher has ``out_channels``.
    """

    def __init__(self, channels: Mapping[int, int], out_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(
            {
                str(stride): nn.Sequential(ChannelNorm(count), *_two_layers(count, hidden, out_channels))
                for stride, count in channels.items()
            }
        )

    def forward(self, features: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Project {stride: (B, C, H / stride, W / stride)}, pooled or not, to a grid (h, w): (B, C', h, w)."""
        projected = (project(pool_finer(features[int(s)], size)) for s, project in self.levels.items())
        return reduce(torch.add, (to_grid(level, size) for level in projected))


def _is_finer(features: Tensor, size: tuple[int, int]) -> bool:
    return features.shape[-2] >= size[0] and features.shape[-1] >= size[1]


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


class Standardiser(nn.Module):
    """Fixed affine standardisation per channel, t' = (t - mean) / std, by statistics (C,) of the training split."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.ones_like(std)).float())  # a constant channel

    def forward(self, features: Tensor) -> Tensor:
        """Standardise a map (B, C, h, w)."""
        return (features.float() - self.mean[:, None, None]) / self.std[:, None, None]


class LearnedCode(nn.Module):
    """The return path of a teacher's features: an encoder C -> m and its mirror m -> C, two 1x1 convolutions each."""

    def __init__(self, channels: int, code_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.code_channels = code_channels
        self.encoder = nn.Sequential(*_two_layers(channels, hidden, code_channels))
        self.decoder = nn.Sequential(*_two_layers(code_channels, hidden, channels))

    @torch.no_grad()
    def encode(self, target: Tensor) -> Tensor:
        """Code (B, m, h, w), without gradient, of standardised features (B, C, h, w)."""
        return self.encoder(target)

    def autoencoder_loss(self, target: Tensor) -> Tensor:
        """Reconstruction of features (B, C, h, w) from their own code; trains encoder and decoder alone.

        Both treat all cells alike and augmentation moves the image under the grid, so every second row and column of
        cells is enough: a quarter of the work. Returns (B, ceil(h / 2), ceil(w / 2)).
        """
        cells = target.detach()[..., ::2, ::2].contiguous(memory_format=torch.channels_last)
        return reconstruction_loss(self.decoder(self.encoder(cells)), cells)

    def decode_frozen(self, code: Tensor) -> Tensor:
        """Features (B, C, h, w) from a code; gradient flows to the code, none to the decoder."""
        frozen = {name: value.detach() for name, value in self.decoder.named_parameters()}
        return functional_call(self.decoder, frozen, (code,))
