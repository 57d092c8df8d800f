"""Checkpoints: the kept student and the state to resume from; base of handlers."""

import logging
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from timm.utils import ModelEmaV3
from torch import nn

from amkd_monai.engines.runs import is_true, record_weights, refuse_another
from amkd_monai.networks.shared_student import initialised
from amkd_monai.storage import atomic_path, file_sha256
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

logger = logging.getLogger("amkd_monai")


class Handler:
    """Base of the handlers: ``_started``, ``_epoch_completed`` and so on run at the events of these names."""

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        for event in Events:
            if method := getattr(self, f"_{event.name.lower()}", None):
                engine.add_event_handler(event, method)


class KeptStudent(Handler):
    """Save the student's flat state dict after every validation (``keep`` "last"), or after the best so far ("best").

    Attach to the evaluator. The file, e.g. ``models/model.pt``, loads with ``weights_only=True``.
    """

    def __init__(self, student: nn.Module, path: str | Path, keep: str = "best") -> None:
        self.student, self.path, self.keep = student, Path(path), keep
        self.best = -float("inf")

    def _epoch_completed(self, engine: Engine) -> None:
        name = engine.state.key_metric_name
        value = float(engine.state.metrics[name])
        if math.isnan(value):
            raise ValueError(f"Validation gives no {name}: change the split, it needs two classes, or foreground.")
        if value > self.best or self.keep == "last":
            self.best = max(self.best, value)
            if idist.get_rank() == 0:
                with atomic_path(self.path) as temporary:
                    torch.save({k: v.detach().cpu() for k, v in self.student.state_dict().items()}, temporary)
                    record_weights(self.path.parent, file_sha256(temporary))

    def state_dict(self) -> dict[str, float]:
        """Return the best value, for resuming."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the best value."""
        self.best = float(state["best"])


class AveragedStudent(Handler):
    """Average the student's weights over the steps; the average takes their place while the evaluator runs.

    So it is what validation scores and what is kept. Its decay per step grows to ``decay``; 0 averages nothing.
    Attach to the trainer, before the handler that validates.
    """

    def __init__(self, student: nn.Module, evaluator: Engine, decay: float) -> None:
        self.student, self.steps = student, 0
        self.average = ModelEmaV3(student, decay, use_warmup=True) if decay else None
        for event in (Events.STARTED, Events.COMPLETED):
            evaluator.add_event_handler(event, self._exchange)

    def _iteration_completed(self, engine: Engine) -> None:
        if self.average is not None:
            self.steps = engine.state.iteration
            self.average.update(self.student, self.steps)

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average is not None and self.steps:
            pairs = zip(self.student.state_dict().values(), self.average.module.state_dict().values(), strict=True)
            for own, averaged in pairs:
                kept = own.clone()
                own.copy_(averaged)
                averaged.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, for resuming."""
        return {} if self.average is None else {"steps": self.steps, "average": self.average.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average."""
        if self.average is not None:
            self.steps = state["steps"]
            self.average.module.load_state_dict(state["average"])


class ResumeCheckpoint(Handler):
    """Save all state at the end of every epoch; with ``resume`` continue from there.

    Attach last to the trainer, so that an epoch counts as done only with its validation. A run that is killed within
    an epoch repeats that epoch.

    Args:
        path: file to write, e.g. ``models/distillation.pt``.
        distiller: student and distillation state, or DistributedDataParallel around them.
        objects: further ones with a state: optimizer, scheduler, handlers.
        evaluator: its best metric and epoch are kept too.
        resume: continue from ``path``.
        identity: what must be the same on resuming (split, seed, teachers).
    """

    def __init__(
        self,
        path: str | Path,
        distiller: nn.Module,
        objects: Mapping[str, Any],
        evaluator: Engine | None = None,
        resume: bool | str = False,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.objects, self.evaluator = Path(path), dict(objects), evaluator
        self.resume = is_true(resume)
        self.distiller = distiller.module if hasattr(distiller, "module") else distiller
        self.identity: dict[str, str] = {}
        for name, value in (identity or {}).items():  # fields of an object one by one, so that the refusal names them
            parts = {f"{name}#{k}": v for k, v in vars(value).items()} if is_dataclass(value) else {name: value}
            self.identity |= {k: str(v) for k, v in parts.items()}
        self._state: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Check what is to be resumed; restore when the run starts, save at the end of every epoch."""
        if self.resume:
            try:
                self._state = torch.load(self.path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError) as error:
                raise CheckpointError(f"{self.path} is missing or damaged: start without --resume.") from error
            refuse_another(self._state["identity"], self.identity, self.path)
        super().attach(engine)

    @idist.one_rank_only()
    def _epoch_completed(self, engine: Engine) -> None:
        state: dict[str, Any] = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "identity": self.identity,
            "distiller": self.distiller.state_dict(),
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
        }
        if self.evaluator is not None:
            best, epoch = self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch
            state["best"] = [float(best), int(epoch)]
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def _started(self, engine: Engine) -> None:
        if self._state is None:
            return
        state, self._state = self._state, None
        load_strict(self.distiller, state["distiller"], self.path)
        for name, value in self.objects.items():
            value.load_state_dict(state["objects"][name])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["best"]
        logger.info("resumed after epoch %d from %s", state["epoch"], self.path)


class LoadStudent(Handler):
    """Load a trained student, strictly, before an evaluation or inference; of a shared student the ``task``'s part.

    MONAI's ``CheckpointLoader`` loads with ``weights_only=False``, which runs code that a file holds.
    """

    def __init__(self, student: nn.Module, path: str | Path, task: str | None = None) -> None:
        self.student, self.path, self.task = student, Path(path), task

    def _started(self, engine: Engine) -> None:
        if not self.path.is_file():
            raise CheckpointError(f"There is no trained student at {self.path}: run `training` first.")
        if self.task is not None:
            initialised(self.student, self.path, self.task)
        else:
            load_strict(self.student, load_state_dict(self.path), self.path)


class Attach:
    """Attach a handler that is defined elsewhere in a config: MONAI looks at the ``_target_`` of each in a list."""

    def __init__(self, handler: Any) -> None:
        self.attach = handler.attach
