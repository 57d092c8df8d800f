"""Terminal output: verbosity, progress lines and tables."""

import io
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("amkd_monai")

_LEVELS = {"quiet": logging.WARNING, "normal": logging.NOTSET, "verbose": logging.DEBUG}


def set_verbosity(verbosity: str) -> None:
    """Set how much this package logs: ``quiet``, ``normal`` or ``verbose``; messages go to the error stream."""
    if verbosity == "verbose":
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    logger.setLevel(_LEVELS[verbosity])


def print_any_name() -> None:
    """Escape characters that the encoding of the output streams lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_quiet() -> bool:
    """Whether this package's logger was set to warnings only, by ``--quiet`` or from Python."""
    return logger.level >= logging.WARNING


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a tqdm progress line on the error stream; hidden if quiet and, by default, outside a terminal."""
    return tqdm(iterable, **{"disable": None, **options, **({"disable": True} if is_quiet() else {})})


def number(value: float | None, digits: int = 4) -> str:
    """Return a figure as text, "-" where there is none or it is not a number."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def align(rows: Sequence[Sequence[str]], left: int | None = 1, ruled: bool = False) -> str:
    """Format equally long rows of cells, the header first, as text columns, ``ruled`` by a line below it.

    ``left`` columns are aligned to the left, the others to the right; None aligns all to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    lines = [[side(c, w) for side, c, w in zip(sides, row, widths, strict=True)] for row in rows]
    if ruled:
        lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)
