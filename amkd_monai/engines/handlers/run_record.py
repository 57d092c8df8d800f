"""The run record: data, teachers and settings, so that a figure can be traced and repeated."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import psutil
from ignite.engine import Engine
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from amkd_monai.data.datalist import Datalist
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation import DistillationConfig
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.engines.handlers.checkpoints import Handler
from amkd_monai.engines.runs import Identity, versions
from amkd_monai.engines.trainer import Recipe, TeacherTargets
from amkd_monai.memory import own_peak
from amkd_monai.metrics.summary import write_case_csv
from amkd_monai.storage import atomic_write_json, jsonable, now


class RunRecord(Handler):
    """Write ``run.json`` when a training starts and ends and after every epoch, with the facts of the run.

    The means over an epoch's steps and the validation become a row of ``history.csv``, the scalars ``epoch/...`` of
    TensorBoard, and, each figure's last known value, ``latest`` in ``run.json``. Steps are read from the device at the
    end of the epoch. ``identity`` claims its folders before the first step. Attach after the validation handler.
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
        self.steps: list[tuple[Tensor, dict[str, tuple[DistillationOutput, list[str]]]]] = []
        self.started = 0.0
        self.board: SummaryWriter | None = None

    def _started(self, engine: Engine) -> None:
        self.started = time.time()
        if self.identity is not None:  # a student that this process has validated is where the run starts from
            self.identity.claim(keep=self.evaluator is not None and self.evaluator.state.best_metric_epoch > 0)
        if idist.get_rank() == 0:
            self.board = SummaryWriter(str(self.output_dir))
        self._write(engine, "running")

    def _iteration_completed(self, engine: Engine) -> None:
        result = engine.state.distillation
        if isinstance(result, Mapping):  # a step of several tasks
            parts = {f"{task}/": (_kept(of_task), engine.teachers_of(task)) for task, of_task in result.items()}
            self.steps.append((engine.state.output["loss"], parts))
        else:
            names = [t.name for t in engine.targets.teachers] if engine.targets else []
            self.steps.append((result.total.detach(), {"": (_kept(result), names)}))

    def _epoch_completed(self, engine: Engine) -> None:
        row: dict[str, float] = {"epoch": engine.state.epoch, "learning_rate": engine.optimizer.param_groups[0]["lr"]}
        figures: dict[str, list[float]] = {}
        for total, parts in self.steps:
            step = {"loss_total": float(total)}
            for prefix, part in parts.items():
                step |= {f"{prefix}{name}": value for name, value in step_figures(*part).items()}
            for name, value in step.items():
                figures.setdefault(name, []).append(value)
        row |= {name: sum(values) / len(values) for name, values in figures.items()}
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row |= {k: float(v) for k, v in self.evaluator.state.metrics.items()}
        self.rows.append(row)
        self.steps = []
        if self.board is not None:
            write_case_csv(self.output_dir / "history.csv", self.rows)
            for name in row.keys() - {"epoch"}:
                self.board.add_scalar(f"epoch/{name}", row[name], engine.state.epoch)
            self.board.flush()
        self._write(engine, "running")

    def _completed(self, engine: Engine) -> None:
        self._write(engine, "completed")
        if self.board is not None:
            self.board.close()

    @idist.one_rank_only()
    def _write(self, engine: Engine, status: str) -> None:
        record = {
            "status": status,
            "written": now(),
            **({} if self.identity is None else {"run": self.identity.record["run"]}),
            **self.facts,
            "epochs_done": engine.state.epoch,
            "max_epochs": engine.state.max_epochs,
            "steps_per_epoch": engine.state.epoch_length,
            "versions": versions(),
            "machine": {"cpus": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)},
            "seconds": round(time.time() - self.started, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "peak_rss_mb": round(own_peak()),
            "latest": jsonable({column: value for row in self.rows for column, value in row.items()}),
        }
        if self.evaluator is not None:
            state, epoch = self.evaluator.state, int(self.evaluator.state.best_metric_epoch)
            best = float(state.best_metric) if epoch > 0 else None
            record["best_validation"] = {"metric": state.key_metric_name, "value": best, "epoch": epoch}
        atomic_write_json(self.output_dir / "run.json", record)

    def state_dict(self) -> dict[str, Any]:
        """Return the history, for resuming."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history."""
        self.rows = [dict(row) for row in state["rows"]]


def _kept(result: DistillationOutput) -> DistillationOutput:
    """Means of a step, still on the device, without its graph and maps."""
    losses = {name: loss.detach().mean() for name, loss in result.losses.items()}
    weights = {name: weight.mean(0) for name, weight in result.teacher_weights.items()}
    logits = result.logits[:0].detach()
    return replace(result, total=result.total.detach(), losses=losses, teacher_weights=weights, logits=logits)


def step_figures(result: DistillationOutput, teachers: Sequence[str]) -> dict[str, float]:
    """Return what is recorded of a step: losses, their weights, and the mean weight of each teacher by name."""
    values = {"loss_total": float(result.total)}
    for name, loss in result.losses.items():
        values[f"loss_{name}"] = float(loss)
        values[f"weight_{name}"] = float(result.loss_weights[name])
        values[f"weighted_{name}"] = values[f"loss_{name}"] * values[f"weight_{name}"]
    for name, weights in result.teacher_weights.items():
        mean = weights.tolist()
        values |= {f"teacher_{name}_{teacher}": value for teacher, value in zip(teachers, mean, strict=True)}
        values[f"effective_teachers_{name}"] = effective_number(mean)
    return values | {name: float(value) for name, value in result.figures.items()}


def effective_number(weights: Sequence[float]) -> float:
    """Effective number of teachers, exp of the entropy of their shares: 1 if one has all weight, K if all have equal.

    All weights 0 give 0; weights need not sum to 1.
    """
    total = sum(weights)
    shares = [w / total for w in weights if w > 0]
    return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def run_facts(
    datalist: Datalist,
    targets: TeacherTargets,
    recipe: Recipe,
    train: DecodedDataset,
    validation: DecodedDataset,
    student: nn.Module,
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run; ``is_test`` marks one with a teacher of random weights."""
    teachers = targets.record["teachers"]
    return {
        "is_test": any(teacher.get("random_weights") for teacher in teachers),
        "data": datalist.describe(),
        "skipped_samples": {"train": train.skipped, "validation": validation.skipped},
        "training_samples": len(train),
        "labelled_samples": int(train.has_label.sum()),
        "image_size": list(train.images.shape[-2:]),
        "distillation": targets.record if teachers else "none: the undistilled student",
        **distillation.facts(**method),
        **settings,
        "recipe": recipe.describe(),
        "student_parameters": sum(p.numel() for p in student.parameters()),
    }


def shared_facts(
    tasks: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run on several tasks: each task's facts, missing tasks, method and settings."""
    settings = {**distillation.facts(**method), **settings}
    is_test = any(facts["is_test"] for facts in tasks.values())
    phantom = any(facts["data"]["phantom"] for facts in tasks.values())
    return {"is_test": is_test, "phantom": phantom, "missing_tasks": list(missing), **settings, "tasks": dict(tasks)}
