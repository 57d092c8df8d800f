"""Teacher weights: how much each teacher is trusted per sample and location.

Reliability is grounded in labels, so a teacher can't win by being easy to imitate. An abstain slot takes the weight
where every teacher is worse than the label prior; a floor keeps every available teacher alive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("reliability", "uniform")


def box_smooth(errors: Tensor) -> Tensor:
    """Average errors (B, K, h, w) over 3x3 cells, so that a noisy label cell doesn't decide alone."""
    return F.avg_pool2d(errors, 3, stride=1, padding=1, count_include_pad=False)


def reliability(errors: Tensor, prior_entropy: float, available: Tensor, temperature: float = 0.25) -> Tensor:
    """Softmax of negative errors over the teachers and an abstain slot.

    Args:
        errors: cross entropy of each teacher against the label (B, K, h, w), nats.
        prior_entropy: entropy of the label prior, nats: the error of a teacher that knows nothing.
        available: 1 where a teacher may be used (B, K).
        temperature: of the softmax.

    Returns:
        (B, K, h, w), >= 0, 0 where not available; the sum over K is below 1, the rest is abstention.
    """
    mask = available[:, :, None, None].to(errors)
    scores = torch.where(mask > 0, -errors.float() / temperature, torch.full_like(errors, -torch.inf))
    abstain = torch.full_like(scores[:, :1], -prior_entropy / temperature)
    return torch.softmax(torch.cat([scores, abstain], dim=1), dim=1)[:, :-1]


def uniform(errors: Tensor, available: Tensor) -> Tensor:
    """Equal weights (B, K, h, w) over the available teachers (B, K); zeros where there is none."""
    mask = available[:, :, None, None].to(errors).expand_as(errors)
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def teacher_weights(
    mode: str,
    errors: Tensor,
    available: Tensor,
    prior_entropy: float,
    floor: float = 0.1,
    temperature: float = 0.25,
) -> Tensor:
    """Weights of the teachers, without gradient.

    Args:
        mode: ``reliability`` or ``uniform``.
        errors: (B, K, h, w), nats.
        available: (B, K).
        prior_entropy: nats.
        floor: part spread evenly over the available teachers, so that none is ever switched off.
        temperature: of the reliability softmax.

    Returns:
        (B, K, h, w).

    Raises:
        ValueError: unknown mode.
    """
    even = uniform(errors, available)
    if mode == "uniform":
        return even.detach()
    if mode == "reliability":
        trusted = reliability(box_smooth(errors), prior_entropy, available, temperature)
        return ((1 - floor) * trusted + floor * even).detach()
    raise ValueError(f"There is no teacher gate '{mode}': use one of {', '.join(MODES)}.")
