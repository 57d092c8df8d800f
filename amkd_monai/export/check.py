"""Compare each written file with the PyTorch student on validation images: answers, metric, size, latency."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from amkd_monai.export.formats import is_int8
from amkd_monai.export.runners import Runner
from amkd_monai.export.source import Case
from amkd_monai.files.masks import IGNORED
from amkd_monai.files.steps import softmax
from amkd_monai.metrics.classification import macro_auroc
from amkd_monai.tasks import Task
from amkd_monai.terminal import align

TOLERANCE = 1e-4
"""Largest difference of a probability between the student and a float format."""
LARGEST_LOSS = 0.005
"""Dice (half a point) or AUC that 8 bits may cost."""
BATCH = 8
REPEATS = 20


@dataclass
class Row:
    """What was measured about one format.

    Attributes:
        name: of the format; ``eager`` is the student itself.
        megabytes: size of the file.
        p50, p95: latency of one image, ms.
        memory: peak of a fresh process that answers one image, MB; NaN for the student itself.
        difference: largest difference of a probability from the student's.
        metric: mean Dice over cases with foreground, or macro AUC; NaN where the cases do not define it.
    """

    name: str
    megabytes: float
    p50: float
    p95: float
    memory: float
    difference: float
    metric: float

    def as_json(self) -> dict[str, Any]:
        """As JSON, NaN as null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def probabilities(run: Runner, case: Case) -> np.ndarray:
    """Probabilities of a case: (B, C, H, W), or (1, C)."""
    parts = [case.batch[i : i + BATCH] for i in range(0, len(case.batch), BATCH)]
    return softmax(np.concatenate([run(part) for part in parts]), 1)


def measure(
    name: str,
    run: Runner,
    size: int,
    memory: float,
    cases: Sequence[Case],
    expected: Sequence[np.ndarray],
    task: Task,
) -> Row:
    """Measure one format; ``expected`` are the student's probabilities of the cases, ``size`` is in bytes."""
    answers = [probabilities(run, case) for case in cases]
    difference = max(float(np.abs(a - e).max()) for a, e in zip(answers, expected, strict=True))
    p50, p95 = latency(run, np.ascontiguousarray(cases[0].batch[:1]))
    return Row(name, size / 1e6, p50, p95, memory, difference, score(answers, cases, task))


def latency(run: Runner, image: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile of the time for one image, ms."""
    for _ in range(3):
        run(image)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(image)
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.percentile(times, 50)), float(np.percentile(times, 95))


def score(answers: Sequence[np.ndarray], cases: Sequence[Case], task: Task) -> float:
    """Macro AUC of the probabilities, or the mean Dice of cases, at the network's resolution."""
    if task.is_classification:
        return macro_auroc([int(case.label) for case in cases], np.concatenate(answers))
    values = []
    for answer, case in zip(answers, cases, strict=True):
        found = answer.argmax(1)
        dices = []
        for label in range(1, len(task.classes)):
            a, b = (found == label) & (case.label != IGNORED), case.label == label
            if b.any():
                dices.append(2 * np.logical_and(a, b).sum() / (a.sum() + b.sum()))
        if dices:
            values.append(float(np.mean(dices)))
    return float(np.mean(values)) if values else math.nan


def judge(row: Row, student: Row, accept_loss: bool) -> str:
    """Say what a format costs, empty if nothing is to be said.

    Raises:
        ValueError: a float format differs from the student, or 8 bits lose too much and that is not accepted.
    """
    if not is_int8(row.name):
        if not row.difference <= TOLERANCE:
            raise ValueError(
                f"The format {row.name} differs from the PyTorch student by {row.difference:.2g} in a probability, "
                f"more than {TOLERANCE:g}: nothing was exported; leave it out with --formats."
            )
        return ""
    loss = student.metric - row.metric
    if loss <= LARGEST_LOSS:
        return ""
    what = "cannot be judged on these cases" if math.isnan(loss) else f"loses {loss:.4f} of {student.metric:.4f}"
    said = f"The format {row.name} {what} (at most {LARGEST_LOSS:g} Dice or AUC is allowed)"
    if not accept_loss:
        raise ValueError(f"{said}: nothing was exported; add --accept-loss, or leave it out with --formats.")
    return f"{said}, accepted by --accept-loss."


def format_rows(rows: Sequence[Row], task: Task, threads: int) -> str:
    """The measurements as a plain-text table."""
    metric = "macro AUC" if task.is_classification else "Dice"
    lines = [("format", "MB", "p50 ms", "p95 ms", "peak MB", "max difference", metric)]
    for row in rows:
        sizes = (f"{row.megabytes:.1f}", f"{row.p50:.1f}", f"{row.p95:.1f}", _number(row.memory, 0))
        lines.append((row.name, *sizes, f"{row.difference:.1e}", _number(row.metric, 4)))
    return f"{align(lines)}\n(one image, CPU, threads: {threads})"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
