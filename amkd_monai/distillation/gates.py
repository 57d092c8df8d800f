"""Teacher weights: how much each teacher is trusted per sample and location.

Reliability is grounded in labels, so a teacher can't win by being easy to imitate. An abstain slot takes the weight
where every teacher is worse than the label prior; a floor keeps every available teacher alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLOSED_FORM_MODES = ("reliability", "uniform", "fixed", "best_single", "camkd", "entropy")
"""Gates without a network: functions of errors, answers or given numbers."""
NETWORK_MODES = ("learned", "paper")
"""Gates with a network on student features (:mod:`amkd_monai.distillation.gate_network`)."""
MODES = CLOSED_FORM_MODES + NETWORK_MODES


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


def with_floor(weights: Tensor, available: Tensor, floor: float) -> Tensor:
    """(1 - floor) w + floor / n for the n available teachers; weights (B, K, h, w), available (B, K)."""
    return (1 - floor) * weights + floor * uniform(weights, available)


def to_size(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring gate weights (B, h, w) to another grid (B, H, W): nearest cell where finer, the mean for a single cell."""
    if tuple(weights.shape[-2:]) == size:
        return weights
    if size == (1, 1):
        return weights.mean((1, 2), keepdim=True)
    return F.interpolate(weights[:, None], size=size, mode="nearest")[:, 0]


def teacher_weights(
    mode: str,
    errors: Tensor,
    available: Tensor,
    prior_entropy: float,
    floor: float = 0.1,
    temperature: float = 0.25,
    entropies: Tensor | None = None,
    weights: Sequence[float] | None = None,
    scores: Sequence[float | None] | None = None,
) -> Tensor:
    """Weights of the teachers, without gradient.

    Args:
        mode: one of ``CLOSED_FORM_MODES``.
        errors: (B, K, h, w), nats.
        available: (B, K).
        prior_entropy: nats.
        floor: part spread evenly over the available teachers, so that none is ever switched off (``reliability``).
        temperature: of the reliability softmax.
        entropies: of the answers (B, K, h, w), nats (``entropy``).
        weights: K given weights (``fixed``).
        scores: K cross-fitted scores (``best_single``).

    Returns:
        (B, K, h, w).

    Raises:
        ValueError: unknown mode, or one whose input is missing.
    """
    if mode == "uniform":
        return uniform(errors, available).detach()
    if mode == "reliability":
        trusted = reliability(box_smooth(errors), prior_entropy, available, temperature)
        return with_floor(trusted, available, floor).detach()
    if mode == "camkd":
        return camkd(box_smooth(errors.float()), available).detach()
    if mode == "entropy" and entropies is not None:
        return entropy_weights(box_smooth(entropies.float()), available).detach()
    if mode == "fixed" and weights is not None:
        return fixed(errors.float(), available, weights).detach()
    if mode == "best_single" and scores is not None:
        return best_single(errors.float(), available, scores).detach()
    if mode in ("entropy", "fixed", "best_single"):
        needed = {"entropy": "entropies", "fixed": "weights", "best_single": "scores"}[mode]
        raise ValueError(f"The teacher gate '{mode}' needs {needed}: give them in `gate_options`.")
    raise ValueError(f"There is no teacher gate '{mode}': use one of {', '.join(CLOSED_FORM_MODES)}.")
