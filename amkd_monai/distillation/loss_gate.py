"""Weights of the distillation losses relative to the task, whose own weight is always exactly 1 (but for ``paper``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation.deferred import INTERVAL, Counter

logger = logging.getLogger("amkd_monai")

MODES = ("scaled", "agreement", "fixed", "uncertainty", "paper")
OPTIONS = {
    "scaled": ("floor",),
    "agreement": ("floor", "temperature", "every", "memory"),
    "fixed": (),
    "uncertainty": (),
    "paper": ("task",),
}
"""Options of each mode beside the priors."""


class LossGate(nn.Module):
    """What every loss gate offers; by itself the mode ``fixed``: the priors are the weights.

    Args:
        priors: {loss: relative importance}, e.g. {"output": 1.0, "feature": 0.2}; 0 switches a loss off.

    Attributes:
        every: steps between two measurements of gradients.

    Raises:
        ValueError: a negative prior.
    """

    every: int = INTERVAL

    def __init__(self, priors: Mapping[str, float]) -> None:
        super().__init__()
        if any(p < 0 for p in priors.values()):
            raise ValueError(f"The importance of a loss must not be negative: {dict(priors)}.")
        self.names = [name for name, prior in priors.items() if prior > 0]
        self.priors = {name: float(priors[name]) for name in self.names}

    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Learn from a training step.

        Args:
            losses: {name: (B,)}.
            gradients: {name: (n,)} of the losses and ``task`` at one student map, in steps in which they are measured.
        """

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss and of ``task``.

        Args:
            strength: beta(t), the factor of all distillation losses.
            features: student map (B, C, h, w), for a gate with a network.
        """
        return {"task": 1.0, **{name: strength * prior for name, prior in self.priors.items()}}

    def penalty(self, strength: float) -> Tensor | None:
        """A term (1,) that belongs to learned weights and enters the total with factor 1."""
        return None


class ScaledLossGate(Counter, LossGate):
    """L = L_task + beta(t) sum_k v_k L_k / S_k, with scales S_k measured once and then frozen.

    S_k is the median of L_k over the first ``warmup_steps`` steps, floored at 1e-3. Because it is frozen, a loss that
    has been driven to 0 can't raise its own weight. v is the given priors' share,
    with a floor.

    ``served`` is the part of the importance asked for that some teacher can serve: where answers are not distilled,
    features keep their small share of the weight instead of inheriting all of it.

    Args:
        priors: {loss: relative importance}, e.g. {"output": 1.0, "feature": 0.2}; 0 switches a loss off.
        warmup_steps: steps over which the scales are measured.
        floor: part of the weight spread evenly over the losses.

    Raises:
        ValueError: a negative prior.
    """

    history: Tensor
    scale: Tensor

    def __init__(self, priors: Mapping[str, float], warmup_steps: int = 100, floor: float = 0.0) -> None:
        super().__init__("count", priors)
        total = sum(priors[name] for name in self.names)
        n = len(self.names)
        self.served = 1.0
        self.share = {name: (1 - floor) * priors[name] / total + floor / n for name in self.names}
        self.register_buffer("history", torch.zeros(n, warmup_steps))
        self.register_buffer("scale", torch.ones(n))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take part in measuring the scales; without effect once they are frozen. ``losses``: {name: (B,)}."""
        step = self.steps
        if step >= self.history.shape[1]:
            return
        for k, name in enumerate(self.names):
            self.history[k, step] = losses[name].detach().float().mean()
        self.count_step()
        self.scale.copy_(self.history[:, : step + 1].median(dim=1).values.clamp_min(1e-3))

    def importance(self) -> Mapping[str, float | Tensor]:
        """The share v_k of each loss."""
        return self.share

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss, {name: beta v_k / S_k}, scalars, and exactly 1 for ``task``."""
        shares, scales = self.importance(), self.scale.double().unbind()
        # times 1 first: a number over a tensor is computed as its reciprocal, which rounds otherwise
        parts = {
            n: torch.ones_like(s) * (strength * self.served) * shares[n] / s
            for n, s in zip(self.names, scales, strict=True)
        }
        return {"task": 1.0, **parts}


class AgreementLossGate(ScaledLossGate):
    """Scales as above; v_k follows how well the gradient of each loss agrees with that of the task.

    Every ``every`` steps c_k <- memory c_k + (1 - memory) cos(grad L_k, grad L_task), gradients with respect to one
    shared student map (after Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018), and
    v = (1 - floor) softmax(log prior + c / temperature) + floor / K. One loss alone keeps v = 1, which is announced.

    Args:
        priors: {loss: relative importance}.
        warmup_steps: steps over which the scales are measured.
        floor: part of the weight spread evenly over the losses.
        temperature: of the softmax.
        every: steps between two measurements.
        memory: how much of c stays at a measurement.
    """

    agreement: Tensor

    def __init__(
        self,
        priors: Mapping[str, float],
        warmup_steps: int = 100,
        floor: float = 0.2,
        temperature: float = 0.25,
        every: int = INTERVAL,
        memory: float = 0.9,
    ) -> None:
        super().__init__(priors, warmup_steps)
        if len(self.names) == 1:
            logger.warning(
                "The loss gate 'agreement' shares weight among losses and has no effect here: '%s' is the only one "
                "that takes part. Choose more losses, or loss_gate 'scaled'.",
                self.names[0],
            )
        self.floor, self.temperature, self.every, self.memory = floor, temperature, every, memory
        self.register_buffer("agreement", torch.zeros(len(self.names)))
        self.log_priors: list[float] = torch.tensor([self.priors[name] for name in self.names]).log().tolist()

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Measure the scales and, where there are gradients, how well they agree."""
        super().observe(losses)
        gradients = {} if gradients is None else gradients
        for k, name in enumerate(self.names):
            gradient = gradients.get(name)
            if gradient is None:
                continue
            cosine = F.cosine_similarity(gradient, gradients["task"], dim=0)
            measured = self.memory * self.agreement[k] + (1 - self.memory) * cosine
            # a loss that is 0 says nothing, and must not gain by it
            self.agreement[k] = torch.where(gradient.any(), measured, self.agreement[k])

    def importance(self) -> Mapping[str, float | Tensor]:
        """The share v_k of each loss, at least floor / K."""
        scaled = (self.agreement / self.temperature).unbind()
        scores = [prior + c for prior, c in zip(self.log_priors, scaled, strict=True)]
        shares = (1 - self.floor) * torch.softmax(torch.stack(scores), dim=0) + self.floor / len(self.names)
        return dict(zip(self.names, shares.double().unbind(), strict=True))


class UncertaintyLossGate(LossGate):
    """Learned weights prior_k exp(-s_k), with the penalty sum_k s_k (Kendall et al., CVPR 2018); the task keeps 1.

    It assumes that no loss can reach 0: s is kept within +-4.

    Args:
        priors: {loss: relative importance}.
    """

    def __init__(self, priors: Mapping[str, float]) -> None:
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
        channels: of the student map.
        task: initial weight of the task.
    """

    def __init__(self, priors: Mapping[str, float], channels: int, task: float = 1.0) -> None:
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


def make_loss_gate(
    mode: str,
    priors: Mapping[str, float],
    channels: int,
    warmup_steps: int = 100,
    options: Mapping[str, Any] | None = None,
) -> LossGate:
    """Return a loss gate by its mode.

    Args:
        mode: one of ``MODES``.
        priors: {loss: relative importance}; empty without teachers.
        channels: of the student map that a gate network sees.
        warmup_steps: steps over which scales are measured.
        options: ``OPTIONS`` of the mode.

    Raises:
        ValueError: unknown mode or option.
    """
    options = dict(options or {})
    if mode not in MODES:
        raise ValueError(f"There is no loss gate '{mode}': use one of {', '.join(MODES)}.")
    if unknown := set(options) - set(OPTIONS[mode]):
        known = ", ".join(OPTIONS[mode]) or "none"
        raise ValueError(f"Unknown loss_gate_options {sorted(unknown)}: the loss gate '{mode}' knows {known}.")
    if mode == "scaled" or not any(priors.values()):  # plain supervised training needs no gate
        return ScaledLossGate(priors, warmup_steps, **(options if mode == "scaled" else {}))
    if mode == "agreement":
        return AgreementLossGate(priors, warmup_steps, **options)
    if mode == "uncertainty":
        return UncertaintyLossGate(priors)
    if mode == "paper":
        return PaperLossGate(priors, channels, **options)
    return LossGate(priors)
