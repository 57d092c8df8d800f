"""Weights of the distillation losses relative to the task, whose own weight is always exactly 1."""

import logging
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation.interface import INTERVAL, Counter

logger = logging.getLogger("amkd_monai")


class SharedGradients(Counter):
    """Measure, every ``every`` steps from the first, what each loss asks of the student's shared map.

    Gradients with respect to all parameters would cost several times a step; at one map they cost a part of a step,
    and that only now and then. The steps are counted in the state, so a resumed run measures in the same ones.
    """

    def __init__(self, every: int = INTERVAL) -> None:
        super().__init__("seen")
        if every < 1:
            raise ValueError(f"Gradients are measured every {every} steps: give a number of at least 1.")
        self.every = every

    def forward(self, losses: Mapping[str, Tensor], names: Iterable[str], shared: Tensor) -> dict[str, Tensor]:
        """Count a step and, if it is one of those that are measured, return {name: gradient (B * C * h * w,)}.

        Gradients of the mean losses {name: (B,)} of ``names`` at the shared student map (B, C, h, w), 0 where a loss
        does not depend on it; nothing without autograd. Graph and ``.grad`` stay as they are.
        """
        due = self.steps % self.every == 0
        self.count_step()
        if not due or not torch.is_grad_enabled() or not shared.requires_grad:
            return {}
        found = {}
        for name in names:
            (gradient,) = torch.autograd.grad(losses[name].mean(), shared, retain_graph=True, allow_unused=True)
            found[name] = (torch.zeros_like(shared) if gradient is None else gradient).detach().float().flatten()
        return found


class LossGate(nn.Module):
    """What every loss gate offers.

    A gate of your own derives from this class; its dotted path is the mode, and what its constructor takes after
    ``channels`` are its options.

    Args:
        priors: {loss: relative importance}, e.g. {"output": 1.0, "feature": 0.2}; 0 switches a loss off.
        warmup_steps: steps over which the sizes of losses are measured, if they are.
        channels: of the student map that a gate may look at.
    """

    every: int = INTERVAL  # steps between two measurements of gradients

    def __init__(self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0) -> None:
        super().__init__()
        if any(p < 0 for p in priors.values()):
            raise ValueError(f"The importance of a loss must not be negative: {dict(priors)}.")
        self.names = [name for name, prior in priors.items() if prior > 0]
        self.priors = {name: float(priors[name]) for name in self.names}

    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Learn from the losses {name: (B,)} of a training step, and from :class:`SharedGradients` where measured."""

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss and of ``task``; ``strength`` is beta(t), the map is for a gate's network."""
        raise NotImplementedError


class ScaledLossGate(Counter, LossGate):
    """L = L_task + beta(t) sum_k v_k L_k / S_k, with scales S_k measured once and then frozen.

    S_k is the median of L_k over the first ``warmup_steps`` steps, floored at 1e-3. Because it is frozen, a loss that
    has been driven to 0 can't raise its own weight. v is the given priors' share, of which ``floor`` is spread evenly.

    ``served`` is the part of the requested importance that some teacher can serve: where answers are not distilled,
    features keep their small share of the weight instead of inheriting all of it.
    """

    history: Tensor
    scale: Tensor

    def __init__(
        self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0, floor: float = 0.0
    ) -> None:
        super().__init__("count", priors, warmup_steps, channels)
        total, n, self.served = sum(self.priors.values()), len(self.names), 1.0
        self.share = {name: (1 - floor) * prior / total + floor / n for name, prior in self.priors.items()}
        self.register_buffer("history", torch.zeros(n, warmup_steps))
        self.register_buffer("scale", torch.ones(n))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take part in measuring the scales; without effect once they are frozen."""
        if (step := self.steps) >= self.history.shape[1]:
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
    """Scales as above; v_k follows how well the gradient of each loss agrees with the gradient of the task.

    Every ``every`` steps c_k <- memory c_k + (1 - memory) cos(grad L_k, grad L_task), gradients with respect to one
    shared student map (after Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018), and
    v = (1 - floor) softmax(log prior + c / temperature) + floor / K. One loss alone keeps v = 1, which is announced.
    """

    agreement: Tensor

    def __init__(
        self,
        priors: Mapping[str, float],
        warmup_steps: int = 100,
        channels: int = 0,
        floor: float = 0.2,
        temperature: float = 0.25,
        every: int = INTERVAL,
        memory: float = 0.9,
    ) -> None:
        super().__init__(priors, warmup_steps, channels)
        if len(self.names) == 1:
            logger.warning("The loss gate 'agreement' has no effect on '%s' alone: choose more losses.", *self.names)
        self.floor, self.temperature, self.every, self.memory = floor, temperature, every, memory
        self.register_buffer("agreement", torch.zeros(len(self.names)))
        self.log_priors: list[float] = torch.tensor([self.priors[name] for name in self.names]).log().tolist()

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Measure the scales and, where there are gradients, how well they agree."""
        super().observe(losses)
        if not gradients:
            return
        for k, name in enumerate(self.names):
            gradient = gradients[name]
            cosine = F.cosine_similarity(gradient, gradients["task"], dim=0)
            measured = self.memory * self.agreement[k] + (1 - self.memory) * cosine
            # a loss of 0 carries no information and must not gain weight
            self.agreement[k] = torch.where(gradient.any(), measured, self.agreement[k])

    def importance(self) -> Mapping[str, float | Tensor]:
        """The share v_k of each loss, at least floor / K."""
        scaled = (self.agreement / self.temperature).unbind()
        scores = [prior + c for prior, c in zip(self.log_priors, scaled, strict=True)]
        shares = (1 - self.floor) * torch.softmax(torch.stack(scores), dim=0) + self.floor / len(self.names)
        return dict(zip(self.names, shares.double().unbind(), strict=True))


LOSS_GATES: dict[str, type[LossGate]] = {"scaled": ScaledLossGate, "agreement": AgreementLossGate}
