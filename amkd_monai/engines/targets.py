"""The targets of a run: what its teachers' stores hold for the training samples, read by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amkd_monai.cache.build import to_device
from amkd_monai.cache.probes import pooled_features
from amkd_monai.cache.store import FeatureStore
from amkd_monai.cache.views import MATRIX
from amkd_monai.data.augment import warp
from amkd_monai.distillation import SampleTable, TeacherTarget


class TeacherTargets:
    """Targets of all teachers over the training dataset.

    Args:
        teachers: those that teach.
        prior_entropy: entropy of the label prior of the training split, nats.
        record: facts for the run record; its ``teachers`` also describe those that teach nothing.
        groups: group of each training sample; samples of one group are never contrasts of each other.
        classes: class of each training sample, -1 where unknown; nor are samples of one class. None for masks.
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

    def __len__(self) -> int:
        return len(self.teachers)

    def samples_for(self, losses: Mapping[str, float]) -> SampleTable | None:
        """Return the pooled features of all training samples if the contrastive loss is asked for, else None."""
        if not losses.get("contrastive") or not self.teachers:
            return None
        numbers = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        vectors = {t.name: pooled_features(t.features) for t in self.teachers if t.features is not None}
        classes = None if self.classes is None else torch.from_numpy(self.classes).long()
        return SampleTable(vectors, torch.tensor([numbers[group] for group in self.groups], dtype=torch.long), classes)

    def pooled(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Mean over the cells of the cached features of some samples, {teacher: (N, C) float32}."""
        return {t.name: pooled_features(t.features, indices).numpy() for t in self.teachers if t.features is not None}

    @property
    def identity(self) -> list[tuple[str, str, bool]]:
        """Name, fingerprint and admission of each teacher: what must be equal for a run to be resumed."""
        variant = f", {self.views} views" if self.views > 1 else ""
        return [(t.name, t.fingerprint + variant, t.admitted) for t in self.teachers]

    @property
    def has_features(self) -> bool:
        """Whether some teacher's feature maps are distilled."""
        return any(t.features is not None for t in self.teachers)

    def view_matrices(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Affine matrices (B, 2, 3) that turn the image of a sample into the view of it that the teachers saw.

        Raises:
            ValueError: two stores hold different views of one image.
        """
        several = [store for store in self._stores if store.views > 1]
        first, *others = (store.read(MATRIX, indices, views) for store in several)
        for store, matrices in zip(several[1:], others, strict=True):
            if not np.allclose(first, matrices, atol=1e-6):
                raise ValueError(
                    f"{store.directory} and {several[0].directory} hold different views of one image: delete the older "
                    "one to build it again."
                )
        return torch.from_numpy(first)

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        device: torch.device | str,
        theta: Tensor | None = None,
        views: Sequence[int] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Return {teacher: {"grid": (B, C, h, w), "logits": (B, classes, h', w')}} as float32, logits calibrated.

        Args:
            indices: B training samples.
            device: of the result.
            theta: (B, 2, 3) by which the images are warped; None for the images as they are.
            views: the stored view of each sample that ``theta`` stands for: its maps are read as they are, and what is
                stored for the image alone is warped. None warps everything.
        """

        def maps(store: FeatureStore, array: str, temperature: float | None = None) -> Tensor:
            stored = views if store.views > 1 else None
            values = to_device(store.read(array, indices, 0 if stored is None else stored), device).float()
            values = values if temperature is None else values / temperature
            return values if theta is None or stored is not None else warp(values, theta)

        targets: dict[str, dict[str, Tensor]] = {}
        for teacher in self.teachers:
            outputs = targets.setdefault(teacher.name, {})
            if teacher.features is not None:
                outputs["grid"] = maps(teacher.features, "grid")
            if teacher.answers is not None:
                outputs["logits"] = maps(teacher.answers, "logits", teacher.temperature)
        return targets
