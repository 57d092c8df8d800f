"""What the method is compared with: gates that do not know who is right, the published system's gates, a PCA code.

Nothing here is a default. A mode is chosen by its name in the tables at the end, or by a dotted path as any class of
your own is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation import losses
from amkd_monai.distillation.gates import (
    GateNetwork,
    GateReading,
    GateSetup,
    TeacherGate,
    box_smooth,
    gate_probabilities,
    uniform,
)
from amkd_monai.distillation.interface import Batch
from amkd_monai.distillation.loss_gate import LossGate


def camkd(errors: Tensor, available: Tensor) -> Tensor:
    """CA-MKD (Zhang et al., ICASSP 2022): (1 - softmax of the errors) / (n - 1) over the n available teachers.

    A teacher's weight never exceeds 1 / (n - 1), so bad teachers keep weight. A single teacher gets 1.

    Args:
        errors: (B, K, h, w), nats.
        available: (B, K).
    """
    mask = available[:, :, None, None].to(errors.dtype).expand_as(errors)
    shifted = torch.where(mask > 0, errors, torch.full_like(errors, -torch.inf))
    share = torch.where(mask > 0, torch.softmax(shifted, dim=1), torch.zeros_like(errors))  # NaN where none is
    return _complement(share, mask)


def entropy_weights(entropies: Tensor, available: Tensor) -> Tensor:
    """EBKD (Kwon et al., ICASSP 2020): (1 - H_k / sum H) / (n - 1) over the n available teachers; needs no label.

    Args:
        entropies: of each teacher's answer (B, K, h, w), nats.
        available: (B, K).
    """
    mask = available[:, :, None, None].to(entropies.dtype).expand_as(entropies)
    entropies = (entropies.clamp_min(0) + 1e-6) * mask
    return _complement(entropies / entropies.sum(1, keepdim=True).clamp_min(1e-12), mask)


def _complement(share: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum(1, keepdim=True)
    return torch.where(count > 1, mask * (1 - share) / (count - 1).clamp_min(1), mask)


def fixed(errors: Tensor, available: Tensor, weights: Sequence[float]) -> Tensor:
    """Given weights (K values >= 0), shared among the available teachers in proportion: (B, K, h, w)."""
    given = torch.tensor(list(weights), dtype=errors.dtype, device=errors.device)[None, :, None, None]
    masked = given * available[:, :, None, None].to(errors.dtype).expand_as(errors)
    return masked / masked.sum(1, keepdim=True).clamp_min(1e-12)


def best_single(errors: Tensor, available: Tensor, scores: Sequence[float | None]) -> Tensor:
    """All weight on the available teacher of the highest cross-fitted score: (B, K, h, w)."""
    known = [-torch.inf if s is None else float(s) for s in scores]
    ranked = torch.tensor(known, device=errors.device).expand(len(errors), -1)
    ranked = torch.where(available.bool(), ranked, torch.full_like(ranked, -torch.inf))
    chosen = F.one_hot(ranked.argmax(1), errors.shape[1]).to(errors.dtype)  # (B, K)
    chosen = chosen * torch.isfinite(ranked.max(1, keepdim=True).values)
    return chosen[:, :, None, None].expand_as(errors)


class UniformGate(TeacherGate):
    """Equal weights."""

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        return uniform(reading.errors, available).detach()


class FixedGate(TeacherGate):
    """Given weights, {teacher: weight >= 0}; refused with a ValueError if one is missing or all are 0."""

    def __init__(self, setup: GateSetup, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(setup)
        names, given = [t.name for t in self.teachers], dict(weights or {})
        if names and (set(given) != set(names) or min(given.values()) < 0 or max(given.values()) <= 0):
            raise ValueError(
                f"The teacher gate 'fixed' needs one weight >= 0 for each of {', '.join(names)}, not all 0: give "
                "them as gate_options.weights."
            )
        self.given = [float(given[name]) for name in names]

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        return fixed(reading.errors.float(), available, self.given).detach()


class BestSingleGate(TeacherGate):
    """The available teacher of the highest cross-fitted score alone; refused with a ValueError if none has a score."""

    def __init__(self, setup: GateSetup) -> None:
        super().__init__(setup)
        if self.teachers and all(t.score is None for t in self.teachers):
            raise ValueError(
                "The teacher gate 'best_single' needs scores, and no teacher gives answers: use another gate."
            )

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        return best_single(reading.errors.float(), available, [t.score for t in self.teachers]).detach()


class CamkdGate(TeacherGate):
    """Linear in the errors against the label."""

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        return camkd(box_smooth(reading.errors.float()), available).detach()


class EntropyGate(TeacherGate):
    """Trusts who is sure; its scores are the entropies of the answers (B, K, h, w), nats."""

    @torch.no_grad()
    def _scores(
        self, batch: Batch, answers: Mapping[str, Tensor], features: Tensor, similar: Tensor | None
    ) -> Tensor | None:
        grid, names = self.grid(), [t.name for t in self.teachers]
        entropies = torch.full((len(batch.image), len(names), *grid), self.prior_entropy, device=batch.image.device)
        for name, answer in answers.items():
            log_probabilities = answer.float().log_softmax(1)
            own = losses.soft_cross_entropy(log_probabilities.exp(), log_probabilities)
            entropies[:, names.index(name)] = losses.area_logits(own[None], grid)[0]
        return entropies

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        assert reading.scores is not None
        return entropy_weights(box_smooth(reading.scores), available).detach()


class PaperGate(TeacherGate):
    """As published: a network's softmax over the teachers, one weight per image, trained by the losses it weighs."""

    looks = True

    def __init__(self, setup: GateSetup, hidden: int = 32) -> None:
        super().__init__(setup)
        if k := len(self.teachers):
            self.network = GateNetwork(setup.channels, k, k, setup.tasks, int(hidden))

    def _scores(
        self, batch: Batch, answers: Mapping[str, Tensor], features: Tensor, similar: Tensor | None
    ) -> Tensor | None:
        assert self.network is not None and similar is not None
        pooled = features.mean((2, 3), keepdim=True), similar.mean((2, 3), keepdim=True)
        scores: Tensor = self.network(*pooled, batch.task).expand(-1, -1, *self.grid())
        return scores

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        assert reading.scores is not None
        return gate_probabilities(reading.scores, available)


class FixedLossGate(LossGate):
    """The priors times the strength are the factors, whatever the size of the losses."""

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss and of ``task``."""
        return {"task": 1.0, **{name: strength * prior for name, prior in self.priors.items()}}


class UncertaintyLossGate(LossGate):
    """Learned weights prior_k exp(-s_k), with the penalty sum_k s_k (Kendall et al., CVPR 2018); the task keeps 1.

    It assumes that no loss can reach 0: s is kept within +-4.

    Args:
        priors: {loss: relative importance}.
        warmup_steps: not used.
        channels: not used.
    """

    def __init__(self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0) -> None:
        super().__init__(priors)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factors; those of distillation losses carry gradient to s."""
        s = self.log_variance.clamp(-4, 4)
        factors = {n: strength * self.priors[n] * (-s[k]).exp() for k, n in enumerate(self.names)}
        return {"task": 1.0, **factors}

    def penalty(self, strength: float) -> Tensor | None:
        """The sum of s_k times beta, (1,)."""
        return strength * self.log_variance.clamp(-4, 4).sum()[None] if self.names else None


class PaperLossGate(LossGate):
    """As published: initial weights times softmax(gate(f) / 2) over all losses and the task, trained end to end.

    Kept for comparison only: it minimises what it weighs, so the weight flows to the smallest loss.

    Args:
        priors: {loss: initial weight}.
        warmup_steps: not used.
        channels: of the student map.
        task: initial weight of the task.
    """

    def __init__(
        self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0, task: float = 1.0
    ) -> None:
        super().__init__(priors)
        self.initial = {"task": task, **self.priors}
        self.gate = nn.Sequential(nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, len(self.initial)))

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factors, means over the batch, with gradient to the gate."""
        if features is None:
            raise ValueError("The loss gate 'paper' needs the student's features: give them to weights().")
        shares = torch.softmax(self.gate(features.float().mean((2, 3))) / 2, dim=1).mean(0)
        factors = {n: share * self.initial[n] for n, share in zip(self.initial, shares, strict=True)}
        return {n: f if n == "task" else strength * f for n, f in factors.items()}


class PcaCode(nn.Module):
    """The m leading principal components of a teacher's standardised features, and back; nothing to train.

    One scalar brings the code to a mean variance of 1. With m = C the way back is exact.

    Args:
        covariance: (C, C) of the standardised features.
        code_channels: m.
    """

    basis: Tensor
    scale: Tensor

    def __init__(self, covariance: Tensor, code_channels: int) -> None:
        super().__init__()
        self.code_channels = code_channels
        values, vectors = torch.linalg.eigh(covariance.double())  # ascending
        leading = values.flip(0)[:code_channels].clamp_min(0)
        self.register_buffer("basis", vectors.flip(1)[:, :code_channels].T.float().contiguous())  # (m, C)
        self.register_buffer("scale", leading.mean().clamp_min(1e-12).sqrt().float())

    def encode(self, target: Tensor) -> Tensor:
        """Code (B, m, h, w) of standardised features (B, C, h, w)."""
        return F.conv2d(target.detach().float(), (self.basis / self.scale)[:, :, None, None])

    def autoencoder_loss(self, target: Tensor) -> None:
        """There is nothing to train."""
        return None

    def decode_frozen(self, code: Tensor) -> Tensor:
        """Features (B, C, h, w) from a code (B, m, h, w)."""
        return F.conv2d(code.float(), (self.basis * self.scale).T[:, :, None, None])


GATES: dict[str, type[TeacherGate]] = {
    "uniform": UniformGate,
    "fixed": FixedGate,
    "best_single": BestSingleGate,
    "camkd": CamkdGate,
    "entropy": EntropyGate,
    "paper": PaperGate,
}
LOSS_GATES: dict[str, type[LossGate]] = {
    "fixed": FixedLossGate,
    "uncertainty": UncertaintyLossGate,
    "paper": PaperLossGate,
}
