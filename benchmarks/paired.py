"""What the short benchmarks share: CPU time of one thread, paired, alternated; one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HEADER = ("what", "unit", "ours", "other", "ratio [lowest, highest]", "limit", "")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured, and against what.
        unit: of the figures.
        ours: one figure per round.
        other: likewise, of what it is compared with; empty where there is nothing.
        limit: of the median ratio, or of the median figure where nothing is compared; None without.
        aim: below the limit; to miss it is said and is no failure.
    """

    what: str
    unit: str
    ours: Sequence[float]
    other: Sequence[float] = ()
    limit: float | None = None
    aim: float | None = None

    @property
    def judged(self) -> list[float]:
        """The figures the limit holds for."""
        return [a / b for a, b in zip(self.ours, self.other, strict=True)] if self.other else list(self.ours)

    @property
    def kept(self) -> bool:
        """Whether the median is within the limit."""
        return self.limit is None or statistics.median(self.judged) <= self.limit

    @property
    def verdict(self) -> str:
        """What the last column says."""
        if not self.kept:
            return "ABOVE THE LIMIT"
        missed = self.aim is not None and statistics.median(self.judged) > self.aim
        return f"above the aim of {_short(self.aim)}" if missed else ""

    def cells(self) -> tuple[str, ...]:
        """The line's cells."""
        ours, other = (_short(statistics.median(figures)) if figures else "" for figures in (self.ours, self.other))
        spread = f"[{_short(min(self.judged))}, {_short(max(self.judged))}]"
        ratio = f"{_short(statistics.median(self.judged))} {spread}" if self.other else spread
        limit = "" if self.limit is None else _short(self.limit)
        return (self.what, self.unit, ours, other, ratio, limit, self.verdict)


def _short(figure: float) -> str:
    return f"{figure:.3g}" if figure < 100 else f"{figure:.0f}"


def cpu_ms(work: Callable[[], int]) -> float:
    """CPU milliseconds per item of one call, which returns its number of items."""
    start = time.process_time()
    count = work()
    return (time.process_time() - start) * 1000 / count


def paired(ours: Callable[[], int], other: Callable[[], int], rounds: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds per item of both, by round, in alternating order after a warm-up."""
    ours(), other()
    times = [(cpu_ms(ours), cpu_ms(other)) if i % 2 else (cpu_ms(other), cpu_ms(ours))[::-1] for i in range(rounds)]
    return [a for a, _ in times], [b for _, b in times]


def interleaved(ours: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float]:
    """CPU milliseconds per call of both, called in turns: a machine that slows down slows both."""
    spent = [0.0, 0.0]
    for i in range(repeats):
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.process_time()
            (ours, other)[which]()
            spent[which] += time.process_time() - start
    return spent[0] / repeats * 1e3, spent[1] / repeats * 1e3


def print_table(rows: Sequence[Row]) -> int:
    """Print rows as Markdown; returns 1 if a limit is not kept."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return 0 if all(row.kept for row in rows) else 1
