"""The targets of a run: what all teachers say about the training samples, read by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amkd_monai.cache.build import to_device
from amkd_monai.cache.probes import channel_covariance, pooled_features
from amkd_monai.cache.store import FeatureStore
from amkd_monai.cache.views import MATRIX
from amkd_monai.data.augment import warp
from amkd_monai.distillation import SampleTable, TeacherSpec


@dataclass(frozen=True)
class TeacherSource:
    """Where the targets of one teacher lie.

    Attributes:
        spec: what the distiller must know.
        features: store with ``grid``, or None.
        answers: store with ``logits``, or None.
        temperature: calibration temperature of the logits, fitted on the validation split.
        record: facts for the run record (fingerprint, scores, decision, licence).
    """

    spec: TeacherSpec
    features: FeatureStore | None
    answers: FeatureStore | None
    temperature: float
    record: dict[str, Any]


class TeacherTargets:
    """Targets of all teachers over the training dataset.

    Args:
        sources: one per teacher.
        prior_entropy: entropy of the label prior of the training split, nats.
        record: facts for the run record; ``teachers`` describes all that were asked, those without sources included,
            and by default those of the sources.
        groups: group of each training sample; samples of one group never serve as contrasts of each other.
        classes: class of each training sample, -1 where unknown; nor do samples of one class. None for masks.
    """

    def __init__(
        self,
        sources: Sequence[TeacherSource],
        prior_entropy: float,
        record: dict[str, Any],
        groups: Sequence[str] = (),
        classes: np.ndarray | None = None,
    ) -> None:
        self.classes = classes
        self.sources, self.prior_entropy, self.groups = list(sources), prior_entropy, list(groups)
        self.record = {"teachers": [s.record for s in sources], **record}

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def specs(self) -> list[TeacherSpec]:
        """What the distiller must know of each teacher."""
        return [source.spec for source in self.sources]

    def specs_for(self, return_code: str = "none", standardisation: str = "mean_std") -> list[TeacherSpec]:
        """Like ``specs``, with the covariance of the features where the return code or the standardisation needs it."""
        if return_code != "pca" and standardisation == "mean_std":
            return self.specs
        return [
            replace(s.spec, covariance=channel_covariance(s.features)) if s.features is not None else s.spec
            for s in self.sources
        ]

    def samples_for(self, losses: Mapping[str, float]) -> SampleTable | None:
        """Return the pooled features of all training samples if the contrastive loss is asked for, else None."""
        if not losses.get("contrastive") or not self.sources:
            return None
        numbers = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        vectors = {s.spec.name: pooled_features(s.features) for s in self.sources if s.features is not None}
        classes = None if self.classes is None else torch.from_numpy(self.classes).long()
        return SampleTable(vectors, torch.tensor([numbers[group] for group in self.groups], dtype=torch.long), classes)

    def pooled(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Mean over the cells of the cached features of some samples, {teacher: (N, C) float32}.

        Teachers whose features are not distilled are left out.
        """
        stores = {s.spec.name: s.features for s in self.sources if s.features is not None}
        return {name: pooled_features(store, indices).numpy() for name, store in stores.items()}

    @property
    def identity(self) -> list[tuple[str, str, bool]]:
        """Name, fingerprint and admission of each teacher: what must be equal for a run to be resumed."""
        variant = f", {self.views} views" if self.views > 1 else ""
        records = (source.record for source in self.sources)
        return [(r["name"], r["fingerprint"] + variant, r["outputs_admitted"]) for r in records]

    @property
    def views(self) -> int:
        """Number of stored views of every image."""
        return max((store.views for store in self._stores()), default=1)

    @property
    def has_features(self) -> bool:
        """Whether some teacher's feature maps are distilled."""
        return any(source.features is not None for source in self.sources)

    def view_matrices(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Affine matrices (B, 2, 3) that make the image of a sample the view of it that the teachers saw.

        Raises:
            ValueError: two stores hold different views of one image.
        """
        several = [store for store in self._stores() if store.views > 1]
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
            views: the stored view of each sample that ``theta`` stands for; maps of it are read as they are, what is
                stored for the image alone is warped. None warps everything.
        """

        def maps(store: FeatureStore, array: str, temperature: float | None = None) -> Tensor:
            stored = views if store.views > 1 else None
            values = to_device(store.read(array, indices, 0 if stored is None else stored), device).float()
            values = values if temperature is None else values / temperature
            return values if theta is None or stored is not None else warp(values, theta)

        targets: dict[str, dict[str, Tensor]] = {}
        for source in self.sources:
            said = targets.setdefault(source.spec.name, {})
            if source.features is not None and source.spec.grid is not None:
                said["grid"] = maps(source.features, "grid")
            if source.answers is not None:
                said["logits"] = maps(source.answers, "logits", source.temperature)
        return targets

    def _stores(self) -> list[FeatureStore]:
        return [store for source in self.sources for store in (source.features, source.answers) if store is not None]
