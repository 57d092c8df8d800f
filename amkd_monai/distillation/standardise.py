"""Teacher features are made comparable, by fixed statistics of the training split."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MODES = ("mean_std", "phi_s")


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

    def covariance_after(self, covariance: Tensor) -> Tensor:
        """Covariance (C, C) of the standardised features, from that of the features."""
        return covariance.double() / self.std.double()[:, None] / self.std.double()[None, :]


class PhiSStandardiser(nn.Module):
    """PHI-S: t' = a H U^T (t - mean), principal components U, Hadamard matrix H, one scalar a for all channels.

    Every channel of the result has variance 1, and distances are those of the features but for the scalar (Ranzinger
    et al., PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation, ICLR 2025). Where no Hadamard
    matrix is known for C, an orthogonal matrix that balances the same variances stands in.

    Args:
        mean: (C,) over the training split.
        covariance: (C, C), likewise.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance.double())
        values = values.clamp_min(0)
        channels = len(mean)
        balance = hadamard(channels)
        rotation = balancing_rotation(values) if balance is None else balance / math.sqrt(channels)
        scale = values.mean().clamp_min(1e-12).rsqrt()
        self.register_buffer("mean", mean.float())
        self.register_buffer("matrix", (scale * rotation @ vectors.T).float())

    def forward(self, features: Tensor) -> Tensor:
        """Standardise a map (B, C, h, w)."""
        return torch.einsum("dc,bchw->bdhw", self.matrix, features.float() - self.mean[:, None, None])

    def covariance_after(self, covariance: Tensor) -> Tensor:
        """Covariance (C, C) of the standardised features, from that of the features."""
        return self.matrix.double() @ covariance.double() @ self.matrix.double().T


def make_standardiser(
    mode: str, mean: Tensor, std: Tensor, covariance: Tensor | None = None
) -> MeanStdStandardiser | PhiSStandardiser:
    """Return the standardiser of a teacher: ``mean_std``, or ``phi_s``, which needs the covariance (C, C).

    Raises:
        ValueError: unknown mode, or the covariance is missing.
    """
    if mode == "mean_std":
        return MeanStdStandardiser(mean, std)
    if mode != "phi_s":
        raise ValueError(f"There is no standardisation '{mode}': use one of {', '.join(MODES)}.")
    if covariance is None:
        raise ValueError("PHI-S needs the covariance of the teachers' features: prepare them with it.")
    return PhiSStandardiser(mean, covariance)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix (order, order) of +-1 by Sylvester's and Paley's constructions, None where they give none."""
    if order in (1, 2):
        return torch.tensor([[1.0]] if order == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4:
        return None
    if (half := hadamard(order // 2)) is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    q = order - 1
    if any(q % d == 0 for d in range(2, math.isqrt(q) + 1)):
        return None
    squares = torch.zeros(q, dtype=torch.bool)
    squares[torch.arange(1, q).square() % q] = True
    legendre = torch.where(squares, 1.0, -1.0).double()
    legendre[0] = 0
    steps = (torch.arange(q)[None, :] - torch.arange(q)[:, None]) % q
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, legendre[steps]
    return skew + torch.eye(order, dtype=torch.float64)


def balancing_rotation(variances: Tensor) -> Tensor:
    """An orthogonal matrix Q (C, C) such that Q diag(variances) Q^T has a constant diagonal, by plane rotations."""
    current = torch.diag(variances.double())
    rotation = torch.eye(len(variances), dtype=torch.float64)
    mean = variances.double().mean()
    for _ in range(len(variances) - 1):
        diagonal = current.diagonal()
        low, high = int(diagonal.argmin()), int(diagonal.argmax())
        if diagonal[high] - diagonal[low] <= 1e-12 * (1 + mean.abs()):
            break
        # tan(angle) t brings entry `low` to the mean: (a_hh - m) t^2 + 2 a_lh t + (a_ll - m) = 0
        a, b, c = (float(v) for v in (diagonal[high] - mean, current[low, high], diagonal[low] - mean))
        t = (-b + math.sqrt(max(0.0, b * b - a * c))) / a
        cos = 1 / math.sqrt(1 + t * t)
        plane = torch.tensor([[cos, cos * t], [-cos * t, cos]], dtype=torch.float64)
        rows = [low, high]
        current[rows] = plane @ current[rows]
        current[:, rows] = current[:, rows] @ plane.T
        rotation[rows] = plane @ rotation[rows]
    return rotation
