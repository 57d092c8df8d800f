"""The run record: what was trained on what, so that a figure can be traced and repeated."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

import amkd_monai
from amkd_monai.atomic import atomic_write_bytes, atomic_write_json
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.memory import own_peak

if TYPE_CHECKING:
    from amkd_monai.engines.runs import Identity

VERSIONED = ("torch", "monai", "pytorch-ignite", "timm", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), "amkd_monai": amkd_monai.__version__, **found}


class RunRecord:
    """Write ``run.json`` when a training starts and ends and after every epoch, and what happened in the epoch.

    The means over an epoch's steps and the validation become a row of ``history.csv``, the scalars ``epoch/...`` of
    TensorBoard, and, each figure's last known value, ``latest`` in ``run.json``.

    Attach to the trainer, after the validation handler.

    Args:
        output_dir: folder of the files.
        facts: what to record: data, split, teachers, seed, settings.
        evaluator: whose metrics enter the history.
        identity: of the run; its folders are made this run's, and its record is written, before the first step.
    """

    def __init__(
        self,
        output_dir: str | Path,
        facts: Mapping[str, Any],
        evaluator: Engine | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.output_dir, self.facts, self.evaluator = Path(output_dir), dict(facts), evaluator
        self.identity = identity
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.started = 0.0
        self.board: SummaryWriter | None = None

    def attach(self, engine: Engine) -> None:
        """Follow the trainer."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def _start(self, engine: Engine) -> None:
        self.started = time.time()
        if self.identity is not None:  # a student that this process has validated is where the run starts from
            self.identity.claim(keep=self.evaluator is not None and self.evaluator.state.best_metric_epoch > 0)
        if self._main():
            self.board = SummaryWriter(str(self.output_dir))
        self._write(engine, "running")

    def _collect(self, engine: Engine) -> None:
        result = engine.state.distillation
        if isinstance(result, Mapping):  # a step of several tasks
            values = {"loss_total": float(engine.state.output["loss"])}
            for task, of_task in result.items():
                figures = step_figures(of_task, engine.teachers_of(task))
                values |= {f"{task}/{name}": value for name, value in figures.items()}
        else:
            values = step_figures(result, [t.name for t in engine.targets.teachers] if engine.targets else [])
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _epoch(self, engine: Engine) -> None:
        row: dict[str, float] = {"epoch": engine.state.epoch, "learning_rate": engine.optimizer.param_groups[0]["lr"]}
        row.update({name: total / self.counts[name] for name, total in self.sums.items()})
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row.update({k: float(v) for k, v in self.evaluator.state.metrics.items()})
        self.rows.append(row)
        self.sums, self.counts = {}, {}
        if self._main():
            columns = list(dict.fromkeys(k for r in self.rows for k in r))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(self.rows)
            atomic_write_bytes(self.output_dir / "history.csv", text.getvalue().encode())
            self._write(engine, "running")
        if self.board is not None:
            for name in row.keys() - {"epoch"}:
                self.board.add_scalar(f"epoch/{name}", row[name], engine.state.epoch)
            self.board.flush()

    def _complete(self, engine: Engine) -> None:
        self._write(engine, "completed")
        if self.board is not None:
            self.board.close()

    @property
    def latest(self) -> dict[str, float]:
        """The last known value of each column of the history; not every epoch knows all."""
        return {column: value for row in self.rows for column, value in row.items()}

    def _main(self) -> bool:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def _write(self, engine: Engine, status: str) -> None:
        if not self._main():
            return
        record = {
            "status": status,
            **({} if self.identity is None else {"run": self.identity.run}),
            **self.facts,
            "epochs_done": engine.state.epoch,
            "max_epochs": engine.state.max_epochs,
            "steps_per_epoch": engine.state.epoch_length,
            "versions": versions(),
            "machine": {"cpus": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)},
            "seconds": round(time.time() - self.started, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "peak_rss_mb": round(own_peak()),
            "latest": {name: value if math.isfinite(value) else None for name, value in self.latest.items()},
        }
        if self.evaluator is not None:
            best, epoch = self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch
            record["best_validation"] = {
                "metric": self.evaluator.state.key_metric_name,
                "value": float(best) if epoch > 0 else None,
                "epoch": int(epoch),
            }
        atomic_write_json(self.output_dir / "run.json", record)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for resuming."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history."""
        self.rows = [dict(row) for row in state["rows"]]


def step_figures(result: DistillationOutput, teachers: Sequence[str]) -> dict[str, float]:
    """Return what is recorded of a step: losses, their weights, and the mean weight of each teacher by name."""
    values = {"loss_total": float(result.total.detach())}
    for name, loss in result.losses.items():
        values[f"loss_{name}"] = float(loss.detach().mean())
        values[f"weight_{name}"] = float(result.loss_weights[name])
        values[f"weighted_{name}"] = values[f"loss_{name}"] * values[f"weight_{name}"]
    for name, weights in result.teacher_weights.items():
        mean = weights.mean(0).tolist()
        values |= {f"teacher_{name}_{teacher}": value for teacher, value in zip(teachers, mean, strict=True)}
        values[f"effective_teachers_{name}"] = effective_number(mean)
    return values | {name: float(value) for name, value in result.figures.items()}


def effective_number(weights: Sequence[float]) -> float:
    """Effective number of teachers, exp of the entropy of their shares: 1 if one has all weight, K if all have equal.

    Args:
        weights: K weights >= 0, not necessarily with sum 1; all 0 gives 0.
    """
    total = sum(weights)
    shares = [w / total for w in weights if w > 0]
    return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0
