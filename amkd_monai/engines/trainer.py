"""Trains a student: recipe, teacher targets, and a MONAI SupervisedTrainer whose loss is the distiller's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amkd_monai.cache.build import MATRIX, to_device
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.sampling import Augmentation, BatchSampler, PatchSampler, warp
from amkd_monai.distillation import SampleTable, TeacherTarget
from amkd_monai.distillation.distiller import Batch, DistillationOutput, Distiller
from amkd_monai.distillation.interface import INTERVAL, Faults
from amkd_monai.errors import check_number, check_options, is_true

_COUNT: tuple[Any, ...] = (1, math.inf, True)
_LIMITS = {"batch_size": _COUNT, "min_steps": _COUNT, "slices": _COUNT, "warmup_steps": (0, math.inf, True)}
_LIMITS |= {"learning_rate": (1e-12,), "encoder_learning_rate": (0,), "weight_decay": (0,), "ema": (0, 0.99999)}
_LIMITS |= {"labelled_fraction": (1e-12, 1), "foreground_fraction": (0, 1), "class_balance": (0, 1)}
_LIMITS["first_stage"] = (0, 0.99)


@dataclass(frozen=True)
class Recipe:
    """Batches, augmentation and optimiser of a training; shared by the main run and by cross-fitting."""

    batch_size: int = 8  # samples per process and step
    learning_rate: float = 2e-3  # of everything but the encoder
    encoder_learning_rate: float = 8e-4  # of the pretrained encoder
    weight_decay: float = 1e-3  # of AdamW, not on vectors: biases and norms
    warmup_steps: int = 20  # linear warm-up of the learning rate
    labelled_fraction: float = 0.5  # part of a batch that is labelled, where unlabelled samples take part
    # part of the labelled picks that show foreground; None takes them as they come
    foreground_fraction: float | None = None
    # draws classes as often as they occur (0) to equally often (1); needs one class per image
    class_balance: float = 0.0
    min_steps: int = 1  # steps that an epoch has at least, for few samples
    batch_dice: bool = False  # pool the task's soft Dice over the batch (slices of volumes)
    # decay per step of an average of the student's weights, which takes their place; 0 averages nothing
    ema: float = 0.0
    # where unlabelled samples take part and answers are admitted, part of the epochs in which the student learns
    # answers alone; then it learns labels and answers, on labelled samples. 0: both, on all.
    first_stage: float = 0.0
    # options of :class:`amkd_monai.data.sampling.Augmentation`.
    augmentation: dict[str, Any] = field(default_factory=dict)
    slices: int = 1  # of a patch of a 3D student, which is then what ``batch_size`` counts; 1 for other students

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            if (value := getattr(self, name)) is not None or name != "foreground_fraction":
                check_number(f"recipe#{name}", value, *limits)
        object.__setattr__(self, "batch_dice", is_true(self.batch_dice, "recipe#batch_dice"))
        check_options("recipe#augmentation", Augmentation, self.augmentation, 1)
        self.augment()

    def augment(self) -> Augmentation:
        """Return the augmentation."""
        return Augmentation(self.slices, **self.augmentation)

    def loader(
        self,
        dataset: DecodedDataset,
        seed: int,
        use_unlabelled: bool = False,
        indices: Sequence[int] | np.ndarray | None = None,
        distributed: bool = True,
        num_workers: int = 0,
    ) -> DataLoader:
        """Return the loader of training batches, of this process where ``distributed``; options of the sampler."""
        if dataset.classes is not None and (self.foreground_fraction is not None or self.batch_dice):
            raise ValueError("recipe#foreground_fraction and recipe#batch_dice are for masks: leave both out.")
        own = ("labelled_fraction", "foreground_fraction", "class_balance", "min_steps", "first_stage")
        options: dict[str, Any] = {name: getattr(self, name) for name in own}
        options |= {"use_unlabelled": use_unlabelled, "indices": indices}
        options |= {"classes": dataset.classes, "groups": dataset.groups}
        if distributed:
            options |= {"rank": idist.get_rank(), "world_size": idist.get_world_size()}
        kind: type[BatchSampler] = BatchSampler
        if self.slices > 1:
            kind, options = PatchSampler, options | {"first": dataset.first, "last": dataset.last}
            options["slices"] = self.slices
        sampler = kind(dataset.has_label, dataset.has_foreground, self.batch_size, seed, **options)
        return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)

    def optimizer(self, distiller: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW with the encoder's own learning rate and no decay on vectors, that is biases and norms."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in distiller.named_parameters():
            if parameter.requires_grad:
                rate = self.encoder_learning_rate if "student.encoder." in name else self.learning_rate
                groups.setdefault((rate, self.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        return torch.optim.AdamW([{"params": p, "lr": r, "weight_decay": decay} for (r, decay), p in groups.items()])

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> WarmupCosineSchedule:
        """Return linear warm-up and cosine decay to 0 over ``steps`` optimiser steps."""
        warmup = min(self.warmup_steps, max(1, steps // 5))
        return WarmupCosineSchedule(optimizer, warmup_steps=warmup, t_total=max(steps, 1), warmup_multiplier=0.02)


class TeacherTargets:
    """Targets of the teachers that teach, over the training dataset.

    ``prior_entropy`` is that of the label prior of the training split, nats; ``record`` are facts for the run record,
    whose ``teachers`` also describe those that teach nothing; ``groups`` and ``classes`` (-1 where unknown, None for
    masks) are those of each sample, as in :class:`~amkd_monai.distillation.SampleTable`.
    """

    def __init__(
        self,
        teachers: Sequence[TeacherTarget],
        prior_entropy: float,
        record: dict[str, Any],
        groups: Sequence[str] = (),
        classes: np.ndarray | None = None,
    ) -> None:
        self.teachers, self.prior_entropy, self.groups, self.classes = list(teachers), prior_entropy, groups, classes
        self.record = {"teachers": [t.record for t in teachers], **record}
        self._stores = [store for t in teachers for store in (t.features, t.answers) if store is not None]
        self.views = max((store.views for store in self._stores), default=1)
        """Number of stored views of every image."""
        if len(several := {store.views for store in self._stores if store.views > 1}) > 1:
            raise ValueError(f"The teachers have {sorted(several)} stored views: give all the same number, or one.")

    def __len__(self) -> int:
        return len(self.teachers)

    def samples_for(self, losses: Mapping[str, float]) -> SampleTable | None:
        """Return the pooled features of all training samples if the contrastive loss is asked for, else None."""
        if not losses.get("contrastive") or not self.teachers:
            return None
        groups = torch.from_numpy(np.unique(self.groups, return_inverse=True)[1]).long()
        vectors = {t.name: _pooled_features(t.features) for t in self.teachers if t.features is not None}
        return SampleTable(vectors, groups, None if self.classes is None else torch.from_numpy(self.classes).long())

    @property
    def identity(self) -> list[tuple[str, str, bool]]:
        """Name, fingerprint and admission of each teacher: what must be equal for a run to be resumed."""
        variant = f", {self.views} views" if self.views > 1 else ""
        return [(t.name, t.fingerprint + variant, t.admitted) for t in self.teachers]

    def view_matrices(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Affine matrices (B, 2, 3) that turn the image of a sample into the view of it that the teachers saw."""
        several = [store for store in self._stores if store.views > 1]
        first = several[0].read(MATRIX, indices, views)
        for store in several[1:]:
            if not np.allclose(first, store.read(MATRIX, indices, views), atol=1e-6):
                both = f"{store.directory} and {several[0].directory}"
                raise ValueError(f"{both} hold different views of one image: delete the older one to build it again.")
        return torch.from_numpy(first)

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        device: torch.device | str,
        theta: Tensor | None = None,
        views: Sequence[int] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Return {teacher: {"grid": (B, C, h, w), "logits": (B, classes, h', w')}} as float32, logits calibrated.

        ``theta`` (B, 2, 3) warps the images of the B samples. ``views`` are the stored views that ``theta`` stands for:
        their maps are read as they are, and only what is stored for the image alone is warped.
        """
        targets: dict[str, dict[str, Tensor]] = {teacher.name: {} for teacher in self.teachers}
        for teacher in self.teachers:
            for array, store in (("grid", teacher.features), ("logits", teacher.answers)):
                if store is None:
                    continue
                stored = views if store.views > 1 else None
                values = to_device(store.read(array, indices, 0 if stored is None else stored), device).float()
                values = teacher.calibration(values) if array == "logits" else values
                warped = theta is not None and stored is None
                targets[teacher.name][array] = warp(values, theta) if warped else values
        return targets


class DistillationTrainer(SupervisedTrainer):
    """Train a student through a :class:`~amkd_monai.distillation.Distiller`.

    All randomness of an epoch depends on seed and epoch alone, so a resumed run repeats an uninterrupted one.
    ``state.output`` holds image, label and pred of the labelled rows and the total ``loss``; ``state.distillation``
    the last :class:`~amkd_monai.distillation.DistillationOutput`. Further parameters are MONAI's.

    Args:
        train_data_loader: loader over a :class:`BatchSampler`.
        network: the distiller, or DistributedDataParallel around it.
        targets: teachers' targets by sample index; None for plain supervised training.
        augmentation: random changes of a batch. With several stored views these are the geometric changes, and only
            the photometric ones of the augmentation are made.
        warped_features: what warping may make of cached feature maps: ``exact``, ``approximate`` or ``invalid``
            (:meth:`~amkd_monai.data.sampling.Augmentation.check_features`).
        seed: seed of the run.
        amp: bfloat16 autocast of the student's forward (GPU).
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        targets: TeacherTargets | None = None,
        augmentation: Augmentation | None = None,
        warped_features: str = "approximate",
        seed: int = 0,
        amp: bool = False,
        inferer: Inferer | None = None,
        postprocessing: Transform | None = None,
        key_train_metric: dict | None = None,
        train_handlers: Sequence | None = None,
    ) -> None:
        self.targets = targets if targets is not None and len(targets) else None
        self.augmentation = augmentation or Augmentation()
        teachers = [] if self.targets is None or self.targets.views > 1 else self.targets.teachers
        if any(teacher.features is not None for teacher in teachers):
            self.augmentation.check_features(warped_features)
        slices = getattr(getattr(getattr(network, "module", network), "student", None), "slices", 1)
        if slices != self.augmentation.together:
            what = f"patches of {self.augmentation.together} slices, the student takes {slices}"
            raise ValueError(f"The training batches hold {what}: set recipe#slices to {slices}.")
        if slices > 1 and self.targets is not None and self.targets.views > 1:
            raise ValueError("A 3D student's slices are changed alike: set `views` to 1.")
        self.seed, self.generator, self.faults = seed, torch.Generator(), Faults()
        loss = nn.Identity()  # the distiller computes it
        options: dict[str, Any] = {"inferer": inferer, "postprocessing": postprocessing, "amp": amp}
        options |= {"key_train_metric": key_train_metric, "train_handlers": train_handlers, "optim_set_to_none": True}
        options["decollate"] = postprocessing is not None
        super().__init__(device, max_epochs, train_data_loader, network, optimizer, loss, **options)
        self.state.distillation = None
        if idist.get_rank() > 0:
            self.logger.setLevel("WARNING")
        self.add_event_handler(Events.EPOCH_STARTED, type(self)._start_epoch)

    def _start_epoch(self) -> None:
        sampler = self.data_loader.batch_sampler
        sampler.set_epoch(self.state.epoch)
        distiller: Any = getattr(self.network, "module", self.network)
        self.learns_labels = self._learns_labels(sampler, distiller)
        self._seed_epoch(sampler.rank)

    def _learns_labels(self, sampler: BatchSampler, distiller: Distiller) -> bool:
        """Whether labels are learnt in this epoch; leaves unlabelled samples out behind the first stage."""
        done = (self.state.epoch - 1) / self.state.max_epochs
        stages = len(sampler.unlabelled) > 0 and distiller.learns_answers
        sampler.labelled_only = not distiller.teachers or (stages and 0 < sampler.first_stage <= done)
        return not (stages and done < sampler.first_stage)

    def _seed_epoch(self, rank: int) -> None:
        """Make all that is random in this epoch follow from the seed, the epoch and the process."""
        seed = (self.seed * 1_000_003 + self.state.epoch) * 1_009 + rank
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)

    @property
    def progress(self) -> float:
        """Part of the run that is done, in [0, 1]."""
        total = self.state.max_epochs * (self.state.epoch_length or 1)
        return min(1.0, (self.state.iteration - 1) / max(1, total))

    def prepare_distillation_batch(self, data: dict[str, Any]) -> Batch:
        """Bring a loader's batch to the device, read the teachers' targets and augment all alike."""
        return distillation_batch(data, self.targets, self.augmentation, self.generator, self.state.device)

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Tensor]:
        batch = self.prepare_distillation_batch(batchdata)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.image.device.type, dtype=torch.bfloat16, enabled=self.amp):
            result: DistillationOutput = self.network(batch, self.progress, self.learns_labels)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        self._check(result)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        result.total.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self.optimizer.step()
        self.state.distillation = result
        engine.state.output = {
            Keys.IMAGE: batch.labelled(batch.image),
            Keys.LABEL: batch.labelled(batch.label),
            Keys.PRED: batch.labelled(result.logits).detach(),
            Keys.LOSS: result.total.detach(),
        }
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    def _check(self, result: DistillationOutput, of: str = "") -> None:
        """Note a loss that is not finite; refuse it once in an interval, and before anything is kept."""
        fault = ~torch.isfinite(result.total.detach())
        step = torch.full_like(fault, self.state.iteration, dtype=torch.long)
        remedy = "lower the learning rate; the checkpoints of earlier epochs are kept."
        self.faults.note(f"The loss{of} is not finite in step {{}}: {remedy}", fault, step)
        if self.state.iteration % INTERVAL == 0 or self.state.iteration % (self.state.epoch_length or 1) == 0:
            for module in self.network.modules():
                if isinstance(module, Distiller):
                    module.faults.read()
            self.faults.read()


def distillation_batch(
    data: dict[str, Any],
    targets: TeacherTargets | None,
    augmentation: Augmentation,
    generator: torch.Generator,
    device: torch.device,
    task: int = 0,
) -> Batch:
    """Bring a loader's batch to the device, read the teachers' targets and augment all alike."""
    image = data["image"].to(device).float() / 255
    label = data["label"].to(device)
    indices, views = data["index"].tolist(), None
    if targets is not None and targets.views > 1:  # the student is shown what is stored
        views = torch.randint(targets.views, (len(image),), generator=generator).tolist()
        theta = targets.view_matrices(indices, views).to(device)
    else:
        theta = augmentation.sample(len(image), image.shape[-2:], generator).to(device)
    teachers = targets.read(indices, device, theta, views) if targets is not None else {}
    image = augmentation.photometric(warp(image, theta), generator)
    label = label.long() if label.ndim < 4 else warp(label.float(), theta, mode="nearest").round().long()
    image = image.contiguous(memory_format=torch.channels_last)
    return Batch(image, label, data["has_label"], teachers, data["index"].to(device), task=task)


def _pooled_features(store: FeatureStore) -> Tensor:
    """Mean over the cells of the cached features of each sample, (N, C) float32."""
    samples = range(len(store))
    batches = (store.read("grid", samples[start : start + 64]) for start in range(0, len(store), 64))
    return torch.cat([torch.from_numpy(batch.astype(np.float32).mean((2, 3))) for batch in batches])
