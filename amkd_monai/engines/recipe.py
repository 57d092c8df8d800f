"""The training recipe: everything a student's training needs besides the distillation itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from amkd_monai.data.augment import Augmentation
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.sampling import BatchSampler

_RANGES = {
    "batch_size": (1, math.inf),
    "learning_rate": (1e-12, math.inf),
    "encoder_learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "labelled_fraction": (1e-12, 1),
    "foreground_fraction": (0, 1),
    "min_steps": (1, math.inf),
}
_WHOLE = ("batch_size", "warmup_steps", "min_steps")


@dataclass(frozen=True)
class Recipe:
    """Batches, augmentation and optimiser of a training; shared by the main run and by cross-fitting.

    Attributes:
        batch_size: samples per process and step.
        learning_rate: of everything but the encoder.
        encoder_learning_rate: of the pretrained encoder.
        weight_decay: of AdamW, not on biases and norms.
        warmup_steps: linear warm-up of the learning rate.
        labelled_fraction: part of a batch that is labelled, where unlabelled samples take part.
        foreground_fraction: part of the labelled picks that show foreground; None takes them as they come.
        class_balance: draws classes as often as they occur (0) to equally often (1); needs one class per image.
        class_weighting: weights the task's loss of a class by n^-class_weighting, 1 on average over the samples.
        min_steps: steps that an epoch has at least, for few samples.
        batch_dice: pool the task's soft Dice over the batch (slices of volumes).
        augmentation: options of :class:`amkd_monai.data.augment.Augmentation`.

    Raises:
        ValueError: a value is out of range, or not a number.
    """

    batch_size: int = 8
    learning_rate: float = 2e-3
    encoder_learning_rate: float = 8e-4
    weight_decay: float = 1e-3
    warmup_steps: int = 20
    labelled_fraction: float = 0.5
    foreground_fraction: float | None = None
    class_balance: float = 0.0
    class_weighting: float = 0.0
    min_steps: int = 1
    batch_dice: bool = False
    augmentation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value, whole = getattr(self, name), name in _WHOLE
            if name == "foreground_fraction" and value is None:
                continue
            number = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
            if not number or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(
                    f"recipe#{name} is {value!r}: give a {'whole ' if whole else ''}number from {low} to {high}."
                )

    def describe(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return asdict(self)

    def augment(self) -> Augmentation:
        """Return the augmentation."""
        return Augmentation(**self.augmentation)

    def loader(
        self,
        dataset: DecodedDataset,
        seed: int,
        use_unlabelled: bool = False,
        indices: Sequence[int] | np.ndarray | None = None,
        distributed: bool = True,
        num_workers: int = 0,
    ) -> DataLoader:
        """Return the loader of training batches.

        Args:
            dataset: decoded training data.
            seed: seed of the run.
            use_unlabelled: draw unlabelled samples too.
            indices: restrict to these samples.
            distributed: give each process of torch.distributed its own part.
            num_workers: loader processes; 0 is fastest for memory-mapped data.
        """
        sampler = BatchSampler(
            dataset.has_label,
            dataset.has_foreground,
            self.batch_size,
            seed=seed,
            use_unlabelled=use_unlabelled,
            labelled_fraction=self.labelled_fraction,
            foreground_fraction=self.foreground_fraction,
            classes=dataset.classes,
            class_balance=self.class_balance,
            indices=indices,
            min_steps=self.min_steps,
            rank=idist.get_rank() if distributed else 0,
            world_size=idist.get_world_size() if distributed else 1,
        )
        return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)

    def class_weights(self, dataset: DecodedDataset) -> Tensor | None:
        """Return the weight of each class in the task's loss (C,), from its labelled samples; None for equal weights.

        Raises:
            ValueError: labels are masks.
        """
        if self.class_weighting == 0:
            return None
        if dataset.classes is None:
            raise ValueError("class_weighting needs one class per image, the labels are masks: set it to 0.")
        counts = np.bincount(dataset.classes[dataset.has_label], minlength=dataset.num_classes).astype(float)
        weights = np.maximum(counts, 1) ** -self.class_weighting
        return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()

    def optimizer(self, distiller: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW with the encoder's own learning rate and no decay on biases and norms."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in distiller.named_parameters():
            if parameter.requires_grad:
                rate = self.encoder_learning_rate if "student.encoder." in name else self.learning_rate
                groups.setdefault((rate, self.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
        )

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> WarmupCosineSchedule:
        """Return linear warm-up and cosine decay to 0 over ``steps`` optimiser steps."""
        warmup = min(self.warmup_steps, max(1, steps // 5))
        return WarmupCosineSchedule(optimizer, warmup_steps=warmup, t_total=max(steps, 1), warmup_multiplier=0.02)
