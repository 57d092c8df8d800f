"""A shared student: its tasks, each described by a bundle of its own, its distillers, training and evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Average
from monai.bundle import ConfigParser
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn

from amkd_monai.data.datalist import find_dataset_dir
from amkd_monai.data.datasets import Task, get_task
from amkd_monai.data.sampling import Augmentation, MultiTaskLoader
from amkd_monai.distillation import Batch, Distiller
from amkd_monai.distillation.gates import LossGate, ScaledLossGate
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.engines.runs import check_part, expand
from amkd_monai.engines.trainer import DistillationTrainer, TeacherTargets, distillation_batch
from amkd_monai.errors import EXPECTED, is_own, root_cause
from amkd_monai.networks.student import Head, SharedStudent
from amkd_monai.teachers.base import CROSS_FITTED_KINDS

logger = logging.getLogger("amkd_monai")

_OF_THE_WHOLE_RUN = {"@kept_student", "ignite.handlers.ProgressBar", "StatsHandler", "TensorBoardStatsHandler"}
_OF_THE_WHOLE_RUN |= {f"amkd_monai.engines.handlers.{name}" for name in ("LoadStudent", "CalibrateMasks")}
"""Handlers of a bundle that act on its own student's file or on logs; the shared run has its own."""


class TaskBundle:
    """One task's bundle, opened; whatever its config needs of the student it takes from ``task_view``."""

    def __init__(self, name: str, parser: ConfigParser) -> None:
        self.name, self.parser = name, parser
        self.task = get_task(parser.get_parsed_content("task"))
        check_part(name, parser)
        network = parser.config["network_def"]
        network = {k: self.get(f"network_def#{k}") for k in ("num_classes", "stride") if k in network}
        self.head = Head(self.task.kind, int(network["num_classes"]), int(network.get("stride", 4)))
        if self.head.classes != (labels := len(self.task.classes)):
            has = f"The head of '{name}' has {self.head.classes} classes, its labels have {labels}"
            raise ValueError(f"{has} ({', '.join(self.task.classes)}): set network_def#num_classes to {labels}.")

    def with_student(self, view: nn.Module) -> TaskBundle:
        """Give the bundle its student."""
        self.parser.globals["task_view"] = view
        return self

    def get(self, item: str) -> Any:
        """Return an item of the bundle's config; an expected error is told with the task's name."""
        try:
            return self.parser.get_parsed_content(item)
        except (RuntimeError, *EXPECTED) as error:
            cause = root_cause(error)
            if not is_own(cause):
                raise
            raise ValueError(f"Task '{self.name}': {cause}") from error


class TaskSet:
    """The tasks of a run whose data are there: opened bundles by name, their numbers, and names of ``missing`` tasks.

    Tasks without data are announced and left out; if none has data, all of them use generated phantoms.

    Args:
        tasks: {name: {"bundle": name or path of its bundle, and settings of that bundle that this run changes}}.
        bundle_root: the folder of the shared student's bundle; others lie next to it, or in ``bundles/``.
        output_dir: each task gets a folder in it.
        cache_dir: likewise, shared with single runs.
        settings: settings of all tasks, wherever a bundle has them; ``teachers`` may name their ``tasks``.
        only: names of the tasks of this run; None takes all. An unknown one, or a task given twice, is a ValueError.
        dataset_dir: folder that holds the data sets' folders; a task's own ``dataset_dir`` goes first.
        configs: configs of each bundle, later ones on top.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, Any]],
        bundle_root: str | Path,
        output_dir: str | Path,
        cache_dir: str | Path,
        settings: Mapping[str, Any],
        only: Sequence[str] | None = None,
        dataset_dir: str | Path | None = None,
        configs: Sequence[str] = ("train",),
    ) -> None:
        if unknown := sorted(set(only or ()) - set(tasks)):
            raise ValueError(f"There is no task '{unknown[0]}' in this run: it has {', '.join(tasks)}.")
        dataset_dir = Path(dataset_dir).expanduser() if dataset_dir else None
        if dataset_dir and not dataset_dir.is_dir():
            raise FileNotFoundError(f"There is no folder {dataset_dir}: give the one with the data sets' folders.")
        common = {**settings, "gate_options": {**settings.get("gate_options", {}), "tasks": len(tasks)}}
        teachers = common.pop("teachers", [])
        parsers: dict[str, ConfigParser] = {}
        seen: dict[str, str] = {}
        found: dict[str, bool] = {}
        for name, entry in tasks.items():
            parser = parsers[name] = _parser(name, entry, Path(bundle_root), common, configs)
            task = get_task(parser.get_parsed_content("task"))
            if (other := seen.setdefault(task.name, name)) != name:
                raise ValueError(f"'{other}' and '{name}' are the task {task.name}: keep one, or name its own task.")
            place = parser.config.get("dataset_dir")
            if place is None and dataset_dir and (dataset_dir / task.folder).is_dir():
                place = str(dataset_dir / task.folder)
            found[name] = find_dataset_dir(task, place) is not None
            parser.update({"dataset_dir": place, "teachers": teachers_of(name, teachers)})
            parser.update({"output_dir": f"{output_dir}/{name}", "cache_dir": f"{cache_dir}/{task.name}"})
        chosen = [name for name in tasks if only is None or name in only]
        missing = [name for name in chosen if not found[name] and any(found[n] for n in chosen)]
        for name in missing:
            logger.warning("NO DATA FOUND for the task '%s': this run continues without it.", name)
        self.bundles = {name: TaskBundle(name, parsers[name]) for name in chosen if name not in missing}
        self.missing = missing
        self.numbers = {name: number for number, name in enumerate(tasks) if name in self.bundles}
        self.heads = {name: bundle.head for name, bundle in self.bundles.items()}
        self.tasks = {name: bundle.task for name, bundle in self.bundles.items()}

    def around(self, student: SharedStudent) -> TaskSet:
        """Give every bundle its view of a student, which is on its device, and return the tasks."""
        for name, bundle in self.bundles.items():
            bundle.with_student(student.for_task(name))
        return self

    def all(self, item: str) -> dict[str, Any]:
        """Return an item of every bundle's config, {task: item}."""
        return {name: bundle.get(item) for name, bundle in self.bundles.items()}


def teachers_of(task: str, teachers: str | Sequence[str | Mapping[str, Any]]) -> str | list[str | dict[str, Any]]:
    """Return the teachers of one task: its row of the matrix of teachers and tasks; words are left as they are.

    A teacher without ``tasks`` belongs to all. In another task than its own an image teacher gives features alone.
    """
    if isinstance(teachers, str):
        return teachers
    row: list[str | dict[str, Any]] = []
    for teacher in teachers:
        if isinstance(teacher, str):
            row.append(teacher)
            continue
        description = {k: v for k, v in teacher.items() if k != "tasks"}
        if task in teacher.get("tasks", [task]):
            row.append(description)
        elif teacher.get("kind") not in CROSS_FITTED_KINDS:
            row.append({**description, "own_answers": False})
    return row


def open_inference(
    task: str, entry: Mapping[str, Any], bundle_root: str | Path, neck_channels: int, settings: Mapping[str, Any]
) -> TaskBundle:
    """Open the inference config of one task's bundle, with ``settings`` of it, for the shared student's part in it."""
    parser = _parser(task, entry, Path(bundle_root), settings, ("inference",))
    if "neck_channels" in parser.config["network_def"]:
        parser["network_def"]["neck_channels"] = neck_channels
    return TaskBundle(task, parser)


def _parser(
    name: str, entry: Mapping[str, Any], root: Path, common: Mapping[str, Any], configs: Sequence[str]
) -> ConfigParser:
    """Read a bundle's configs, put the settings of the run and of the task's entry on top, and give it the student."""
    bundle = str(entry.get("bundle", name))
    places = [Path(bundle)] if "/" in bundle else [root.resolve().parent / bundle, Path("bundles") / bundle]
    folder = next((place for place in places if (place / "configs").is_dir()), places[0])
    files = [folder / "configs" / f"{config}.json" for config in configs]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"The task '{name}' has no {absent[0]}: correct `bundle` in its entry in `tasks`.")
    parser = ConfigParser(globals={"task_view": None})
    parser.read_config([str(file) for file in files])
    changes = {k: v for k, v in common.items() if k in parser.config}
    changes |= {k: v for k, v in entry.items() if k != "bundle"}
    for key, value in changes.items():
        if key.split("#")[0] not in parser.config:
            raise ValueError(f"The task '{name}' has no setting '{key}': use those at the top of {files[0]}.")
        old = parser.get(key)
        part = isinstance(value, Mapping) and isinstance(old, Mapping) and "_target_" in old and "_target_" not in value
        parser.set({**old, **value} if part else value, key)  # part of an object leaves its other settings
    parser["bundle_root"], parser["network"] = str(folder), "$task_view"
    expand(parser)
    if validate := parser.config.get("validate"):  # a config for inference has none
        validate["handlers"] = [h for h in validate["handlers"] if not _OF_THE_WHOLE_RUN & set(h.values())]
    return parser


class MultiTaskDistiller(nn.Module):
    """One distiller per task, {task: distiller}, each over its view of the same student.

    Projections and codes of equally named teachers of one shape, and the gate networks of equal lists of teachers, are
    one module for all tasks. The scale of a task's loss is measured over ``scale_steps`` of its steps.
    """

    def __init__(self, distillers: Mapping[str, Distiller], scale_steps: int = 100) -> None:
        super().__init__()
        self.distillers = nn.ModuleDict(distillers)
        self.scales = nn.ModuleDict({task: ScaledLossGate({"task": 1.0}, scale_steps) for task in distillers})
        known: dict[tuple, nn.Module] = {}

        def one(module: nn.Module, *key: object) -> nn.Module:
            shapes = tuple((name, value.shape) for name, value in module.state_dict().items())
            return known.setdefault((*key, shapes), module)

        for distiller in distillers.values():
            for part in (distiller.align, distiller.codes):
                for name in part:
                    part[name] = one(part[name], name)
            gate = distiller.teacher_gate
            if gate.network is not None:
                gate.network = one(gate.network, type(gate), *(t.name for t in gate.teachers))

    def forward(self, task: str, batch: Batch, progress: float = 0.0, learns_labels: bool = True) -> DistillationOutput:
        """Compute all losses of one task's micro-batch; the total is divided by the scale of the task's own loss."""
        result: DistillationOutput = self.distillers[task](batch, progress, learns_labels)
        scale = self.scales[task]
        if self.training and scale.steps < scale.history.shape[1]:
            scale.observe({"task": mean_over_processes(result.losses["task"].detach().mean())})
        factor = scale.scale[0].clone()
        result.total = result.total / factor
        result.figures["loss_scale"] = factor
        return result


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor of any shape over all processes, the tensor itself where there is one."""
    return value if idist.get_world_size() == 1 else idist.all_reduce(value.clone()) / idist.get_world_size()


class MultiTaskTrainer(DistillationTrainer):
    """Train one student on several tasks; memory as for one micro-batch.

    The gradients of a step's micro-batches are summed, each task's loss on its own scale, then there is one step of
    the optimiser. Under torch.distributed gradients, running statistics and loss scales are averaged once per step.
    ``targets`` and ``augmentations`` are by task, ``numbers`` those of the tasks in the gate's embedding.
    """

    network: MultiTaskDistiller
    data_loader: MultiTaskLoader

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: MultiTaskLoader,
        network: MultiTaskDistiller,
        optimizer: torch.optim.Optimizer,
        targets: Mapping[str, TeacherTargets],
        augmentations: Mapping[str, Augmentation],
        numbers: Mapping[str, int],
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
    ) -> None:
        self.task_targets = {task: t if len(t) else None for task, t in targets.items()}
        self.augmentations, self.numbers = dict(augmentations), dict(numbers)
        options: dict[str, Any] = {"seed": seed, "amp": amp, "train_handlers": train_handlers}
        super().__init__(device, max_epochs, train_data_loader, network, optimizer, **options)

    def _start_epoch(self) -> None:
        self.data_loader.set_epoch(self.state.epoch)
        self.learns_labels_of = {
            task: self._learns_labels(loader.batch_sampler, self.network.distillers[task])
            for task, loader in self.data_loader.loaders.items()
        }
        self._seed_epoch(idist.get_rank())

    def teachers_of(self, task: str) -> list[str]:
        """Names of the teachers of a task, in the order of their weights."""
        targets = self.task_targets[task]
        return [] if targets is None else [teacher.name for teacher in targets.teachers]

    def _iteration(self, engine: Engine, batchdata: dict[str, dict[str, Any]]) -> dict[str, Any]:
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        results: dict[str, DistillationOutput] = {}
        device, total = self.state.device, torch.zeros((), device=self.state.device)
        for task, data in batchdata.items():
            augment, number = self.augmentations[task], self.numbers[task]
            batch = distillation_batch(data, self.task_targets[task], augment, self.generator, device, number)
            with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self.amp):
                result: DistillationOutput = self.network(task, batch, self.progress, self.learns_labels_of[task])
            self._check(result, f" of '{task}'")
            (result.total / self.data_loader.per_step).backward()
            total += result.total.detach() / len(batchdata)
            results[task] = result.means()  # frees the graph
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if idist.get_world_size() > 1:
            _average([p.grad for p in self.network.parameters() if p.grad is not None])  # the same in every process
        self.optimizer.step()
        if idist.get_world_size() > 1:  # what training measures: statistics of batch norms, scales of losses
            owners = [m for m in self.network.modules() if isinstance(m, (nn.BatchNorm2d, LossGate))]
            _average([b for m in owners for b in m.buffers(recurse=False) if b.is_floating_point()])
        self.state.distillation = results
        engine.state.output = {Keys.LOSS: total}
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output


@torch.no_grad()
def _average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over all processes, in place and in one message."""
    flat = mean_over_processes(torch.cat([t.detach().flatten() for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class MultiTaskEvaluator(Evaluator):
    """Run the evaluators of all tasks; ``mean_over_tasks`` is the mean of their key metrics (higher is better)."""

    def __init__(
        self,
        device: torch.device | str,
        evaluators: Mapping[str, Evaluator],
        tasks: Mapping[str, Task],
        val_handlers: Sequence | None = None,
    ) -> None:
        self.evaluators, self.tasks = dict(evaluators), dict(tasks)
        mean = {"mean_over_tasks": Average(output_transform=lambda output: output["value"])}
        super().__init__(device, list(self.evaluators), key_val_metric=mean, val_handlers=val_handlers, decollate=False)

    def _iteration(self, engine: Engine, batchdata: str) -> dict[str, Any]:
        evaluator, task = self.evaluators[batchdata], self.tasks[batchdata]
        evaluator.run(self.state.epoch)
        found = evaluator.state.metrics
        reported = task.primary_metric if task.is_classification else f"{task.primary_metric}_mean"
        name = evaluator.state.key_metric_name or reported  # an evaluation has a case report in place of a key metric
        value = float(found[name])
        if math.isnan(value):
            needs = "it needs labelled cases of at least two classes, or with foreground; change its split"
            raise ValueError(f"The section of '{batchdata}' gives no {name}: {needs}.")
        engine.state.metrics |= {f"{batchdata}/{k}": v for k, v in found.items() if isinstance(v, (int, float))}
        return {"task": batchdata, "value": value}
