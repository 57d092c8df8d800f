"""Gradients of the losses with respect to one student map that lies under all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from amkd_monai.distillation.deferred import INTERVAL, Counter


class SharedGradients(Counter):
    """Measure, every ``every`` steps, what each loss asks of the student's shared map.

    Gradients with respect to all parameters would cost several times a step; at one map they cost a part of a step,
    and that only now and then. The steps are counted in the state, so a resumed run measures in the same ones.

    Args:
        every: steps between two measurements; the first step is measured.

    Raises:
        ValueError: ``every`` is below 1.
    """

    seen: Tensor

    def __init__(self, every: int = INTERVAL) -> None:
        super().__init__("seen")
        if every < 1:
            raise ValueError(f"Gradients are measured every {every} steps: give a number of at least 1.")
        self.every = every

    def forward(self, losses: Mapping[str, Tensor], names: Iterable[str], shared: Tensor) -> dict[str, Tensor]:
        """Count a step and return its gradients, if it is one of those that are measured.

        Args:
            losses: {name: (B,)}.
            names: of the losses to look at.
            shared: student map (B, C, h, w).

        Returns:
            {name: gradient of the mean loss (B * C * h * w,), 0 where it does not depend on the map}; empty in a step
            that is not measured or where no gradient is asked for. Graph and ``.grad`` stay as they are.
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


def norms(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Euclidean norm of each gradient, {"gradient_<loss>": scalar}."""
    return {f"gradient_{name}": gradient.norm() for name, gradient in gradients.items()}
