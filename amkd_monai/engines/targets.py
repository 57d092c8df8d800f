"""The targets of a run: what all teachers say about the training samples, read by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amkd_monai.cache.probes import channel_covariance, pooled_features
from amkd_monai.cache.store import FeatureStore
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
        record: facts for the run record beside the teachers' own.
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
        self.record = {**record, "teachers": [s.record for s in sources]}

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def specs(self) -> list[TeacherSpec]:
        """What the distiller must know of each teacher."""
        return [source.spec for source in self.sources]

    def specs_for(self, return_code: str = "none", standardisation: str = "mean_std") -> list[TeacherSpec]:
        """Like ``specs``, with the covariance of the features where the return code or the standardisation needs it."""
        if return_code != "pca" and standardisation != "phi_s":
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

    @property
    def identity(self) -> list[tuple[str, str, bool]]:
        """Name, fingerprint and admission of each teacher: what must be equal for a run to be resumed."""
        return [(r["name"], r["fingerprint"], r["outputs_admitted"]) for r in (s.record for s in self.sources)]

    def read(self, indices: Sequence[int] | np.ndarray, device: torch.device | str) -> dict[str, dict[str, Tensor]]:
        """Return {teacher: {"grid": (B, C, h, w), "logits": (B, classes, h', w')}} as float32, logits calibrated."""
        targets: dict[str, dict[str, Tensor]] = {}
        for source in self.sources:
            maps: dict[str, Tensor] = {}
            if source.features is not None and source.spec.grid is not None:
                maps["grid"] = torch.from_numpy(source.features.read("grid", indices)).to(device).float()
            if source.answers is not None:
                logits = torch.from_numpy(source.answers.read("logits", indices)).to(device).float()
                maps["logits"] = logits / source.temperature
            targets[source.spec.name] = maps
        return targets
