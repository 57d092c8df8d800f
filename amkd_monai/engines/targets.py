"""The targets of a run: what all teachers say about the training samples, read by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amkd_monai.cache.store import FeatureStore
from amkd_monai.distillation.distiller import TeacherSpec


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
    """

    def __init__(self, sources: Sequence[TeacherSource], prior_entropy: float, record: dict[str, Any]) -> None:
        self.sources, self.prior_entropy = list(sources), prior_entropy
        self.record = {**record, "teachers": [s.record for s in sources]}

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def specs(self) -> list[TeacherSpec]:
        """What the distiller must know of each teacher."""
        return [source.spec for source in self.sources]

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
