"""What a run on several tasks writes next to each task's own report: who teaches what, and what sharing brought."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events

from amkd_monai.atomic import atomic_write_bytes
from amkd_monai.data.datasets import Task
from amkd_monai.engines.handlers.run_record import RunRecord
from amkd_monai.metrics.transfer import format_transfer, transfer_csv, transfer_rows

logger = logging.getLogger("amkd_monai")


class TeachingMap:
    """Write the mean weight of each teacher on each task, in the last epoch that drew it: ``teachers.csv``, ``.svg``.

    Attach to the trainer after the run record, whose history is read.
    """

    def __init__(self, run_record: RunRecord, output_dir: str | Path) -> None:
        self.run_record, self.output_dir = run_record, Path(output_dir)

    def attach(self, engine: Engine) -> None:
        """Write after every epoch."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files; nothing without teachers."""
        weights: dict[tuple[str, str, str], float] = {}
        for column, value in self.run_record.latest.items():
            task, _, figure = column.partition("/teacher_")
            loss, _, teacher = figure.partition("_")
            if teacher:
                weights[task, loss, teacher] = value
        if not weights or idist.get_rank() != 0:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("task", "loss", "teacher", "weight"))
        writer.writerows((*key, value) for key, value in weights.items())
        atomic_write_bytes(self.output_dir / "teachers.csv", text.getvalue().encode())
        atomic_write_bytes(self.output_dir / "teachers.svg", heat_map(weights).encode())


def heat_map(weights: Mapping[tuple[str, str, str], float]) -> str:
    """Return an SVG of weights {(task, loss, teacher): weight}: a row per task and loss, darker where it is larger."""
    rows = list(dict.fromkeys((task, loss) for task, loss, _ in weights))
    columns = list(dict.fromkeys(teacher for *_, teacher in weights))
    wide, high, left, top = 90, 26, 210, 40  # px of a cell, and of the names
    size = f'width="{left + wide * len(columns)}" height="{top + high * len(rows)}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">']
    parts += [f'<text x="{left + wide * k + 4}" y="{top - 8}">{name}</text>' for k, name in enumerate(columns)]
    parts += [f'<text x="4" y="{top + high * r + 17}">{", ".join(row)}</text>' for r, row in enumerate(rows)]
    for (task, loss, teacher), value in weights.items():
        x, y = left + wide * columns.index(teacher), top + high * rows.index((task, loss))
        shade, ink = round(255 * (1 - min(1.0, value))), "white" if value > 0.5 else "black"
        box = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
        parts.append(f'<rect {box} fill="rgb({shade},{shade},255)" stroke="white"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 17}" fill="{ink}">{value:.3f}</text>')
    return "\n".join([*parts, "</svg>\n"])


class TransferReport:
    """Compare the shared student's evaluation with other runs: ``transfer.csv``, and a table in the log.

    Attach to the evaluator of all tasks.

    Args:
        output_dir: folder that holds a folder per task.
        tasks: {task: what is asked}.
        runs: {label: folder of another run, with ``{task}`` in it}, such as the undistilled and the distilled students
            of single data sets, fine-tuned students, or the shared student before it learned more; None leaves one out.
    """

    def __init__(self, output_dir: str | Path, tasks: Mapping[str, Task], runs: Mapping[str, str | None]) -> None:
        self.output_dir, self.tasks = Path(output_dir), dict(tasks)
        self.runs = {label: pattern for label, pattern in runs.items() if pattern}

    def attach(self, engine: Engine) -> None:
        """Write when the evaluation ends."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write and log."""
        if idist.get_rank() != 0:
            return
        rows = transfer_rows({task: self.output_dir / task for task in self.tasks}, self.tasks, self.runs)
        atomic_write_bytes(self.output_dir / "transfer.csv", transfer_csv(rows).encode())
        logger.info("shared student, compared with other runs\n%s", format_transfer(rows))
