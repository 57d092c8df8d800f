"""The trainer of a shared student: each step takes one micro-batch from each of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn

from amkd_monai.data.augment import Augmentation
from amkd_monai.data.sampling import MultiTaskLoader
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.distillation.loss_gate import LossGate
from amkd_monai.distillation.multitask import MultiTaskDistiller, mean_over_processes
from amkd_monai.engines.targets import TeacherTargets
from amkd_monai.engines.trainer import DistillationTrainer, distillation_batch


class MultiTaskTrainer(DistillationTrainer):
    """Train one student on several tasks; memory is that of one micro-batch.

    The gradients of a step's micro-batches are summed, each task's loss on its own scale, then there is one step of
    the optimiser. Under torch.distributed gradients, running statistics and loss scales are averaged over the
    processes once per step.

    Args:
        device: where to train.
        max_epochs: length of the run.
        train_data_loader: steps of several tasks.
        network: the distiller of all tasks.
        optimizer: over the distiller's parameters.
        targets: {task: teachers' targets}.
        augmentations: {task: random changes}.
        numbers: {task: number} for the gate's task embedding.
        norm_warmup_steps: steps after which shared batch norms keep their running statistics.
        seed: seed of the run.
        amp: bfloat16 autocast of the student's forward (GPU).
        train_handlers: as in MONAI.
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
        norm_warmup_steps: int = 100,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
    ) -> None:
        self.task_targets = {task: t if len(t) else None for task, t in targets.items()}
        self.augmentations, self.numbers = dict(augmentations), dict(numbers)
        self.norm_warmup_steps = norm_warmup_steps
        super().__init__(
            device, max_epochs, train_data_loader, network, optimizer, seed=seed, amp=amp, train_handlers=train_handlers
        )

    def _start_epoch(self) -> None:
        self.data_loader.set_epoch(self.state.epoch)
        self._seed_epoch(dist.get_rank() if dist.is_available() and dist.is_initialized() else 0)

    def teachers_of(self, task: str) -> list[str]:
        """Names of the teachers of a task, in the order of their weights."""
        targets = self.task_targets[task]
        return [] if targets is None else [teacher.name for teacher in targets.teachers]

    def _iteration(self, engine: Engine, batchdata: dict[str, dict[str, Any]]) -> dict[str, Any]:
        self.network.warm = self.state.iteration > self.norm_warmup_steps
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        results: dict[str, DistillationOutput] = {}
        total = torch.zeros((), device=self.state.device)
        for task, data in batchdata.items():
            result = self._micro_batch(task, data)
            total += result.total.detach() / len(batchdata)
            result.total, result.logits = result.total.detach(), result.logits[:0].detach()  # frees the graph
            result.losses = {name: loss.detach() for name, loss in result.losses.items()}
            results[task] = result
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        average_gradients(self.network)
        self.optimizer.step()
        average_statistics(self.network)
        self.state.distillation = results
        engine.state.output = {Keys.LOSS: total}
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _micro_batch(self, task: str, data: dict[str, Any]) -> DistillationOutput:
        """Forward and backward of one task's part of the step."""
        device, generator = self.state.device, self.generator
        augment, number = self.augmentations[task], self.numbers[task]
        batch = distillation_batch(data, self.task_targets[task], augment, generator, device, number)
        with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self.amp):
            result: DistillationOutput = self.network(task, batch, progress=self.progress)
        self._check(result, f" of '{task}'")
        (result.total / self.data_loader.per_step).backward()
        return result


def average_gradients(module: nn.Module) -> None:
    """Average the gradients over all processes; every process has them for the same parameters."""
    if dist.is_available() and dist.is_initialized():
        _average([p.grad for p in module.parameters() if p.grad is not None])


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Average what training measures: the running statistics of batch norms and the scales of losses."""
    if dist.is_available() and dist.is_initialized():
        owners = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, LossGate))]
        _average([b for m in owners for b in m.buffers(recurse=False) if b.is_floating_point()])


def _average(tensors: Sequence[Tensor]) -> None:
    flat = mean_over_processes(torch.cat([t.detach().flatten() for t in tensors]))
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
