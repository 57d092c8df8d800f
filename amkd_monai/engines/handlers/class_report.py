"""Handlers for runs whose answer is one class per image: score, report, predictions, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.metrics import EpochMetric
from monai.utils import CommonKeys
from torch import Tensor, nn

from amkd_monai.cache.probes import calibration_temperature
from amkd_monai.engines.handlers.case_report import CaseReport, identify
from amkd_monai.metrics.classification import class_metrics, class_row
from amkd_monai.metrics.summary import Row, format_table, summarise_classes, write_case_csv
from amkd_monai.tasks import Task, get_task


class ClassScore(EpochMetric):
    """A metric of the task over all cases of an epoch, as an ignite metric.

    The engine's output is, after decollating and postprocessing, a list of dicts with ``pred`` (C,), probabilities,
    and ``label``, a class.

    Args:
        task: name of the task.
        metric: name of the metric; None takes the task's primary one.

    Raises:
        ValueError: no such task or metric.
    """

    def __init__(self, task: str, metric: str | None = None) -> None:
        chosen = get_task(task)
        metrics, name = class_metrics(chosen), metric or chosen.primary_metric
        if name not in metrics:
            raise ValueError(f"There is no metric '{name}' for {task}: use one of {', '.join(metrics)}.")

        def compute(pred: Tensor, label: Tensor) -> float:
            return metrics[name](label.numpy().astype(int), pred.numpy().astype(float))

        super().__init__(compute, output_transform=_stack, check_compute_fn=False)


def _stack(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C) and classes (B,) of decollated items."""
    pred = torch.stack([torch.as_tensor(item[CommonKeys.PRED]).float().cpu() for item in output])
    label = torch.stack([torch.as_tensor(item[CommonKeys.LABEL]).long().cpu().reshape(()) for item in output])
    return pred.as_subclass(Tensor), label.as_subclass(Tensor)


class ClassReport(CaseReport):
    """As :py:class:`CaseReport`, for one class per image: ``per_case.csv`` holds the class probabilities of each case.

    ``metrics.json`` holds every metric with its 95 % interval, the confusion matrix and the reliability table;
    ``engine.state.metrics`` gets ``<metric>``, ``<metric>_ci_low`` and ``<metric>_ci_high``.

    Args:
        task: name of a classification task.
        output_dir: folder of the report, made if it is missing.
        facts: what else ``metrics.json`` shall say.

    Raises:
        ValueError: no such task, or facts would overwrite a result.
    """

    def __init__(self, task: str, output_dir: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(task, output_dir, spacing_from_meta=False, facts=facts)

    def _score(self, item: Mapping[str, Any], case: str) -> list[Row]:
        return [_row(self.task, case, item, labelled=True)]

    def _summarise(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, float]]:
        summary = summarise_classes(rows, self.task)
        flat: dict[str, float] = {}
        for name, values in summary["metrics"].items():
            flat |= {name: values["value"], f"{name}_ci_low": values["ci_low"], f"{name}_ci_high": values["ci_high"]}
        return summary, flat

    def _table(self, summary: Mapping[str, Any]) -> str:
        return format_table(summary, self.task.name)

    def _describe(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        return {"task": self.task.name, "primary_metric": self.task.primary_metric, "summary": dict(summary)}


class ClassPredictions:
    """Write the class probabilities of every image to ``predictions.csv`` when the engine ends.

    Args:
        task: name of the task.
        output_dir: folder of the file.
    """

    def __init__(self, task: str, output_dir: str | Path) -> None:
        self.task, self.path = get_task(task), Path(output_dir) / "predictions.csv"
        self.rows: list[Row] = []

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator whose decollated output has ``pred`` (C,), probabilities."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item, source in zip(engine.state.output, engine.state.batch, strict=True):
            case, _ = identify({**source, **item})
            row = _row(self.task, case, item, labelled=False)
            self.rows.append({"id": row["id"], "class": self.task.classes[row["prediction"]], **row})

    def _write(self, engine: Engine) -> None:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            write_case_csv(self.path, self.rows)


class FitTemperature:
    """Calibrate a student on validation: one temperature that minimises the cross entropy (Guo et al., 2017).

    Attach to the validation evaluator, before whatever saves the student: the temperature is a buffer of the student
    and is saved with it. Validation itself runs at temperature 1, so a value never depends on an earlier epoch.

    Args:
        student: network with a buffer ``temperature``.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Register the handler."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.outputs.append(_stack(e.state.output)))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._fit)

    def _start(self, engine: Engine) -> None:
        self.outputs = []
        self.student.temperature.fill_(1.0)

    def _fit(self, engine: Engine) -> None:
        p, label = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        logits = p.clamp_min(1e-12).log()  # logits up to a constant per case
        with torch.enable_grad():
            fitted = calibration_temperature(logits, F.one_hot(label, p.shape[1]).float())
        self.student.temperature.fill_(fitted)
        engine.state.metrics["temperature"] = fitted


def _row(task: Task, case: str, item: Mapping[str, Any], labelled: bool) -> Row:
    if CommonKeys.PRED not in item or (labelled and CommonKeys.LABEL not in item):
        raise ValueError(f"Case {case}: the output of the evaluator lacks 'pred' or 'label'.")
    probabilities = np.asarray(torch.as_tensor(item[CommonKeys.PRED]).detach().cpu(), dtype=float)
    label = int(torch.as_tensor(item[CommonKeys.LABEL])) if labelled else None
    try:
        return class_row(task, case, label, probabilities)
    except ValueError as error:
        raise ValueError(f"Case {case}: {error}") from error
