"""Schedules: pure functions of the progress of a run in [0, 1]."""

from __future__ import annotations

import math


def kd_temperature(progress: float, start: float = 2.0, end: float = 2.0, shape: str = "linear") -> float:
    """KD temperature, from ``start`` to ``end``, ``linear`` or ``cosine``.

    Raises:
        ValueError: unknown shape, or a temperature below 1.
    """
    if min(start, end) < 1:
        raise ValueError(f"The KD temperature runs from {start} to {end}; it must not be below 1.")
    if shape == "linear":
        return start + (end - start) * progress
    if shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f"There is no KD temperature schedule '{shape}': use 'linear' or 'cosine'.")


def distillation_strength(progress: float, warmup: float = 0.05, decay: float = 0.3, end: float = 0.1) -> float:
    """The factor beta(t) of all distillation losses: linear warm-up, 1, cosine to ``end``."""
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - decay:
        return 1.0
    phase = min(1.0, (progress - (1 - decay)) / decay)
    return end + (1 - end) * (1 + math.cos(math.pi * phase)) / 2
