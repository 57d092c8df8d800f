"""Describe a transform chain, so that what was decoded with another chain is never used.

Own code, as MONAI's ``pickle_hashing`` cannot pickle lambdas, and random states and caches change its result.
"""

from __future__ import annotations

import enum
import functools
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_VOLATILE = {"R", "_seed", "_do_transform", "_lazy", "_tracing", "logger"}
"""What MONAI's transforms change when they are used; the options are described, not this."""

_DEEPEST = 60


def describe(value: Any, _above: tuple[int, ...] = ()) -> Any:
    """Return a JSON-able description of a transform: class names and options, recursively.

    Functions are described by module, name, bytecode and what they have captured, arrays by their values; random states
    are left out. The description changes with any option and does not depend on addresses or the process.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in _above or len(_above) > _DEEPEST:
        return "..."
    inside = functools.partial(describe, _above=(*_above, id(value)))
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (np.ndarray, torch.Tensor, np.generic)):
        return inside(np.asarray(value).tolist())
    if isinstance(value, (torch.dtype, torch.device, np.dtype, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): inside(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((inside(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [inside(v) for v in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, functools.partial):
        return {"partial": inside(value.func), "args": inside(value.args), "keywords": inside(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": inside(value.__func__), "of": inside(value.__self__)}
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), inside(value.co_consts)]
    if isinstance(value, types.FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
        name = f"{value.__module__}.{value.__qualname__}"
        return [name, inside(value.__code__), inside([value.__defaults__, value.__kwdefaults__, captured])]
    state = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _VOLATILE}
    name = getattr(value, "__name__", "") if callable(value) else ""  # built-in functions differ by name alone
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "name": str(name), **inside(state)}
