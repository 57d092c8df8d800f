"""The distillers of several tasks around one shared student; what teaches it is shared where it can be."""

from __future__ import annotations

from collections.abc import Mapping

import ignite.distributed as idist
from torch import Tensor, nn

from amkd_monai.distillation.distiller import Distiller
from amkd_monai.distillation.interface import Batch, DistillationOutput
from amkd_monai.distillation.loss_gate import ScaledLossGate


class MultiTaskDistiller(nn.Module):
    """One distiller per task, each over its view of the same student.

    Projections and codes of equally named teachers of one shape, and the gate networks of equal lists of teachers, are
    one module for all tasks, so that what is learned about a teacher on one data set serves the others.

    Args:
        distillers: {task: distiller}, their students views of one shared student.
        scale_steps: steps of a task over which its loss scale is measured before it freezes.
        freeze_norms: batch norms use and keep their running statistics once ``warm`` is set (``shared_frozen``).
    """

    def __init__(self, distillers: Mapping[str, Distiller], scale_steps: int = 100, freeze_norms: bool = True) -> None:
        super().__init__()
        self.distillers = nn.ModuleDict(distillers)
        self.scales = nn.ModuleDict({task: ScaledLossGate({"task": 1.0}, scale_steps) for task in distillers})
        self.freeze_norms, self.warm = freeze_norms, False
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

    def train(self, mode: bool = True) -> MultiTaskDistiller:
        """Switch to training; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if mode and self.freeze_norms and self.warm:
            for module in (m for d in self.distillers.values() for m in d.student.modules()):
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, task: str, batch: Batch, progress: float = 0.0, learns_labels: bool = True) -> DistillationOutput:
        """Compute all losses of one task's micro-batch; the total is divided by the scale of the task's own loss.

        The scale is the median over the first steps, then frozen: tasks weigh alike whatever their losses' sizes, and
        none gains weight by being easy.
        """
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
