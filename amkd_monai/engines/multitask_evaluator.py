"""The evaluator of a shared student: every task's own evaluator, and the mean of their primary metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Average
from monai.engines import Evaluator

from amkd_monai.data.datasets import Task

MEAN = "mean_over_tasks"


class MultiTaskEvaluator(Evaluator):
    """Run the evaluators of all tasks, one after another.

    ``state.metrics`` gets ``mean_over_tasks``, the key metric (higher is better), and every task's own metrics as
    ``<task>/<metric>``.

    Args:
        device: of the student.
        evaluators: {task: evaluator over its view of the student}.
        tasks: {task: what is asked}.
        val_handlers: as in MONAI.
    """

    def __init__(
        self,
        device: torch.device | str,
        evaluators: Mapping[str, Evaluator],
        tasks: Mapping[str, Task],
        val_handlers: Sequence | None = None,
    ) -> None:
        self.evaluators, self.tasks = dict(evaluators), dict(tasks)
        super().__init__(
            device,
            list(self.evaluators),
            key_val_metric={MEAN: Average(output_transform=lambda output: output["value"])},
            val_handlers=val_handlers,
            decollate=False,
        )

    def _iteration(self, engine: Engine, batchdata: str) -> dict[str, Any]:
        evaluator, task = self.evaluators[batchdata], self.tasks[batchdata]
        evaluator.run(self.state.epoch)
        found = evaluator.state.metrics
        name = evaluator.state.key_metric_name or _reported(task)
        value = float(found[name])
        if math.isnan(value):
            raise ValueError(
                f"The section of '{batchdata}' gives no {name}: it needs labelled cases of at least two classes, or "
                "with foreground; change its split."
            )
        engine.state.metrics |= {f"{batchdata}/{k}": v for k, v in found.items() if isinstance(v, (int, float))}
        return {"task": batchdata, "value": value}


def _reported(task: Task) -> str:
    """The primary metric's name in a case report."""
    return task.primary_metric if task.is_classification else f"{task.primary_metric}_mean"
