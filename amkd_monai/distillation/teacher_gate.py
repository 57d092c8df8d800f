"""The teacher gate of a distiller: its mode, its options and, in two modes, its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amkd_monai.distillation import gates, losses
from amkd_monai.distillation.alignment import to_grid
from amkd_monai.distillation.gate_network import (
    GateNetwork,
    agreement_auc,
    gate_log_probabilities,
    gate_loss,
    gate_probabilities,
    with_abstention,
)
from amkd_monai.distillation.interface import Batch, TeacherSpec

OPTIONS = ("floor", "temperature", "weights", "hidden", "tasks")


@dataclass(frozen=True)
class GateReading:
    """What the gate found out about a batch.

    Attributes:
        errors: cross entropy of each teacher against the label (B, K, h, w), nats.
        entropies: entropy of each teacher's answer (B, K, h, w), nats.
        scores: of the gate network, if there is one (B, slots, h, w).
    """

    errors: Tensor
    entropies: Tensor
    scores: Tensor | None = None


class TeacherGate(nn.Module):
    """Weights (B, K, h, w) of the teachers on the gate's grid, the coarsest grid among their targets.

    Call :meth:`measure` once per batch, then :meth:`weights` per loss.

    Args:
        mode: one of ``gates.MODES``.
        teachers: the K teachers.
        prior_entropy: of the label prior, nats.
        channels: of the student map that a gate network sees.
        options: ``floor`` and ``temperature`` of the reliability; ``weights`` ({teacher: weight}) of ``fixed``;
            ``hidden`` and ``tasks`` of the gate network.

    Raises:
        ValueError: unknown mode or option, or one that the mode needs is missing.
    """

    mean_errors: Tensor

    def __init__(
        self,
        mode: str,
        teachers: Sequence[TeacherSpec],
        prior_entropy: float,
        channels: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        if mode not in gates.MODES:
            raise ValueError(f"There is no teacher gate '{mode}': use one of {', '.join(gates.MODES)}.")
        if unknown := set(options) - set(OPTIONS):
            raise ValueError(f"Unknown gate_options {sorted(unknown)}: use some of {', '.join(OPTIONS)}.")
        self.mode, self.teachers, self.prior_entropy = mode, list(teachers), prior_entropy
        self.floor, self.temperature = float(options.get("floor", 0.1)), float(options.get("temperature", 0.25))
        self.given = self._given_weights(options.get("weights") or {})
        if mode == "best_single" and self.teachers and all(t.score is None for t in self.teachers):
            raise ValueError(
                "The teacher gate 'best_single' needs scores, and no teacher gives answers: use another gate."
            )
        means = [prior_entropy if t.mean_error is None else t.mean_error for t in self.teachers]
        self.register_buffer("mean_errors", torch.tensor(means, dtype=torch.float32), persistent=False)
        self._serving: dict[tuple[bool, ...], Tensor] = {}
        self.network: GateNetwork | None = None
        if mode in gates.NETWORK_MODES and self.teachers:
            k = len(self.teachers)
            sizes = int(options.get("tasks", 1)), int(options.get("hidden", 32))
            self.network = GateNetwork(channels, k, k + (mode == "learned"), *sizes)

    def _given_weights(self, weights: Mapping[str, float]) -> list[float]:
        names = [t.name for t in self.teachers]
        if self.mode != "fixed" or not names:
            return []
        if set(weights) != set(names) or min(weights.values()) < 0 or max(weights.values()) <= 0:
            raise ValueError(
                f"The teacher gate 'fixed' needs one weight >= 0 for each of {', '.join(names)}, not all 0: give "
                "them as gate_options.weights."
            )
        return [float(weights[name]) for name in names]

    def grid(self) -> tuple[int, int]:
        """The coarsest grid (h, w) among the teachers' targets."""
        shapes = [s[1:] for t in self.teachers for s in (t.grid, t.logits) if s is not None]
        return min(s[0] for s in shapes), min(s[1] for s in shapes)

    def available(self, batch: Batch, use: Sequence[bool]) -> Tensor:
        """Whether each teacher may be used for each sample (B, K), among those that serve a loss."""
        device, served = batch.image.device, tuple(use)
        if served not in self._serving or self._serving[served].device != device:
            self._serving[served] = torch.tensor(served, device=device)
        mask = self._serving[served].expand(len(batch.image), -1)
        return mask if batch.available is None else mask & batch.available.to(mask)

    def measure(
        self,
        batch: Batch,
        answers: Mapping[str, Tensor],
        classes: int,
        features: Tensor,
        cosines: Mapping[str, Tensor],
    ) -> GateReading:
        """Look at a batch before its weights are asked for.

        Args:
            batch: the batch.
            answers: {teacher: logits (B, classes, h, w)} of those that answer.
            classes: number of classes.
            features: student map (B, C, h, w) for a gate network.
            cosines: {teacher: similarity with the student (B, h, w)} where features are compared.
        """
        errors, entropies = self._measure_answers(batch, answers, classes)
        if self.network is None:
            return GateReading(errors, entropies)
        grid, everyone = self.grid(), self._everyone(batch)
        maps = []
        for k, spec in enumerate(self.teachers):
            cosine = cosines.get(spec.name, features.new_zeros((len(features), *grid)))
            maps.append(to_grid(cosine[:, None], grid)[:, 0] * everyone[:, k, None, None])
        similar = torch.stack(maps, dim=1)
        if self.mode == "learned":
            scores = self.network(features.detach(), similar.detach(), batch.task)
        else:  # as published: one weight per image, in the graph of the losses that it weighs
            pooled = features.mean((2, 3), keepdim=True), similar.mean((2, 3), keepdim=True)
            scores = self.network(*pooled, batch.task).expand(-1, -1, *grid)
        return GateReading(errors, entropies, scores)

    def compare(self, batch: Batch, reading: GateReading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compare the gate network with the reliabilities of labelled samples (mode ``learned``, else nothing).

        Returns:
            {"gate": (labelled samples,)}, the loss that trains the network, and {"gate_auc": how well it finds the
            most reliable slot}, in every second row and column of cells.
        """
        if self.mode != "learned" or reading.scores is None:
            return {}, {}
        everyone = batch.labelled(self._everyone(batch))
        errors, scores = gates.box_smooth(batch.labelled(reading.errors)), batch.labelled(reading.scores)
        target = with_abstention(gates.reliability(errors, self.prior_entropy, everyone, self.temperature))
        predicted = gate_log_probabilities(scores, everyone)
        auc = agreement_auc(target[..., ::2, ::2], predicted[..., ::2, ::2])
        return {"gate": gate_loss(target, predicted)}, {"gate_auc": auc}

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """Weights (B, K, h, w) over the teachers that are available (B, K); with gradient in mode ``paper`` only."""
        if reading.scores is None:
            return gates.teacher_weights(
                self.mode,
                reading.errors,
                available,
                self.prior_entropy,
                self.floor,
                self.temperature,
                reading.entropies,
                self.given,
                [t.score for t in self.teachers],
            )
        chosen = gate_probabilities(reading.scores, available)
        if self.mode == "paper":
            return chosen
        return gates.with_floor(chosen[:, :-1], available, self.floor).detach()

    def _everyone(self, batch: Batch) -> Tensor:
        return self.available(batch, [True] * len(self.teachers))

    @torch.no_grad()
    def _measure_answers(self, batch: Batch, answers: Mapping[str, Tensor], classes: int) -> tuple[Tensor, Tensor]:
        """Cross entropy against the label, and entropy, of each teacher's answer at the gate's grid (B, K, h, w), nats.

        Without a label a teacher's mean error over the labelled training samples stands in; a teacher that gives no
        answers counts as one that knows nothing.
        """
        grid, names, label = self.grid(), [t.name for t in self.teachers], batch.label_map
        known = label if batch.rows is None else label * batch.known[:, None, None, None]
        errors = list(self.mean_errors[None, :, None, None].repeat(len(label), 1, *grid).unbind(1))
        entropies = [torch.full_like(error, self.prior_entropy) for error in errors]
        for size, group in losses.by_size(answers).items():
            log_probabilities = torch.stack(list(group.values())).float().log_softmax(2)  # (teachers, B, classes, h, w)
            areas = losses.class_areas(known, classes, size)
            measured = losses.area_logits(losses.soft_cross_entropy(areas, log_probabilities), grid)
            own = torch.full_like(measured, self.prior_entropy)
            if self.mode == "entropy":
                own = losses.area_logits(losses.soft_cross_entropy(log_probabilities.exp(), log_probabilities), grid)
            for name, error, entropy in zip(group, measured, own, strict=True):
                k = names.index(name)
                errors[k], entropies[k] = torch.where(batch.known[:, None, None], error, errors[k]), entropy
        return torch.stack(errors, 1), torch.stack(entropies, 1)
