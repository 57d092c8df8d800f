"""Gates: the weight of each teacher per sample and location, and of each distillation loss.

Reliability is grounded in labels, so a teacher can't win by being easy to imitate. An abstain slot takes the weight
where every teacher is worse than the label prior; a floor keeps every available teacher alive.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from amkd_monai.distillation import losses
from amkd_monai.distillation.interface import INTERVAL, Batch, Counter, TeacherTarget
from amkd_monai.distillation.losses import pool_finer, to_grid
from amkd_monai.errors import check_number

logger = logging.getLogger("amkd_monai")

TASK_EMBEDDING = 8
UNUSABLE = -1e9  # score in place of minus infinity: a row without any teacher gives no NaN, nor does its gradient


def box_smooth(errors: Tensor) -> Tensor:
    """Average errors (B, K, h, w) over 3x3 cells, so that a noisy label cell doesn't decide alone."""
    return F.avg_pool2d(errors, 3, stride=1, padding=1, count_include_pad=False)


def reliability(errors: Tensor, prior_entropy: float, available: Tensor, temperature: float = 0.25) -> Tensor:
    """Softmax of negative errors (B, K, h, w), nats, over the available teachers (K,) and an abstain slot.

    The error of the abstention is the entropy of the label prior, nats, as of a teacher that knows nothing. Returns
    (B, K, h, w), 0 where not available; the sum over K is below 1, the rest is abstention.
    """
    mask = available[..., None, None].to(errors)
    scores = torch.where(mask > 0, -errors.float() / temperature, -torch.inf)
    abstain = torch.full_like(scores[:, :1], -prior_entropy / temperature)
    return torch.softmax(torch.cat([scores, abstain], dim=1), dim=1)[:, :-1]


def uniform(errors: Tensor, available: Tensor) -> Tensor:
    """Equal weights (B, K, h, w) over the available teachers (K,); zeros where there is none."""
    mask = available[..., None, None].to(errors).expand_as(errors)
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


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
    feature and each teacher's target (0 where there is none), and an embedding of the data set. Output: one score per
    slot (K teachers, and abstention as the last where ``slots`` is K + 1), plus a bias per data set and slot.
    """

    def __init__(self, channels: int, teachers: int, slots: int, tasks: int = 1, hidden: int = 32) -> None:
        super().__init__()
        check_number("gate_options#tasks", tasks, 1, whole=True)
        check_number("gate_options#hidden", hidden, 1, whole=True)
        self.norm = LayerNorm2d(channels, eps=1e-5)
        self.task = nn.Embedding(tasks, TASK_EMBEDDING)
        self.bias = nn.Parameter(torch.zeros(tasks, slots))
        last = nn.Linear(hidden, slots)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # every slot starts alike
        self.layers = nn.Sequential(nn.Linear(2 * channels + teachers + TASK_EMBEDDING, hidden), nn.GELU(), last)

    def forward(self, features: Tensor, cosines: Tensor, task: int = 0) -> Tensor:
        """Return scores (B, slots, h, w) for a student map (B, C, h', w') and cosines with teachers (B, K, h, w)."""
        if not 0 <= task < len(self.bias):
            raise ValueError(f"The gate has {len(self.bias)} tasks, not task {task}: raise `tasks` in `gate_options`.")
        grid = cosines.shape[-2:]
        local = self.norm(pool_finer(features, grid)).movedim(1, -1)  # channels last from here on
        whole, embedding = local.mean((1, 2)), self.task.weight[task]
        first, activation, last = self.layers
        # project image-level inputs once per image, and features before they are resized to a finer grid
        parts = first.weight.split([local.shape[-1], whole.shape[-1], cosines.shape[1], len(embedding)], dim=1)
        by_cell = to_grid(F.linear(local, parts[0]).movedim(-1, 1), grid).movedim(1, -1)
        by_image = F.linear(whole, parts[1], first.bias) + F.linear(embedding, parts[3])  # (B, hidden)
        hidden = by_cell + F.linear(cosines.movedim(1, -1), parts[2]) + by_image[:, None, None]
        return (last(activation(hidden)) + self.bias[task]).movedim(-1, 1)


def gate_log_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """Log-softmax of scores (B, K or K + 1, h, w) over the available teachers (K,) and, if scored, the abstention."""
    return torch.log_softmax(torch.where(_usable(scores, available), scores, UNUSABLE), dim=1)


def gate_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """The softmax of :func:`gate_log_probabilities`, of its shape; 0 where not available, all 0 where nothing is."""
    mask = _usable(scores, available)
    return torch.softmax(torch.where(mask, scores, UNUSABLE), dim=1) * mask


def _usable(scores: Tensor, available: Tensor) -> Tensor:
    slots = available.bool()
    if scores.shape[1] > slots.shape[-1]:
        slots = torch.cat([slots, torch.ones_like(slots[..., :1])], dim=-1)
    return slots[..., None, None]


def with_abstention(trusted: Tensor) -> Tensor:
    """Append what reliabilities (B, K, h, w) leave to 1: (B, K + 1, h, w)."""
    return torch.cat([trusted, (1 - trusted.sum(1, keepdim=True)).clamp_min(0)], dim=1)


def gate_loss(target: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(sg(r) || g) over the teachers and the abstention per sample (B,), nats, from r and log g (B, K + 1, h, w)."""
    return F.kl_div(log_predicted, target.detach(), reduction="none").sum(1).flatten(1).mean(1)


def agreement_auc(target: Tensor, predicted: Tensor) -> Tensor:
    """How well g finds the slot that the labels trust most: area under the ROC curve over cells and slots, a scalar.

    ``target`` is r with abstention, ``predicted`` g or log g, both (B, K + 1, h, w). A gate that knows nothing has 0.5;
    equal values of g count half.
    """
    score = predicted.detach()
    ordered, right = score.flatten().sort().values, score.gather(1, target.argmax(1, keepdim=True)).flatten()
    below = torch.searchsorted(ordered, right) + torch.searchsorted(ordered, right, right=True)
    ranks, n = (below + 1).double() / 2, len(right)  # the mean rank of equal values
    return (ranks.sum() - n * (n + 1) / 2) / max(1, n * (score.numel() - n))


@dataclass(frozen=True)
class GateSetup:
    """What every gate gets: the K teachers, the entropy of the label prior (nats), channels of the student map."""

    teachers: Sequence[TeacherTarget]
    prior_entropy: float
    channels: int
    tasks: int = 1


@dataclass(frozen=True)
class GateReading:
    """Errors of the teachers against the label (B, K, h, w), nats, and scores of a network (B, K or K + 1, h, w)."""

    errors: Tensor
    scores: Tensor | None = None


class TeacherGate(nn.Module):
    """Weights (B, K, h, w) of the teachers on the gate's grid, the coarsest grid among their targets.

    Call :meth:`measure` once per batch, then :meth:`weights` per loss. A gate of your own derives from this class: its
    dotted path is the mode, what its constructor takes after ``setup`` are its options. One that ``looks`` sees the
    student: its features, and how similar they are to each teacher's.
    """

    mean_errors: Tensor
    looks = False

    def __init__(self, setup: GateSetup) -> None:
        super().__init__()
        self.teachers, self.prior_entropy = list(setup.teachers), setup.prior_entropy
        means = [setup.prior_entropy if t.mean_error is None else t.mean_error for t in self.teachers]
        self.register_buffer("mean_errors", torch.tensor(means, dtype=torch.float32), persistent=False)
        shapes = [s[1:] for t in self.teachers for s in (t.grid, t.logits) if s is not None]
        width = min((w for _, w in shapes), default=1)
        self.grid = (1 if width == 1 else min(h for h, _ in shapes), width)  # answers of width 1 are about the image
        self._serving: dict[tuple[bool, ...], Tensor] = {}
        self.network: GateNetwork | None = None

    def available(self, device: torch.device, use: Sequence[bool] | None = None) -> Tensor:
        """Which teachers take part (K,), those of ``use``, by default all; made once, as no step may wait for it."""
        served = (True,) * len(self.teachers) if use is None else tuple(use)
        if served not in self._serving or self._serving[served].device != device:
            self._serving[served] = torch.tensor(served, device=device)
        return self._serving[served]

    def measure(
        self, batch: Batch, answers: Mapping[str, Tensor], classes: int, features: Tensor, cosines: Mapping[str, Tensor]
    ) -> GateReading:
        """Look at answers {teacher: (B, classes, h, w)}, student map (B, C, h, w) and cosines {teacher: (B, h, w)}."""
        scores = None
        if self.looks:
            nothing = features.new_zeros((len(features), *self.grid))
            maps = [to_grid(cosines.get(t.name, nothing)[:, None], self.grid) for t in self.teachers]
            scores = self.score(features, torch.cat(maps, 1), batch.task)
        return GateReading(self._errors(batch, answers, classes), scores)

    @torch.no_grad()
    def _errors(self, batch: Batch, answers: Mapping[str, Tensor], classes: int) -> Tensor:
        """Cross entropy of each teacher's answer against the label at the gate's grid (B, K, h, w), nats.

        Its mean over the labelled training samples where there is no label; without answers, of knowing nothing.
        """
        means = self.mean_errors[None, :, None, None].repeat(len(batch.label), 1, *self.grid).unbind(1)
        errors = dict(zip((t.name for t in self.teachers), means, strict=True))
        label = losses.label_map(batch.label)
        if batch.rows is not None:  # a label that is none may hold anything
            label = label * batch.known[:, None, None, None]
        for size, group in losses.by_size(answers).items():
            log_probabilities = torch.stack(list(group.values())).float().log_softmax(2)  # (teachers, B, classes, h, w)
            areas = losses.class_areas(label, classes, size)
            part = losses.area_logits((areas.sum(1) > 0).float(), self.grid)  # of each cell that has a label
            measured = losses.area_logits(losses.soft_cross_entropy(areas, log_probabilities), self.grid)
            known = batch.known[:, None, None] & (part > 0)
            for name, error in zip(group, measured / part.clamp_min(1e-6), strict=True):
                errors[name] = torch.where(known, error, errors[name])
        return torch.stack(list(errors.values()), 1)

    def score(self, features: Tensor, cosines: Tensor, task: int) -> Tensor:
        """Scores of a gate that looks (B, K or K + 1, h, w), from student maps (B, C, h', w') and (B, K, h, w)."""
        raise NotImplementedError

    def compare(self, batch: Batch, reading: GateReading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses that train the gate, {name: (labelled samples,)}, and figures on how good it is, {name: scalar}."""
        return {}, {}

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """Weights (B, K, h, w) over the teachers that are available (K,); 0 for the others."""
        raise NotImplementedError


class ReliabilityGate(TeacherGate):
    """Softmax of negative errors against the label, with abstention; all available teachers share a part ``floor``."""

    def __init__(self, setup: GateSetup, floor: float = 0.1, temperature: float = 0.25) -> None:
        super().__init__(setup)
        check_number("gate_options#floor", floor, 0, 1)
        check_number("gate_options#temperature", temperature, 1e-3)
        self.floor, self.temperature = float(floor), float(temperature)

    def trusted(self, errors: Tensor, available: Tensor) -> Tensor:
        """Reliabilities (B, K, h, w) from errors (B, K, h, w) of the available teachers (K,)."""
        return reliability(box_smooth(errors), self.prior_entropy, available, self.temperature)

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """Reliabilities (B, K, h, w) with the floor."""
        return self.with_floor(self.trusted(reading.errors, available), available)

    def with_floor(self, weights: Tensor, available: Tensor) -> Tensor:
        """(1 - floor) w + floor / n of weights w (B, K, h, w) for the n available teachers (K,), without gradient."""
        return ((1 - self.floor) * weights + self.floor * uniform(weights, available)).detach()


class LearnedGate(ReliabilityGate):
    """Reliability as a network predicts it from the student, trained on labelled samples by a loss of its own."""

    looks = True

    def __init__(self, setup: GateSetup, floor: float = 0.1, temperature: float = 0.25, hidden: int = 32) -> None:
        super().__init__(setup, floor, temperature)
        if k := len(self.teachers):
            self.network = GateNetwork(setup.channels, k, k + 1, setup.tasks, hidden)

    def score(self, features: Tensor, cosines: Tensor, task: int) -> Tensor:
        """Scores (B, K + 1, h, w) of the network, without gradient to maps (B, C, h', w') and cosines."""
        assert self.network is not None
        return self.network(features.detach(), cosines.detach(), task)

    def compare(self, batch: Batch, reading: GateReading) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compare the network with the reliabilities: a loss (labelled samples,) and the figure ``gate_auc``."""
        assert reading.scores is not None
        everyone = self.available(reading.errors.device)
        target = with_abstention(self.trusted(batch.labelled(reading.errors), everyone))
        predicted = gate_log_probabilities(batch.labelled(reading.scores), everyone)
        auc = agreement_auc(target[..., ::2, ::2], predicted[..., ::2, ::2])
        return {"gate": gate_loss(target, predicted)}, {"gate_auc": auc}

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """The predicted reliabilities (B, K, h, w) with the floor."""
        assert reading.scores is not None
        return self.with_floor(gate_probabilities(reading.scores, available)[:, :-1], available)


GATES: dict[str, type[TeacherGate]] = {"learned": LearnedGate, "reliability": ReliabilityGate}


class SharedGradients(Counter):
    """Measure, every ``every`` steps from the first, what each loss asks of the student's shared map."""

    def __init__(self, every: int = INTERVAL) -> None:
        super().__init__("seen")
        check_number("loss_gate_options#every", every, 1, whole=True)
        self.every = every

    def forward(self, losses: Mapping[str, Tensor], names: Iterable[str], shared: Tensor) -> dict[str, Tensor]:
        """Count a step and, if it is one of those that are measured, return {name: gradient (B * C * h * w,)}.

        Of the mean losses {name: (B,)} of ``names`` at the shared map (B, C, h, w); nothing without autograd.
        """
        due = self.steps % self.every == 0
        self.count_step()
        if not due or not torch.is_grad_enabled() or not shared.requires_grad:
            return {}
        found = {}
        for name in names:
            (gradient,) = torch.autograd.grad(losses[name].mean(), shared, retain_graph=True, allow_unused=True)
            found[name] = (torch.zeros_like(shared) if gradient is None else gradient).detach().float().flatten()
        return found


class LossGate(nn.Module):
    """Base of loss gates, also of your own: its options are what the constructor takes after ``channels``.

    Args:
        priors: {loss: relative importance}, e.g. {"output": 1.0, "feature": 0.2}; 0 switches a loss off.
        warmup_steps: steps over which the sizes of losses are measured, if they are.
        channels: of the student map that a gate may look at.
    """

    every: int = INTERVAL  # steps between two measurements of gradients

    def __init__(self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0) -> None:
        super().__init__()
        self.names = [name for name, prior in priors.items() if prior > 0]
        self.priors = {name: float(priors[name]) for name in self.names}

    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Learn from the losses {name: (B,)} of a training step, and from :class:`SharedGradients` where measured."""

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss and of ``task``; ``strength`` is beta(t), ``features`` (B, C, h, w)."""
        raise NotImplementedError


class ScaledLossGate(Counter, LossGate):
    """L = L_task + beta(t) sum_k v_k L_k / S_k, with scales S_k measured once and then frozen.

    S_k is the median of L_k over the first ``warmup_steps`` steps, at least 1e-3; frozen, it lets no loss that is
    driven to 0 raise its own weight. v is the given priors' share, of which ``floor`` is spread evenly. ``served`` is
    the part of the requested importance that some teacher can serve: without answers, features keep their small share.
    """

    history: Tensor
    scale: Tensor

    def __init__(
        self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0, floor: float = 0.0
    ) -> None:
        super().__init__("count", priors, warmup_steps, channels)
        check_number("scale_steps", warmup_steps, 0, whole=True)
        check_number("loss_gate_options#floor", floor, 0, 1)
        total, n, self.served = sum(self.priors.values()), len(self.names), 1.0
        self.share = {name: (1 - floor) * prior / total + floor / n for name, prior in self.priors.items()}
        self.register_buffer("history", torch.zeros(n, warmup_steps))
        self.register_buffer("scale", torch.ones(n))

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Measure the scales by losses (B,) of a step; without effect once they are frozen."""
        if (step := self.steps) >= self.history.shape[1]:
            return
        for k, name in enumerate(self.names):
            self.history[k, step] = losses[name].detach().float().mean()
        self.count_step()
        self.scale.copy_(self.history[:, : step + 1].median(dim=1).values.clamp_min(1e-3))

    def importance(self) -> Mapping[str, float | Tensor]:
        """The share v_k of each loss; they sum to 1."""
        return self.share

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss, {name: beta v_k / S_k}, scalars, and exactly 1 for ``task``."""
        shares, scales = self.importance(), self.scale.double().unbind()
        # times 1 first: a number over a tensor is computed as its reciprocal, which rounds otherwise
        parts = {
            n: torch.ones_like(s) * (strength * self.served) * shares[n] / s
            for n, s in zip(self.names, scales, strict=True)
        }
        return {"task": 1.0, **parts}


class AgreementLossGate(ScaledLossGate):
    """Scales as above; v_k follows how well the gradient of each loss agrees with the gradient of the task.

    Every ``every`` steps c_k <- memory c_k + (1 - memory) cos(grad L_k, grad L_task), gradients with respect to one
    shared student map (after Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018), and
    v = (1 - floor) softmax(log prior + c / temperature) + floor / K. One loss alone keeps v = 1, which is announced.
    """

    agreement: Tensor

    def __init__(
        self,
        priors: Mapping[str, float],
        warmup_steps: int = 100,
        channels: int = 0,
        floor: float = 0.2,
        temperature: float = 0.25,
        every: int = INTERVAL,
        memory: float = 0.9,
    ) -> None:
        super().__init__(priors, warmup_steps, channels)
        check_number("loss_gate_options#floor", floor, 0, 1)
        check_number("loss_gate_options#temperature", temperature, 1e-3)
        check_number("loss_gate_options#memory", memory, 0, 1)
        if len(self.names) == 1:
            logger.warning("The loss gate 'agreement' has no effect on '%s' alone: choose more losses.", *self.names)
        self.floor, self.temperature, self.every, self.memory = floor, temperature, every, memory
        self.register_buffer("agreement", torch.zeros(len(self.names)))
        self.log_priors: list[float] = torch.tensor([self.priors[name] for name in self.names]).log().tolist()

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None) -> None:
        """Measure the scales by losses (B,) and, where there are gradients (B * C * h * w,), how well they agree."""
        super().observe(losses)
        if not gradients:
            return
        for k, name in enumerate(self.names):
            gradient = gradients[name]
            cosine = F.cosine_similarity(gradient, gradients["task"], dim=0)
            measured = self.memory * self.agreement[k] + (1 - self.memory) * cosine
            # a loss of 0 carries no information and must not gain weight
            self.agreement[k] = torch.where(gradient.any(), measured, self.agreement[k])

    def importance(self) -> Mapping[str, float | Tensor]:
        """The share v_k of each loss, at least floor / K."""
        scaled = (self.agreement / self.temperature).unbind()
        scores = [prior + c for prior, c in zip(self.log_priors, scaled, strict=True)]
        shares = (1 - self.floor) * torch.softmax(torch.stack(scores), dim=0) + self.floor / len(self.names)
        return dict(zip(self.names, shares.double().unbind(), strict=True))


LOSS_GATES: dict[str, type[LossGate]] = {"scaled": ScaledLossGate, "agreement": AgreementLossGate}
