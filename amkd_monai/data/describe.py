"""Describe a transform chain, so that what was decoded with another chain is never used."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_VOLATILE = {"R", "_seed", "logger", "_lazy"}


def describe(value: Any, depth: int = 0) -> Any:
    """Return a JSON-able description of a transform: class names and options, recursively.

    Functions are described by module, name and bytecode, arrays by their values; random states are left out. The
    description changes when an option changes, and does not depend on addresses or the process.
    """
    if depth > 12:
        return "..."
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (np.ndarray, torch.Tensor, np.generic)):
        return describe(np.asarray(value).tolist(), depth + 1)
    if isinstance(value, (torch.dtype, torch.device, np.dtype, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [describe(v, depth + 1) for v in items]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__code__"):
        plain = [c for c in value.__code__.co_consts if c is None or isinstance(c, (bool, int, float, str))]
        return [f"{value.__module__}.{value.__qualname__}", value.__code__.co_code.hex(), plain]
    state = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _VOLATILE}
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **describe(state, depth + 1)}
