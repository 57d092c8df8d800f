"""Errors as one sentence at the terminal; classes and options that are asked for by name."""

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from amkd_monai.terminal import print_any_name

EXPECTED = (ValueError, OSError, FloatingPointError, TimeoutError)
"""What bad input raises; CheckpointError is a RuntimeError and is recognised by its module."""


def root_cause(error: BaseException) -> BaseException:
    """Follow the chain of ``raise ... from`` to the first error of this package, or else to its end."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return next((e for e in chain if is_own(e)), chain[-1])


def is_own(error: BaseException) -> bool:
    """Whether this package's code raised the error, as a sentence for the user."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    expected = isinstance(error, EXPECTED) or type(error).__module__.startswith("amkd_monai")
    return expected and bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("amkd_monai")


def report_plainly() -> None:
    """Install a ``sys.excepthook`` that prints only this package's sentence where there is one.

    MONAI's configs wrap every error in their own. Other errors are printed in full; the exit code stays 1.
    """
    print_any_name()
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_own(cause := root_cause(error)):
            print(f"error: {cause}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = hook


def check_options(what: str, function: Callable[..., Any], options: Mapping[str, Any], arguments: int = 0) -> None:
    """Raise a ValueError for options that a function or class does not take after its first ``arguments``."""
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * arguments, **options)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[arguments:]) or "none"
        raise ValueError(f"The {what} has options that do not fit ({error}): it takes {takes}.") from error


def check_number(name: str, value: Any, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Raise a ValueError that names the option unless its value is a finite number from ``low`` to ``high``."""
    fits = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
    if not fits or isinstance(value, bool) or not low <= value <= high:
        kind, most = "whole number" if whole else "number", "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name} is {value!r}: give a {kind} of at least {low}{most}.")


def is_true(flag: bool | str | None, name: str = "A switch") -> bool:
    """Understand the words of a command line for a switch; others are a ValueError."""
    word = str(flag).lower()
    if word not in ("true", "1", "false", "0", "none"):
        raise ValueError(f"{name} is {flag!r}: give true or false.")
    return word in ("true", "1")


def class_of(what: str, mode: str, known: Mapping[str, type | str], base: type) -> Any:
    """Return the class derived from ``base`` that is chosen by name or by its dotted path, or raise a ValueError."""
    chosen = known.get(mode, mode)
    if isinstance(chosen, str):
        module, _, name = chosen.rpartition(".")
        try:
            chosen = getattr(importlib.import_module(module or "."), name)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            others = f"use one of {', '.join(known)}, or the dotted path of a class"
            raise ValueError(f"There is no {what} '{mode}' ({error}): {others}.") from error
    if not (inspect.isclass(chosen) and issubclass(chosen, base)):
        raise ValueError(f"The {what} '{mode}' must derive from {base.__module__}.{base.__name__}: change its class.")
    return chosen
