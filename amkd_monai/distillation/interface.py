"""Inputs and outputs of a distiller, and what its parts share: faults, counters, classes by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from amkd_monai.cache.store import FeatureStore


@dataclass(frozen=True)
class Calibration:
    """What makes answers as sure as they are right: logits / ``temperature`` + ``offsets``.

    Offsets are one for each class, or for each class and finding (those of absence first); an empty tuple adds nothing.
    """

    temperature: float = 1.0
    offsets: tuple[float, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrate logits (B, classes, ...), of findings (B, 2, F, ...)."""
        scaled = logits / self.temperature
        shape = (logits.shape[1], -1, *[1] * (logits.ndim - 3))[: logits.ndim - 1]
        return scaled + logits.new_tensor(self.offsets).view(shape) if self.offsets else scaled

    def folded(self, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weight`` (classes, ...) and ``bias`` (classes,) of a last layer whose logits are then calibrated."""
        return {"weight": layer["weight"] / self.temperature, "bias": self(layer["bias"][None])[0]}


UNCALIBRATED = Calibration()


@dataclass(frozen=True)
class TeacherTarget:
    """A teacher in a run: what it teaches, how good it is, and the stores that hold its targets."""

    name: str  # key of its targets in a batch
    grid: tuple[int, ...] | None = None  # (C, h, w) of its feature map, None if it gives none
    mean: Tensor | None = None  # (C,) of its features over the training split, like std
    std: Tensor | None = None
    # (classes, h, w) of its own answer or its probe's, h = w = 1 for classes of images, w = 1 for h findings
    logits: tuple[int, ...] | None = None
    admitted: bool = False  # whether its answers are distilled (they beat the undistilled student); features always are
    # mean cross entropy of its answers over the labelled training samples, nats; used without a label
    mean_error: float | None = None
    score: float | None = None  # cross-fitted score of its answers, higher is better; None if it gives none
    kind: str = ""  # of its description
    fingerprint: str = ""  # hash of the weights and the preprocessing, or of the cross-fitting
    features: FeatureStore | None = None  # store with ``grid``
    answers: FeatureStore | None = None  # store with ``logits``
    calibration: Calibration = UNCALIBRATED  # of the stored logits, fitted on the validation split
    record: Mapping[str, Any] = field(default_factory=dict)  # facts for ``run.json``; nothing reads them back


@dataclass
class DistillationOutput:
    """Result of a forward of the distiller."""

    total: Tensor  # the loss to minimise, a scalar
    # {name: (B,)}; ``task`` and ``gate`` are (number of labelled samples,). ``gate`` and ``autoencoder`` train parts of
    # the distiller alone and never reach the student.
    losses: dict[str, Tensor]
    # {name: factor} by which each loss entered the total; double scalars where the device knows them
    loss_weights: dict[str, float | Tensor]
    teacher_weights: dict[str, Tensor]  # {loss: (B, K)} mean weight of each teacher per sample, without gradient
    # student logits (B, C, H, W), or (B, C) where an image has one class, (B, 2, F) where it has findings
    logits: Tensor
    # further figures worth recording, by name; scalars of the device where it knows them
    figures: dict[str, float | Tensor] = field(default_factory=dict)

    def means(self) -> DistillationOutput:
        """Means over the samples, still on the device, of losses (scalars) and weights (K,), without graph and maps."""
        losses = {name: loss.detach().mean() for name, loss in self.losses.items()}
        weights = {name: weight.mean(0) for name, weight in self.teacher_weights.items()}
        kept: dict[str, Any] = {"losses": losses, "teacher_weights": weights, "logits": self.logits[:0].detach()}
        return replace(self, total=self.total.detach(), **kept)


@dataclass
class Batch:
    """Input of the distiller."""

    image: Tensor  # (B, 3, H, W) in [0, 1]
    # class indices, masks (B, 1, H, W), one class per image (B,) or 0 and 1 of findings (B, F); rows without a label
    # may hold anything
    label: Tensor
    has_label: Tensor  # boolean (B,); best on the host, so that no step waits for the device
    # {name: {"grid": (B, C, h, w), "logits": (B, classes, h', w')}}; where labels are about images, answers have one
    # cell, (B, classes, 1, 1), or one for each of F findings, (B, 2, F, 1)
    teachers: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    # position of each sample in the training dataset (B,); contrastive distillation needs it
    index: Tensor | None = None
    task: int = 0  # number of the data set that the whole batch comes from, for the gate network's task embedding
    known: Tensor = field(init=False)  # ``has_label`` on the device of the images (B,)
    rows: Tensor | None = field(init=False)  # indices of the labelled samples there, None where all are labelled

    def __post_init__(self) -> None:
        labelled, device = self.has_label.cpu(), self.image.device
        self.known = labelled.to(device, non_blocking=True)
        self.rows = None if bool(labelled.all()) else labelled.nonzero()[:, 0].to(device, non_blocking=True)

    def labelled(self, values: Tensor) -> Tensor:
        """The rows of values (B, ...) whose samples have a label, the same tensor where all have."""
        return values if self.rows is None else values.index_select(0, self.rows)


INTERVAL = 50
"""Training steps between two readings of what the device found, and by default between measurements of gradients."""


class Faults:
    """Faults that the device finds: noted in every step without waiting, raised when they are read.

    Every question to the device (``bool``, ``item``, ``tolist``) makes the host wait until all queued work is done.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def note(self, sentence: str, fault: Tensor, value: Tensor | None = None) -> None:
        """Note whether there is a fault (a boolean scalar); ``{}`` in its sentence stands for the integer ``value``."""
        now = torch.stack([fault.long(), fault.long() if value is None else value.long()])
        known = self.found.get(sentence)
        self.found[sentence] = now if known is None else torch.where(known[0] > 0, known, now)

    def read(self) -> None:
        """Forget what was noted, and raise the first fault as a ValueError."""
        found, self.found = self.found, {}
        flags = torch.stack(list(found.values())).tolist() if found else []
        for sentence, (fault, value) in zip(found, flags, strict=True):
            if fault:
                raise ValueError(sentence.replace("{}", str(value)))


class Counter(nn.Module):
    """A module that counts steps in a buffer called ``name``, part of its state, and on the host to be read."""

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counter, self._steps = name, 0
        self.register_buffer(name, torch.zeros((), dtype=torch.long))

    @property
    def steps(self) -> int:
        """The steps counted so far."""
        if self._steps < 0:
            self._steps = int(self.get_buffer(self._counter))
        return self._steps

    def count_step(self) -> None:
        """Count a step."""
        self._steps = self.steps + 1
        self.get_buffer(self._counter).add_(1)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._steps = -1
