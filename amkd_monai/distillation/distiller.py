"""The distiller: a student, its projections and its teachers' targets; one forward gives every loss by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from amkd_monai.distillation import gates, losses
from amkd_monai.distillation.alignment import Alignment
from amkd_monai.distillation.loss_gate import ScaledLossGate
from amkd_monai.distillation.schedules import distillation_strength, kd_temperature
from amkd_monai.distillation.standardise import MeanStdStandardiser

logger = logging.getLogger("amkd_monai")

DEFAULT_LOSSES = {"output": 1.0, "feature": 0.2}
STUDENT_STRIDES = (8, 16)
"""Student levels that are aligned with a teacher (two, summed)."""


@dataclass(frozen=True)
class TeacherSpec:
    """What the distiller must know of a teacher before it sees its targets.

    Attributes:
        name: key of its targets in a batch.
        grid: (C, h, w) of its feature map, None if it gives none.
        mean, std: (C,) of its features over the training split.
        logits: (classes, h, w) of its own answer or its probe's, None if it has neither.
        admitted: whether its answers are distilled (they beat the undistilled student); features always are.
        mean_error: mean cross entropy of its answers over the labelled training samples, nats; used without a label.
    """

    name: str
    grid: tuple[int, int, int] | None
    mean: Tensor | None
    std: Tensor | None
    logits: tuple[int, int, int] | None
    admitted: bool
    mean_error: float | None


@dataclass
class DistillationOutput:
    """What a forward of the distiller gives.

    Attributes:
        total: the loss to minimise, a scalar.
        losses: {name: (B,)}; ``task`` is (number of labelled samples,).
        loss_weights: {name: factor} by which each loss entered the total.
        teacher_weights: {loss: (B, K)} mean weight of each teacher per sample.
        logits: student logits (B, C, H, W).
    """

    total: Tensor
    losses: dict[str, Tensor]
    loss_weights: dict[str, float]
    teacher_weights: dict[str, Tensor]
    logits: Tensor


@dataclass
class Batch:
    """Input of the distiller.

    Attributes:
        image: (B, 3, H, W) in [0, 1].
        label: class indices (B, 1, H, W); rows without a label may hold anything.
        has_label: boolean (B,).
        teachers: {name: {"grid": (B, C, h, w), "logits": (B, classes, h', w')}}.
    """

    image: Tensor
    label: Tensor
    has_label: Tensor
    teachers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Distiller(nn.Module):
    """Student + projections + gates; teachers themselves are never in here, only what they said.

    Without teachers it is plain supervised training of the student, on the same code path.

    Args:
        student: network with ``encode``, ``decode``, ``channels_at`` and ``strides``.
        teachers: what each teacher offers.
        prior_entropy: entropy of the label prior of the training split, nats.
        gate: ``reliability`` or ``uniform``.
        gate_options: ``floor`` and ``temperature`` of the gate.
        loss_priors: relative importance of ``output`` and ``feature``; 0 switches one off.
        scale_steps: steps over which loss scales are measured before they freeze.
        temperature: ``start``, ``end`` and ``shape`` of the KD temperature.
        strength: ``warmup``, ``decay`` and ``end`` of beta(t).
        batch_dice: pool the task's soft Dice over the batch (slices of volumes).

    Raises:
        ValueError: unknown gate or loss, or no teacher can give any of the losses asked for.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[TeacherSpec] = (),
        prior_entropy: float = 0.69,
        gate: str = "reliability",
        gate_options: Mapping[str, float] | None = None,
        loss_priors: Mapping[str, float] | None = None,
        scale_steps: int = 100,
        temperature: Mapping[str, Any] | None = None,
        strength: Mapping[str, float] | None = None,
        batch_dice: bool = False,
    ) -> None:
        super().__init__()
        if gate not in gates.MODES:
            raise ValueError(f"There is no teacher gate '{gate}': use one of {', '.join(gates.MODES)}.")
        priors = dict(DEFAULT_LOSSES if loss_priors is None else loss_priors)
        if unknown := set(priors) - set(DEFAULT_LOSSES):
            raise ValueError(f"Unknown losses {sorted(unknown)}: use some of {', '.join(DEFAULT_LOSSES)}.")
        self.student = student
        self.teachers = list(teachers)
        self.prior_entropy, self.gate, self.batch_dice = prior_entropy, gate, batch_dice
        self.gate_options = dict(gate_options or {})
        self.temperature, self.strength = dict(temperature or {}), dict(strength or {})
        kd_temperature(0.0, **self.temperature)  # a wrong schedule fails here, not in the first step
        distillation_strength(0.0, **self.strength)
        feature_teachers = [t for t in self.teachers if t.grid is not None]
        output_teachers = [t for t in self.teachers if t.admitted]
        offered = {"feature": bool(feature_teachers), "output": bool(output_teachers)}
        self.loss_priors = {name: p if offered[name] else 0.0 for name, p in priors.items()} if self.teachers else {}
        if self.teachers and not any(self.loss_priors.values()):
            raise ValueError(
                "No teacher offers what the losses ask for (features or admitted answers): change `losses`, the "
                "teachers, or use none."
            )
        for name in self.loss_priors:
            if priors[name] and not offered[name]:
                logger.warning("No teacher offers what the loss '%s' asks for: it takes no part in this run.", name)
        self.align, self.standardise = nn.ModuleDict(), nn.ModuleDict()
        if self.loss_priors.get("feature"):
            channels = {stride: student.channels_at(stride) for stride in STUDENT_STRIDES}
            for spec in feature_teachers:
                assert spec.grid is not None and spec.mean is not None and spec.std is not None
                self.align[spec.name] = Alignment(channels, spec.grid[0])
                self.standardise[spec.name] = MeanStdStandardiser(spec.mean, spec.std)
        self.loss_gate = ScaledLossGate(self.loss_priors, scale_steps)

    def distillation_state(self) -> dict[str, Tensor]:
        """Return all state but the student's: projections, standardisers, loss scales."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("student.")}

    def forward(self, batch: Batch, progress: float = 0.0) -> DistillationOutput:
        """Compute all losses of a batch at ``progress`` in [0, 1] of the run.

        Raises:
            ValueError: the batch holds no labelled sample, or the targets of a teacher are missing.
        """
        if not bool(batch.has_label.any()):
            raise ValueError("The batch holds no labelled sample: the task loss needs at least one.")
        size = [int(batch.image.shape[-2]), int(batch.image.shape[-1])]
        levels = self.student.encode(batch.image)
        logits = self.student.decode(levels, size)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            rows = batch.has_label
            named = {"task": losses.segmentation_task_loss(logits[rows], batch.label[rows], self.batch_dice)}
            weights: dict[str, Tensor] = {}
            if self.teachers:
                maps = [level.float() for level in levels]  # autocast gave them half precision
                features = dict(zip(self.student.strides, maps, strict=True))
                errors = self._errors(batch, logits.shape[1])
                if self.loss_priors.get("output"):
                    named["output"], weights["output"] = self._output(batch, logits, errors, progress)
                if self.loss_priors.get("feature"):
                    named["feature"], weights["feature"] = self._feature(batch, features, errors)
                if self.training:
                    self.loss_gate.observe(named)
            factors = self.loss_gate.weights(distillation_strength(progress, **self.strength))
            total = torch.stack([factors[name] * loss.mean() for name, loss in named.items()]).sum()
        return DistillationOutput(total, named, factors, weights, logits)

    def _targets(self, batch: Batch, name: str, kind: str) -> Tensor:
        try:
            return batch.teachers[name][kind]
        except KeyError:
            raise ValueError(
                f"The batch holds no {kind} targets of the teacher '{name}': rebuild the teacher cache."
            ) from None

    def _gate_grid(self) -> tuple[int, int]:
        shapes = [s[1:] for t in self.teachers for s in (t.grid, t.logits) if s is not None]
        return min(s[0] for s in shapes), min(s[1] for s in shapes)

    @torch.no_grad()
    def _errors(self, batch: Batch, classes: int) -> Tensor:
        """Cross entropy of each teacher against the label at the gate's grid (B, K, h, w), nats.

        Without a label a teacher's mean error over the labelled training samples stands in; a teacher that gives no
        answers counts as one that knows nothing.
        """
        grid = self._gate_grid()
        known = torch.where(batch.has_label[:, None, None, None], batch.label, torch.zeros_like(batch.label))
        columns = []
        for spec in self.teachers:
            fallback = self.prior_entropy if spec.mean_error is None else spec.mean_error
            error = torch.full((len(batch.image), *grid), fallback, device=batch.image.device)
            if spec.logits is not None:
                answers = self._targets(batch, spec.name, "logits").float()
                target = losses.one_hot_area(known, classes, (answers.shape[-2], answers.shape[-1]))
                measured = losses.soft_cross_entropy(target, answers.log_softmax(1))
                measured = losses.area_logits(measured[:, None], grid)[:, 0]
                error = torch.where(batch.has_label[:, None, None], measured, error)
            columns.append(error)
        return torch.stack(columns, dim=1)

    def _weights(self, errors: Tensor, use: list[bool]) -> Tensor:
        available = torch.tensor(use, device=errors.device).expand(len(errors), -1)
        return gates.teacher_weights(self.gate, errors, available, self.prior_entropy, **self.gate_options)

    def _output(self, batch: Batch, logits: Tensor, errors: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        weights = self._weights(errors, [t.admitted for t in self.teachers])
        temperature = kd_temperature(progress, **self.temperature)
        total = logits.new_zeros(len(logits))
        for k, spec in enumerate(self.teachers):
            if spec.admitted:
                answers = self._targets(batch, spec.name, "logits")
                size = (answers.shape[-2], answers.shape[-1])
                loss = losses.output_loss(losses.area_logits(logits, size), answers, temperature)
                total = total + (_to_size(weights[:, k], size) * loss).flatten(1).mean(1)
        return total, weights.flatten(2).mean(2)

    def _feature(self, batch: Batch, features: Mapping[int, Tensor], errors: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._weights(errors, [t.grid is not None for t in self.teachers])
        total = batch.image.new_zeros(len(batch.image))
        for k, spec in enumerate(self.teachers):
            if spec.grid is not None:
                target = self.standardise[spec.name](self._targets(batch, spec.name, "grid"))
                size = (target.shape[-2], target.shape[-1])
                loss = losses.feature_loss(self.align[spec.name](features, size), target)
                total = total + (_to_size(weights[:, k], size) * loss).flatten(1).mean(1)
        return total, weights.flatten(2).mean(2)


def _to_size(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread gate weights (B, h, w) over a finer grid (B, H, W), nearest cell."""
    if tuple(weights.shape[-2:]) == size:
        return weights
    return nn.functional.interpolate(weights[:, None], size=size, mode="nearest")[:, 0]
