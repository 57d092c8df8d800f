"""The return path: a teacher's features in a code, the student aligned with the code, and back to the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from amkd_monai.distillation.losses import cosine

MODES = ("none", "learned", "pca")


def reconstruction_loss(restored: Tensor, target: Tensor) -> Tensor:
    """0.5 MSE + 0.3 L1 + 0.2 (1 - cos) per location (Liu et al., MultiMedDistill, 2026).

    Args:
        restored: (B, C, h, w).
        target: standardised teacher features (B, C, h, w); no gradient flows into them.

    Returns:
        (B, h, w), zero for equal inputs.
    """
    restored, target = restored.float(), target.detach().float()
    difference = (restored - target).movedim(1, -1)  # (B, C, h, w) -> (B, h, w, C)
    direction = 1 - cosine(restored, target)
    magnitude = difference.square().sum(-1) * 0.5 + difference.abs().sum(-1) * 0.3  # sums: see losses.feature_loss
    return magnitude / difference.shape[-1] + 0.2 * direction


class LearnedCode(nn.Module):
    """An encoder C -> m and its mirror m -> C, each two 1x1 convolutions with GELU between.

    Args:
        channels: C of the teacher.
        code_channels: m.
        hidden: width between the convolutions.
    """

    def __init__(self, channels: int, code_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.code_channels = code_channels
        self.encoder = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, code_channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(code_channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    @torch.no_grad()
    def encode(self, target: Tensor) -> Tensor:
        """Code (B, m, h, w), without gradient, of standardised features (B, C, h, w)."""
        return self.encoder(target)

    def autoencoder_loss(self, target: Tensor) -> Tensor:
        """Reconstruction of features from their own code; trains encoder and decoder alone.

        Both treat all cells alike and augmentation moves the image under the grid, so every second row and column of
        cells is enough: a quarter of the work.

        Args:
            target: standardised features (B, C, h, w).

        Returns:
            (B, ceil(h / 2), ceil(w / 2)).
        """
        cells = target.detach()[..., ::2, ::2].contiguous(memory_format=torch.channels_last)
        return reconstruction_loss(self.decoder(self.encoder(cells)), cells)

    def decode_frozen(self, code: Tensor) -> Tensor:
        """Features (B, C, h, w) from a code; gradient flows to the code, none to the decoder."""
        frozen = {name: value.detach() for name, value in self.decoder.named_parameters()}
        return functional_call(self.decoder, frozen, (code,))


def make_code(mode: str, channels: int, code_channels: int, covariance: Tensor | None) -> nn.Module:
    """Return the code of a teacher.

    Args:
        mode: ``learned`` or ``pca``.
        channels: C of the teacher.
        code_channels: m at most.
        covariance: (C, C) of its standardised features (``pca``).

    Raises:
        ValueError: the covariance is missing.
    """
    from amkd_monai.distillation.baselines import PcaCode

    size = min(code_channels, channels)
    if mode == "learned":
        return LearnedCode(channels, size)
    if covariance is None:
        raise ValueError("The return code 'pca' needs the covariance of the teachers' features: prepare them with it.")
    return PcaCode(covariance, size)
