"""Weights of the distillation losses relative to the task, whose own weight is always exactly 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MODES = ("scaled",)


class ScaledLossGate(nn.Module):
    """L = L_task + beta(t) sum_k v_k L_k / S_k, with scales S_k measured once and then frozen.

    S_k is the median of L_k over the first ``warmup_steps`` steps, floored at 1e-3. Because it is frozen, a loss that
    has been driven to 0 can't raise its own weight. v is the given priors' share,
    with a floor.

    Args:
        priors: {loss: relative importance}, e.g. {"output": 1.0, "feature": 0.2}; 0 switches a loss off.
        warmup_steps: steps over which the scales are measured.
        floor: part of the weight spread evenly over the losses.

    Raises:
        ValueError: a negative prior.
    """

    history: Tensor
    count: Tensor
    scale: Tensor

    def __init__(self, priors: Mapping[str, float], warmup_steps: int = 100, floor: float = 0.0) -> None:
        super().__init__()
        if any(p < 0 for p in priors.values()):
            raise ValueError(f"The importance of a loss must not be negative: {dict(priors)}.")
        self.names = [name for name, prior in priors.items() if prior > 0]
        total = sum(priors[name] for name in self.names)
        n = len(self.names)
        self.relative = {name: (1 - floor) * priors[name] / total + floor / n for name in self.names}
        self.register_buffer("history", torch.zeros(n, warmup_steps))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.ones(n))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Take part in measuring the scales; without effect once they are frozen. ``losses``: {name: (B,)}."""
        step, limit = int(self.count), self.history.shape[1]
        if step >= limit:
            return
        for k, name in enumerate(self.names):
            self.history[k, step] = losses[name].detach().float().mean()
        self.count += 1
        if step < limit:
            self.scale.copy_(self.history[:, : step + 1].median(dim=1).values.clamp_min(1e-3))

    def weights(self, strength: float) -> dict[str, float]:
        """Return the factor of each loss, {name: beta v_k / S_k}, and exactly 1 for ``task``."""
        scales = self.scale.tolist()
        factors = {n: strength * self.relative[n] / s for n, s in zip(self.names, scales, strict=True)}
        return {"task": 1.0, **factors}
