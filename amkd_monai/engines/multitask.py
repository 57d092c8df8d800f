"""A shared student: its distillers, training and evaluation; a step takes a micro-batch from each of several tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Average
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn

from amkd_monai.data.augment import Augmentation
from amkd_monai.data.datasets import Task
from amkd_monai.data.sampling import MultiTaskLoader
from amkd_monai.distillation import Batch, Distiller
from amkd_monai.distillation.gates import LossGate, ScaledLossGate
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.engines.trainer import DistillationTrainer, TeacherTargets, distillation_batch


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
    """The mean of a tensor over all processes, the tensor itself where there is one."""
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
            result.total, result.logits = result.total.detach(), result.logits[:0].detach()  # frees the graph
            result.losses = {name: loss.detach() for name, loss in result.losses.items()}
            results[task] = result
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
    """Run the evaluators of all tasks, each over its view of the student, one after another.

    ``state.metrics`` gets ``mean_over_tasks``, the mean of the tasks' key metrics (higher is better), and every task's
    own metrics as ``<task>/<metric>``.
    """

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
