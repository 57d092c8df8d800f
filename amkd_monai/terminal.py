"""What a command tells the person at the terminal: how much of it, and progress."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("amkd_monai")

_LEVELS = {"quiet": logging.WARNING, "normal": logging.NOTSET, "verbose": logging.DEBUG}


class CommandParser(argparse.ArgumentParser):
    """A parser with ``--quiet`` and ``--verbose``, and so are the parsers of its sub-commands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # no default: that of a sub-command would replace what stands before its name
        common: dict[str, Any] = {"action": "store_const", "dest": "verbosity", "default": argparse.SUPPRESS}
        how_much = self.add_mutually_exclusive_group()
        how_much.add_argument("--quiet", const="quiet", help="results and warnings only, no progress", **common)
        how_much.add_argument("--verbose", const="verbose", help="every step, and errors with their trace", **common)


def set_verbosity(verbosity: str) -> None:
    """Set how much this package says: ``quiet``, ``normal`` or ``verbose``; messages go to the error stream."""
    if verbosity == "verbose":
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    logger.setLevel(_LEVELS[verbosity])


def print_any_name() -> None:
    """Let both streams print names that their encoding lacks, escaped instead of with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_quiet() -> bool:
    """Whether this package's logger was set to warnings only, by ``--quiet`` or from Python."""
    return logger.level >= logging.WARNING


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a tqdm progress line on the error stream: none if quiet, and by default none where it is no terminal."""
    return tqdm(iterable, **{"disable": None, **options, **({"disable": True} if is_quiet() else {})})


def align(rows: Sequence[Sequence[str]], left: int | None = 1, ruled: bool = False) -> str:
    """Rows of cells as text columns.

    Args:
        rows: cells, all rows equally many; the first row is the header.
        left: this many columns are flush left and the others flush right; None: all are flush left.
        ruled: draw a line below the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    lines = [
        [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    if ruled:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)
