"""Teacher weights: how much each teacher is trusted per sample and location.

Reliability is grounded in labels, so a teacher can't win by being easy to imitate. An abstain slot takes the weight
where every teacher is worse than the label prior; a floor keeps every available teacher alive. The learned gate
predicts reliability from the student's features, so that it needs no label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation import losses
from amkd_monai.distillation.alignment import ChannelNorm, pool_finer, to_grid
from amkd_monai.distillation.interface import Batch, TeacherSpec, mode_class

TASK_EMBEDDING = 8
UNUSABLE = -1e9
"""Score in place of minus infinity: a row without any teacher gives no NaN, nor does its gradient."""


def box_smooth(errors: Tensor) -> Tensor:
    """Average errors (B, K, h, w) over 3x3 cells, so that a noisy label cell doesn't decide alone."""
    return F.avg_pool2d(errors, 3, stride=1, padding=1, count_include_pad=False)


def reliability(errors: Tensor, prior_entropy: float, available: Tensor, temperature: float = 0.25) -> Tensor:
    """Softmax of negative errors over the teachers and an abstain slot.

    Args:
        errors: cross entropy of each teacher against the label (B, K, h, w), nats.
        prior_entropy: entropy of the label prior, nats: the error of a teacher that knows nothing.
        available: 1 where a teacher may be used (B, K).
        temperature: of the softmax.

    Returns:
        (B, K, h, w), >= 0, 0 where not available; the sum over K is below 1, the rest is abstention.
    """
    mask = available[:, :, None, None].to(errors)
    scores = torch.where(mask > 0, -errors.float() / temperature, torch.full_like(errors, -torch.inf))
    abstain = torch.full_like(scores[:, :1], -prior_entropy / temperature)
    return torch.softmax(torch.cat([scores, abstain], dim=1), dim=1)[:, :-1]


def uniform(errors: Tensor, available: Tensor) -> Tensor:
    """Equal weights (B, K, h, w) over the available teachers (B, K); zeros where there is none."""
    mask = available[:, :, None, None].to(errors).expand_as(errors)
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def with_floor(weights: Tensor, available: Tensor, floor: float) -> Tensor:
    """(1 - floor) w + floor / n for the n available teachers; weights (B, K, h, w), available (B, K)."""
    return (1 - floor) * weights + floor * uniform(weights, available)


def to_size(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring gate weights (B, h, w) to another grid (B, H, W): nearest cell where finer, the mean for a single cell."""
    if tuple(weights.shape[-2:]) == size:
        return weights
    if size == (1, 1):
        return weights.mean((1, 2), keepdim=True)
    return F.interpolate(weights[:, None], size=size, mode="nearest")[:, 0]


class GateNetwork(nn.Module):
    """A multi-layer perceptron, per cell, over features, student-teacher similarity and the task.

    Input per location: normalised student features, their mean over the image, the cosine between the aligned student
    feature and each teacher's target, and an embedding of the data set. Output: one score per slot, plus a bias per
    data set and slot.

    Args:
        channels: of the student map.
        teachers: number K of teachers.
        slots: K, or K + 1 with a slot for abstention (the last one).
        tasks: number of data sets.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: int, teachers: int, slots: int, tasks: int = 1, hidden: int = 32) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.task = nn.Embedding(tasks, TASK_EMBEDDING)
        self.bias = nn.Parameter(torch.zeros(tasks, slots))
        last = nn.Linear(hidden, slots)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # every slot starts alike
        self.layers = nn.Sequential(nn.Linear(2 * channels + teachers + TASK_EMBEDDING, hidden), nn.GELU(), last)

    def forward(self, features: Tensor, cosines: Tensor, task: int = 0) -> Tensor:
        """Return scores (B, slots, h, w).

        Args:
            features: student map (B, C, h', w'), brought to the grid of ``cosines``.
            cosines: similarity of student and teachers (B, K, h, w), 0 where there is none.
            task: number of the data set.

        Raises:
            ValueError: there is no such data set.
        """
        if not 0 <= task < len(self.bias):
            raise ValueError(
                f"The gate knows {len(self.bias)} tasks, not task {task}: raise `tasks` in `gate_options`."
            )
        grid = (cosines.shape[-2], cosines.shape[-1])
        local = self.norm(pool_finer(features, grid)).movedim(1, -1)  # channels last from here on
        whole, embedding = local.mean((1, 2)), self.task.weight[task]
        first, *others = self.layers
        # what is the same in all cells is projected once per image, the features at the student's own size
        parts = first.weight.split([local.shape[-1], whole.shape[-1], cosines.shape[1], len(embedding)], dim=1)
        by_cell = to_grid(F.linear(local, parts[0]).movedim(-1, 1), grid).movedim(1, -1)
        by_image = F.linear(whole, parts[1], first.bias) + F.linear(embedding, parts[3])  # (B, hidden)
        hidden = by_cell + F.linear(cosines.movedim(1, -1), parts[2]) + by_image[:, None, None]
        for layer in others:
            hidden = layer(hidden)
        return (hidden + self.bias[task]).movedim(-1, 1)


def gate_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """Softmax over the slots that may be used.

    Args:
        scores: (B, K or K + 1, h, w); a slot beyond the K teachers is the abstention and always there.
        available: boolean (B, K).

    Returns:
        Like ``scores``; 0 where not available, all 0 where nothing is.
    """
    mask = _usable(scores, available)
    return torch.softmax(torch.where(mask, scores, UNUSABLE), dim=1) * mask


def gate_log_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """Logarithm of the softmax over the slots that may be used and the abstention.

    Args:
        scores: (B, K + 1, h, w).
        available: boolean (B, K).

    Returns:
        Like ``scores``; finite and very low, probability 0, where not available.
    """
    return torch.log_softmax(torch.where(_usable(scores, available), scores, UNUSABLE), dim=1)


def _usable(scores: Tensor, available: Tensor) -> Tensor:
    slots = available.bool()
    if scores.shape[1] > slots.shape[1]:
        slots = torch.cat([slots, torch.ones_like(slots[:, :1])], dim=1)
    return slots[:, :, None, None]


def with_abstention(trusted: Tensor) -> Tensor:
    """Append what reliabilities (B, K, h, w) leave to 1: (B, K + 1, h, w)."""
    return torch.cat([trusted, (1 - trusted.sum(1, keepdim=True)).clamp_min(0)], dim=1)


def gate_loss(target: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(sg(r) || g) over the teachers and the abstention, per sample.

    Args:
        target: reliabilities r and what they leave (B, K + 1, h, w); no gradient flows into them.
        log_predicted: log g (B, K + 1, h, w).

    Returns:
        (B,) in nats, zero where both agree.
    """
    return F.kl_div(log_predicted, target.detach(), reduction="none").sum(1).flatten(1).mean(1)


def agreement_auc(target: Tensor, predicted: Tensor) -> Tensor:
    """How well g finds the slot that the labels trust most: area under the ROC curve over cells and slots.

    Args:
        target: reliabilities r and what they leave (B, K + 1, h, w).
        predicted: g or log g (B, K + 1, h, w).

    Returns:
        A scalar in [0, 1], 0.5 for a gate that knows nothing; equal values of g count half.
    """
    score = predicted.detach()
    ordered, right = score.flatten().sort().values, score.gather(1, target.argmax(1, keepdim=True)).flatten()
    below = torch.searchsorted(ordered, right), torch.searchsorted(ordered, right, right=True)
    rank = (below[0] + below[1] + 1).double() / 2  # the mean rank of equal values
    positives = len(right)
    pairs = positives * (score.numel() - positives)
    return (rank.sum() - positives * (positives + 1) / 2) / max(1, pairs)


@dataclass(frozen=True)
class GateSetup:
    """What every gate is told: the K teachers, the entropy of the label prior (nats), sizes.

    Attributes:
        channels: of the student map that a gate may look at.
        tasks: number of data sets that share the gate.
    """

    teachers: Sequence[TeacherSpec]
    prior_entropy: float
    channels: int
    tasks: int = 1


@dataclass(frozen=True)
class GateReading:
    """What a gate measured on a batch.

    Attributes:
        errors: cross entropy of each teacher against the label (B, K, h, w), nats.
        scores: what else the gate needs (B, K or more, h, w): of the learned gate the network's scores.
    """

    errors: Tensor
    scores: Tensor | None = None


class TeacherGate(nn.Module):
    """Weights (B, K, h, w) of the teachers on the gate's grid, the coarsest grid among their targets.

    Call :meth:`measure` once per batch, then :meth:`weights` per loss. A gate of your own derives from this class; its
    dotted path is the mode, and what its constructor takes after ``setup`` are its options.

    Args:
        setup: what every gate is told.

    Attributes:
        looks: whether the gate looks at the student: its features, and how similar they are to each teacher's.
    """

    mean_errors: Tensor
    looks = False

    def __init__(self, setup: GateSetup) -> None:
        super().__init__()
        self.teachers, self.prior_entropy = list(setup.teachers), setup.prior_entropy
        means = [setup.prior_entropy if t.mean_error is None else t.mean_error for t in self.teachers]
        self.register_buffer("mean_errors", torch.tensor(means, dtype=torch.float32), persistent=False)
        self._serving: dict[tuple[bool, ...], Tensor] = {}
        self.network: GateNetwork | None = None

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

    def everyone(self, batch: Batch) -> Tensor:
        """Whether each teacher says something about each sample (B, K)."""
        return self.available(batch, [True] * len(self.teachers))

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
            features: student map (B, C, h, w).
            cosines: {teacher: similarity with the student (B, h, w)} where features are compared, if the gate looks.
        """
        similar = self._similarities(batch, features, cosines) if self.looks else None
        return GateReading(self._errors(batch, answers, classes), self._scores(batch, answers, features, similar))

    def compare(self, batch: Batch, reading: GateReading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses that train the gate, {name: (labelled samples,)}, and figures on how good it is, {name: scalar}."""
        return {}, {}

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """Weights (B, K, h, w) over the teachers that are available (B, K); 0 for the others."""
        return self._weigh(reading, available)

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        raise NotImplementedError

    def _scores(
        self, batch: Batch, answers: Mapping[str, Tensor], features: Tensor, similar: Tensor | None
    ) -> Tensor | None:
        """What the gate needs beside the errors; ``similar`` (B, K, h, w) is there if it looks at the student."""
        return None

    @torch.no_grad()
    def _errors(self, batch: Batch, answers: Mapping[str, Tensor], classes: int) -> Tensor:
        """Cross entropy of each teacher's answer against the label at the gate's grid (B, K, h, w), nats.

        Without a label a teacher's mean error over the labelled training samples stands in; a teacher that gives no
        answers counts as one that knows nothing.
        """
        grid, names, label = self.grid(), [t.name for t in self.teachers], batch.label_map
        known = label if batch.rows is None else label * batch.known[:, None, None, None]
        errors = list(self.mean_errors[None, :, None, None].repeat(len(label), 1, *grid).unbind(1))
        for size, group in losses.by_size(answers).items():
            log_probabilities = torch.stack(list(group.values())).float().log_softmax(2)  # (teachers, B, classes, h, w)
            areas = losses.class_areas(known, classes, size)
            measured = losses.area_logits(losses.soft_cross_entropy(areas, log_probabilities), grid)
            for name, error in zip(group, measured, strict=True):
                k = names.index(name)
                errors[k] = torch.where(batch.known[:, None, None], error, errors[k])
        return torch.stack(errors, 1)

    def _similarities(self, batch: Batch, features: Tensor, cosines: Mapping[str, Tensor]) -> Tensor:
        """Similarity of student and teachers on the gate's grid (B, K, h, w), 0 where there is none."""
        grid, everyone, maps = self.grid(), self.everyone(batch), []
        for k, spec in enumerate(self.teachers):
            cosine = cosines.get(spec.name, features.new_zeros((len(features), *grid)))
            maps.append(to_grid(cosine[:, None], grid)[:, 0] * everyone[:, k, None, None])
        return torch.stack(maps, dim=1)


class ReliabilityGate(TeacherGate):
    """Softmax of negative errors against the label, with abstention, and a floor; its weights have no gradient.

    Args:
        setup: what every gate is told.
        floor: part spread evenly over the available teachers, so that none is ever switched off.
        temperature: of the softmax.
    """

    def __init__(self, setup: GateSetup, floor: float = 0.1, temperature: float = 0.25) -> None:
        super().__init__(setup)
        self.floor, self.temperature = float(floor), float(temperature)

    def trusted(self, errors: Tensor, available: Tensor) -> Tensor:
        """Reliabilities (B, K, h, w) from errors (B, K, h, w) of the available teachers (B, K)."""
        return reliability(box_smooth(errors), self.prior_entropy, available, self.temperature)

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        return with_floor(self.trusted(reading.errors, available), available, self.floor).detach()


class LearnedGate(ReliabilityGate):
    """Reliability as a network predicts it from the student, trained on labelled samples by a loss of its own.

    Args:
        setup: what every gate is told.
        floor: as for :class:`ReliabilityGate`.
        temperature: as for :class:`ReliabilityGate`.
        hidden: width of the network's hidden layer.
    """

    looks = True

    def __init__(self, setup: GateSetup, floor: float = 0.1, temperature: float = 0.25, hidden: int = 32) -> None:
        super().__init__(setup, floor, temperature)
        if k := len(self.teachers):
            self.network = GateNetwork(setup.channels, k, k + 1, setup.tasks, int(hidden))

    def _scores(
        self, batch: Batch, answers: Mapping[str, Tensor], features: Tensor, similar: Tensor | None
    ) -> Tensor | None:
        assert self.network is not None and similar is not None
        scores: Tensor = self.network(features.detach(), similar.detach(), batch.task)
        return scores

    def compare(self, batch: Batch, reading: GateReading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compare the network with the reliabilities of labelled samples.

        Returns:
            {"gate": (labelled samples,)}, the loss that trains the network, and {"gate_auc": how well it finds the
            most reliable slot}, in every second row and column of cells.
        """
        assert reading.scores is not None
        everyone = batch.labelled(self.everyone(batch))
        target = with_abstention(self.trusted(batch.labelled(reading.errors), everyone))
        predicted = gate_log_probabilities(batch.labelled(reading.scores), everyone)
        auc = agreement_auc(target[..., ::2, ::2], predicted[..., ::2, ::2])
        return {"gate": gate_loss(target, predicted)}, {"gate_auc": auc}

    def _weigh(self, reading: GateReading, available: Tensor) -> Tensor:
        assert reading.scores is not None
        chosen = gate_probabilities(reading.scores, available)
        return with_floor(chosen[:, :-1], available, self.floor).detach()


GATES: dict[str, type[TeacherGate]] = {"learned": LearnedGate, "reliability": ReliabilityGate}


def make_gate(mode: str, setup: GateSetup, options: Mapping[str, Any] | None = None) -> TeacherGate:
    """Return a teacher gate.

    Args:
        mode: one of :data:`GATES`, of :data:`amkd_monai.distillation.baselines.GATES`, or the dotted path of a class.
        setup: what every gate is told.
        options: what the gate's class takes; ``tasks`` replaces that of the setup.

    Raises:
        ValueError: unknown mode or option, or one that the gate needs is missing.
    """
    from amkd_monai.distillation import baselines

    options = dict(options or {})
    setup = replace(setup, tasks=int(options.pop("tasks", setup.tasks)))
    known = {**GATES, **baselines.GATES}
    gate: TeacherGate = mode_class("teacher gate", mode, known, TeacherGate, (setup,), options)(setup, **options)
    return gate
