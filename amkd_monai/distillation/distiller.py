"""The distiller: a student, its projections and its teachers' targets; one forward gives every loss by name."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import Any

import torch
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn
from torch.func import functional_call

from amkd_monai.distillation import baselines, gates, losses
from amkd_monai.distillation.contrastive import ContrastiveDistillation, SampleTable
from amkd_monai.distillation.gates import GateReading, LossGate, ScaledLossGate, SharedGradients, TeacherGate
from amkd_monai.distillation.interface import INTERVAL, Batch, DistillationOutput, Faults, TeacherTarget
from amkd_monai.errors import check_number, check_options, class_of

logger = logging.getLogger("amkd_monai")

DEFAULT_LOSSES = {"output": 1.0, "feature": 0.2}
ANSWER_LOSSES = ("output", "overlap")
RETURN_CODES = ("none", "learned")
_GATES, _LOSS_GATES = {**gates.GATES, **baselines.GATES}, {**gates.LOSS_GATES, **baselines.LOSS_GATES}
STUDENT_STRIDES = (8, 16)  # student levels that are aligned with a teacher (two, summed)
SHARED_STRIDE = 16  # student level that gates and contrastive heads see, and where gradients are compared


def kd_temperature(progress: float, start: float = 2.0, end: float = 2.0) -> float:
    """KD temperature at ``progress`` in [0, 1], linear from ``start`` to ``end``."""
    return start + (end - start) * progress


def distillation_strength(progress: float, warmup: float = 0.05, decay: float = 0.0, end: float = 0.1) -> float:
    """The factor beta(t) of all distillation losses: linear warm-up, 1, cosine to ``end``."""
    if progress < warmup:
        return progress / warmup
    if progress <= 1 - decay:
        return 1.0
    phase = min(1.0, (progress - (1 - decay)) / decay)
    return end + (1 - end) * (1 + math.cos(math.pi * phase)) / 2


class Alignment(nn.Module):
    """Sum over student levels, {stride: channels}, of LayerNorm, 1x1, GELU, 1x1, at the teacher's grid.

    A finer level is area-pooled before it is projected, a coarser one is projected before it is made larger.
    """

    def __init__(self, channels: Mapping[int, int], out_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.levels = nn.ModuleDict()
        for stride, n in channels.items():
            layers = Mlp(n, hidden, out_channels, use_conv=True)
            self.levels[str(stride)] = nn.Sequential(LayerNorm2d(n, eps=1e-5), layers)

    def forward(self, features: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Project {stride: (B, C, H / stride, W / stride)}, pooled or not, to a grid (h, w): (B, C', h, w)."""
        projected = (project(losses.pool_finer(features[int(s)], size)) for s, project in self.levels.items())
        return reduce(torch.add, (losses.to_grid(level, size) for level in projected))


class Standardiser(nn.Module):
    """Fixed affine standardisation per channel, t' = (t - mean) / std, by statistics (C,) of the training split."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", torch.where(std > 1e-6, std, torch.ones_like(std)).float())  # a constant channel

    def forward(self, features: Tensor) -> Tensor:
        """Standardise a map (B, C, h, w)."""
        return (features.float() - self.mean[:, None, None]) / self.std[:, None, None]


class LearnedCode(nn.Module):
    """The return path of a teacher's features: an encoder C -> m and its mirror m -> C, two 1x1 convolutions each."""

    def __init__(self, channels: int, code_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.code_channels = code_channels
        self.encoder = Mlp(channels, hidden, code_channels, use_conv=True)
        self.decoder = Mlp(code_channels, hidden, channels, use_conv=True)

    @torch.no_grad()
    def encode(self, target: Tensor) -> Tensor:
        """Code (B, m, h, w), without gradient, of standardised features (B, C, h, w)."""
        return self.encoder(target)

    def autoencoder_loss(self, target: Tensor) -> Tensor:
        """Reconstruction (B, ceil(h/2), ceil(w/2)) of every second cell of features (B, C, h, w) from their code."""
        cells = target.detach()[..., ::2, ::2].contiguous(memory_format=torch.channels_last)
        return losses.reconstruction_loss(self.decoder(self.encoder(cells)), cells)

    def decode_frozen(self, code: Tensor) -> Tensor:
        """Features (B, C, h, w) from a code; gradient flows to the code, none to the decoder."""
        frozen = {name: value.detach() for name, value in self.decoder.named_parameters()}
        return functional_call(self.decoder, frozen, (code,))


@dataclass(frozen=True)
class DistillationConfig:
    """What is distilled and how it is weighed: the settings of a run, under the names they have in ``train.json``."""

    # of the teachers: a name in :data:`gates.GATES` or :data:`baselines.GATES`, or the dotted path of a class.
    gate: str = "learned"
    # of that gate, e.g. ``floor``, ``temperature``; ``tasks``: number of data sets that share it.
    gate_options: Mapping[str, Any] = field(default_factory=dict)
    # relative importance of the :data:`LOSSES`; 0 or absence switches one off
    losses: Mapping[str, float] = field(default_factory=DEFAULT_LOSSES.copy)
    # a name in :data:`gates.LOSS_GATES` or :data:`baselines.LOSS_GATES`, or a dotted path.
    loss_gate: str = "agreement"
    loss_gate_options: Mapping[str, Any] = field(default_factory=dict)  # of that gate
    scale_steps: int = 100  # steps over which loss scales are measured before they freeze
    # ``none`` compares features directly; ``learned`` compares them in a code, from which they can be reconstructed
    # (:class:`LearnedCode`)
    return_code: str = "none"
    code_channels: int = 64  # size of the code at most
    # options of :class:`~amkd_monai.distillation.contrastive.ContrastiveDistillation`.
    contrastive: Mapping[str, Any] = field(default_factory=dict)
    kd_temperature: Mapping[str, Any] = field(default_factory=dict)  # options of :func:`kd_temperature`
    loss_strength: Mapping[str, float] = field(default_factory=dict)  # options of :func:`distillation_strength`

    def __post_init__(self) -> None:
        if unknown := set(self.losses) - set(LOSSES):
            raise ValueError(f"Unknown losses {sorted(unknown)}: use some of {', '.join(LOSSES)}.")
        check_number("code_channels", self.code_channels, 1, whole=True)
        if self.return_code not in RETURN_CODES:
            raise ValueError(f"There is no return code '{self.return_code}': use one of {', '.join(RETURN_CODES)}.")
        if self.losses.get("reconstruction") and self.return_code == "none":
            raise ValueError("The loss 'reconstruction' needs a code: set return_code to 'learned'.")
        check_options("contrastive loss", ContrastiveDistillation, self.contrastive, 2)
        check_options("KD temperature", kd_temperature, self.kd_temperature, 1)
        check_options("loss strength", distillation_strength, self.loss_strength, 1)
        ranges: dict[str, Any] = {"losses": (0,), "kd_temperature": (1,), "loss_strength": (0, 1)}
        for section, limits in ranges.items():
            for name, value in getattr(self, section).items():
                check_number(f"{section}#{name}", value, *limits)
        own = {name: value for name, value in self.gate_options.items() if name != "tasks"}
        check_options(f"teacher gate '{self.gate}'", self._gate_class, own, 1)
        check_options(f"loss gate '{self.loss_gate}'", self._loss_gate_class, self.loss_gate_options, 3)
        with torch.random.fork_rng(devices=[]):  # wrong values are refused before the teachers run
            if self._gate_class in _GATES.values():  # a gate of the user's own may ask for the teachers of its run
                self.make_gate([TeacherTarget("any", logits=(2, 1, 1))], 0.0, 1)
            if (of := self._loss_gate_class) in _LOSS_GATES.values():
                SharedGradients(of(dict.fromkeys(LOSSES, 1.0), self.scale_steps, 1, **self.loss_gate_options).every)
            ContrastiveDistillation(1, SampleTable({}, torch.zeros(1)), **self.contrastive)

    def facts(self, **further: Any) -> dict[str, Any]:
        """JSON-able description of the method for the run record, with ``further`` settings."""
        rest = {name: value for name, value in vars(self).items() if name not in ("gate", "losses")}
        return {"gate": self.gate, "losses": dict(self.losses), "method": rest | further}

    @property
    def _gate_class(self) -> type[TeacherGate]:
        return class_of("teacher gate", self.gate, _GATES, TeacherGate)

    @property
    def _loss_gate_class(self) -> type[LossGate]:
        return class_of("loss gate", self.loss_gate, _LOSS_GATES, LossGate)

    def make_gate(self, teachers: Sequence[TeacherTarget], prior_entropy: float, channels: int) -> TeacherGate:
        """Return the teacher gate; ``prior_entropy`` in nats, ``channels`` of the student map that it may look at."""
        options = dict(self.gate_options)
        return self._gate_class(gates.GateSetup(teachers, prior_entropy, channels, options.pop("tasks", 1)), **options)

    def make_loss_gate(self, priors: Mapping[str, float], channels: int) -> LossGate:
        """Return the loss gate of losses with ``priors``, which are empty without teachers."""
        if not any(priors.values()):  # plain supervised training needs no gate
            return ScaledLossGate(priors, self.scale_steps)
        gate = self._loss_gate_class(priors, self.scale_steps, channels, **self.loss_gate_options)
        if isinstance(gate, ScaledLossGate):
            gate.served = sum(priors.values()) / sum(self.losses.values())
        return gate

    def priors(self, teachers: Sequence[TeacherTarget], samples: SampleTable | None) -> dict[str, float]:
        """Return the importance of each loss, 0 where no teacher can serve it; empty without teachers.

        Where no teacher can serve any loss, or a loss does not fit the labels, it is a ValueError.
        """
        if not teachers:
            return {}
        if self.losses.get("contrastive") and samples is None:
            raise ValueError("The loss 'contrastive' needs a table of the training samples: give `samples`.")
        offered = dict.fromkeys(("feature", "reconstruction"), any(t.grid is not None for t in teachers))
        admitted = [t.logits for t in teachers if t.admitted and t.logits is not None]
        offered |= dict.fromkeys(ANSWER_LOSSES, bool(admitted))
        if self.losses.get("overlap") and any(shape[-1] == 1 for shape in admitted):
            raise ValueError("The loss 'overlap' compares masks, these outputs are of whole images: leave it out.")
        offered["contrastive"] = samples is not None and bool(samples.vectors)
        chosen = {name: prior if offered[name] else 0.0 for name, prior in self.losses.items()}
        if not any(chosen.values()):
            raise ValueError("No teacher has what the `losses` compare, or is admitted: change them or the teachers.")
        if left_out := [name for name, prior in self.losses.items() if prior and not offered[name]]:
            logger.warning("No teacher serves the losses %s: this run leaves them out.", " and ".join(left_out))
        return chosen


@dataclass(frozen=True)
class _Pair:
    """A student map and what it is compared with: ``aligned`` and ``goal`` (B, m, h, w), ``target`` (B, C, h, w)."""

    aligned: Tensor
    goal: Tensor
    target: Tensor

    @cached_property
    def similar(self) -> Tensor:
        """Cosine of student and goal (B, h, w): the gate and a loss look at it."""
        return losses.cosine(self.aligned, self.goal.detach())


@dataclass(frozen=True)
class _Seen:
    """Input of the losses of a batch: student logits (B, C, H, W), its shared map (B, C', h, w), pairs and answers."""

    batch: Batch
    logits: Tensor
    view: Tensor
    pairs: dict[str, _Pair]
    answers: dict[str, Tensor]
    reading: GateReading
    temperature: float


class Distiller(nn.Module):
    """Student + projections + gates; teachers themselves are never in here, only their targets.

    Without teachers it is plain supervised training of the student, on the same code path.

    A training step asks the device nothing, so that the host can run ahead of it: labels out of range and targets that
    are not finite are noted, and raised in the first step, in every :data:`INTERVAL`-th and by ``faults.read()``, which
    a training loop calls before it keeps anything. Without training they are raised at once.

    Args:
        student: network with ``encode``, ``decode``, ``channels_at`` and ``strides``.
        teachers: what each teacher offers.
        prior_entropy: entropy of the label prior of the training split, nats.
        config: what is distilled and how it is weighed.
        samples: table of the training dataset, for the contrastive loss.
        batch_dice: pool the task's soft Dice over the batch (slices of volumes).
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[TeacherTarget] = (),
        prior_entropy: float = 0.69,
        config: DistillationConfig | None = None,
        samples: SampleTable | None = None,
        batch_dice: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.teachers, self.batch_dice = student, list(teachers), batch_dice
        self.config = config or DistillationConfig()
        self.faults, self._until_read = Faults(), 0
        self.loss_priors = self.config.priors(self.teachers, samples)
        channels = {stride: student.channels_at(stride) for stride in STUDENT_STRIDES} if self.teachers else {}
        self.align, self.standardise, self.codes = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        compared = self.loss_priors.get("feature") or self.loss_priors.get("reconstruction")
        for spec in self.teachers if compared else ():
            if spec.grid is None:
                continue
            assert spec.mean is not None and spec.std is not None
            width = spec.grid[0]
            if self.config.return_code == "learned":
                self.codes[spec.name] = LearnedCode(width, min(self.config.code_channels, width))
                width = self.codes[spec.name].code_channels
            self.align[spec.name] = Alignment(channels, width)
            self.standardise[spec.name] = Standardiser(spec.mean, spec.std)
        width = channels.get(SHARED_STRIDE, 0)
        self.loss_gate = self.config.make_loss_gate(self.loss_priors, width)
        self.gradients = SharedGradients(self.loss_gate.every)
        self.teacher_gate = self.config.make_gate(self.teachers, prior_entropy, width)
        self.contrast: ContrastiveDistillation | None = None
        if self.loss_priors.get("contrastive") and samples is not None:
            self.contrast = ContrastiveDistillation(width, samples, **self.config.contrastive)

    @property
    def learns_answers(self) -> bool:
        """Whether a loss compares the student's answers with a teacher's."""
        return any(self.loss_priors.get(name) for name in ANSWER_LOSSES)

    def forward(self, batch: Batch, progress: float = 0.0, learns_labels: bool = True) -> DistillationOutput:
        """Compute all losses of a batch, at least one labelled, at ``progress`` in [0, 1] of the run.

        The task's loss has weight 0 unless the step ``learns_labels``; without a labelled sample it is a ValueError.
        """
        if batch.rows is not None and not len(batch.rows):
            raise ValueError("The batch holds no labelled sample: the task loss needs at least one.")
        levels = self.student.encode(batch.image)
        logits = self.student.decode(levels, list(batch.image.shape[-2:]))
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            named = {"task": self._task_loss(batch, logits)}
            weights: dict[str, Tensor] = {}
            figures: dict[str, float | Tensor] = {}
            view: Tensor | None = None
            if self.teachers:
                seen = self._look(batch, levels, losses.as_map(logits), progress)
                view = seen.view
                distilled, weights = self._distil(seen)
                gate, found = self.teacher_gate.compare(batch, seen.reading)
                named |= distilled | gate | self._autoencoder(seen.pairs)
                figures |= found
                if self.training:
                    shared = levels[self.student.strides.index(SHARED_STRIDE)]
                    gradients = self.gradients(named, ("task", *self.loss_gate.names), shared)
                    self.loss_gate.observe(named, gradients)
                    figures |= {f"gradient_{name}": gradient.norm() for name, gradient in gradients.items()}
            strength = distillation_strength(progress, **self.config.loss_strength)
            factors = dict(self.loss_gate.weights(strength, view))
            factors |= {} if learns_labels else {"task": 0.0}
            factors |= {name: 1.0 for name in named if name not in factors}  # losses that train parts of the distiller
            single = {name: f.float() if isinstance(f, Tensor) else f for name, f in factors.items()}
            total = torch.stack([single[name] * loss.mean() for name, loss in named.items()]).sum()
        self._until_read -= 1
        if not self.training or self._until_read < 0:
            self._until_read = INTERVAL - 1
            self.faults.read()
        plain = {name: f.detach() if isinstance(f, Tensor) else f for name, f in factors.items()}
        return DistillationOutput(total, named, plain, weights, logits, figures)

    def _task_loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """The supervised loss of the labelled samples."""
        label = batch.labelled(batch.label)
        losses.note_classes(self.faults, label, logits.shape[1])
        ignored = (label == losses.UNLABELLED) & (label.ndim == 4)  # indexing by other classes would end it on a GPU
        label = torch.where(ignored, label, label.clamp(0, logits.shape[1] - 1))
        return losses.task_loss(batch.labelled(logits), label, self.batch_dice)

    @torch.no_grad()
    def teacher_maps(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Student logits (B, C, H, W), answers {teacher: (B, C, h, w)} and weights (B, K, h', w') of the teachers."""
        levels = self.student.encode(batch.image)
        logits = losses.as_map(self.student.decode(levels, list(batch.image.shape[-2:])))
        seen = self._look(batch, levels, logits)
        self.faults.read()
        return logits, seen.answers, self.teacher_gate.weights(seen.reading, self.teacher_gate.available(logits.device))

    def _look(self, batch: Batch, levels: Sequence[Tensor], logits: Tensor, progress: float = 0.0) -> _Seen:
        """The shared student map, pairs and answers by teacher, and what the gate makes of them."""
        maps = [level.float() for level in levels]  # autocast gave them half precision
        features = dict(zip(self.student.strides, maps, strict=True))
        view, pairs = features[SHARED_STRIDE], self._pairs(batch, features)
        answers = {t.name: self._targets(batch, t.name, "logits") for t in self.teachers if t.logits is not None}
        similar = {n: p.similar for n, p in pairs.items()} if self.teacher_gate.looks else {}
        reading = self.teacher_gate.measure(batch, answers, logits.shape[1], view, similar)
        temperature = kd_temperature(progress, **self.config.kd_temperature)
        return _Seen(batch, logits, view, pairs, answers, reading, temperature)

    def _targets(self, batch: Batch, name: str, kind: str) -> Tensor:
        """Read a teacher's targets."""
        target = batch.teachers.get(name, {}).get(kind)
        if target is None:
            raise ValueError(f"The batch holds no {kind} targets of the teacher '{name}': rebuild the teacher cache.")
        self.faults.note(  # the sum is finite where all are, and ten times as quick on a CPU as to look at each
            f"The {kind} targets of the teacher '{name}' are not finite: delete its teacher cache and run again.",
            ~torch.isfinite(target.sum(dtype=torch.float32)),
        )
        return target

    def _pairs(self, batch: Batch, features: Mapping[int, Tensor]) -> dict[str, _Pair]:
        """Bring student and teachers to common grids and codes, {teacher: pair}; none if no loss compares features."""
        pooled: dict[tuple[int, int], dict[int, Tensor]] = {}  # the same for all teachers of one grid
        pairs = {}
        for name, align in self.align.items():
            target = self.standardise[name](self._targets(batch, name, "grid"))
            target = target.contiguous(memory_format=torch.channels_last)  # like the student's maps: no reordering
            size = (target.shape[-2], target.shape[-1])
            if size not in pooled:
                pooled[size] = {stride: losses.pool_finer(features[stride], size) for stride in STUDENT_STRIDES}
            goal = self.codes[name].encode(target) if name in self.codes else target
            pairs[name] = _Pair(align(pooled[size], size), goal, target)
        return pairs

    def _distil(self, seen: _Seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every distillation loss (B,), weighed and summed over the teachers, and their mean weights (B, K)."""
        found, weights = {}, {}
        trusted: dict[tuple[bool, ...], Tensor] = {}  # the same for all losses that the same teachers serve
        for name, maps_of in LOSSES.items():
            if not self.loss_priors.get(name):
                continue
            maps = maps_of(self, seen)
            serving = tuple(t.name in maps for t in self.teachers)
            if serving not in trusted:
                available = self.teacher_gate.available(seen.logits.device, serving)
                trusted[serving] = self.teacher_gate.weights(seen.reading, available)
            w, total = trusted[serving], seen.logits.new_zeros(len(seen.logits))
            for k, spec in enumerate(self.teachers):
                if (loss := maps.get(spec.name)) is not None:
                    total = total + (gates.to_size(w[:, k], loss.shape[-2:]) * loss).flatten(1).mean(1)
            found[name], weights[name] = total, w.detach().flatten(2).mean(2)
        return found, weights

    def _autoencoder(self, pairs: Mapping[str, _Pair]) -> dict[str, Tensor]:
        """The loss (B,) that trains encoders and decoders of learned codes, the mean over the teachers."""
        coded = (code.autoencoder_loss(pairs[name].target) for name, code in self.codes.items())
        parts = [loss.flatten(1).mean(1) for loss in coded]
        return {"autoencoder": torch.stack(parts).mean(0)} if parts else {}


def _answer_maps(compare: Callable[..., Tensor], distiller: Distiller, seen: _Seen) -> dict[str, Tensor]:
    """Distance from each admitted teacher's answers (B, h, w), by one of the losses of answers."""
    chosen = {t.name: seen.answers[t.name] for t in distiller.teachers if t.admitted and t.logits is not None}
    maps: dict[str, Tensor] = {}
    for size, group in losses.by_size(chosen).items():
        small, answers = losses.area_logits(seen.logits, size), torch.stack(list(group.values()))
        maps |= dict(zip(group, compare(small, answers, seen.temperature), strict=True))
    return maps


def _feature_maps(distiller: Distiller, seen: _Seen) -> dict[str, Tensor]:
    """Distance from each teacher's features, or from their code (B, h, w)."""
    return {n: losses.feature_loss(p.aligned, p.goal, p.similar) for n, p in seen.pairs.items()}


def _reconstruction_maps(distiller: Distiller, seen: _Seen) -> dict[str, Tensor]:
    """Distance of the features that the student's code is decoded to from each teacher's (B, h, w)."""
    decode = {name: code.decode_frozen for name, code in distiller.codes.items()}
    return {n: losses.reconstruction_loss(decode[n](p.aligned), p.target) for n, p in seen.pairs.items()}


def _contrastive_maps(distiller: Distiller, seen: _Seen) -> dict[str, Tensor]:
    """Contrastive loss against each teacher's image vectors (B, 1, 1)."""
    assert distiller.contrast is not None
    vectors = distiller.contrast(seen.view, seen.batch.index)
    if distiller.training:
        distiller.contrast.count_step()
    return {n: loss[:, None, None] for n, loss in vectors.items()}


LOSSES: dict[str, Callable[[Distiller, _Seen], dict[str, Tensor]]] = {
    "output": partial(_answer_maps, losses.output_loss),
    "overlap": partial(_answer_maps, losses.overlap_loss),
    "feature": _feature_maps,
    "reconstruction": _reconstruction_maps,
    "contrastive": _contrastive_maps,
}
"""Loss by location and teacher, by name: {teacher: (B, h, w)}, of the teachers that serve it."""
