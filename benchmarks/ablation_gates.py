"""Teacher gates that only the ablation compares with; a run reaches them by their dotted path."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from amkd_monai.distillation.gates import GateReading, GateSetup, TeacherGate


class FixedGate(TeacherGate):
    """Given weights, {teacher: weight >= 0}, shared among the available teachers in proportion."""

    def __init__(self, setup: GateSetup, weights: Mapping[str, float]) -> None:
        super().__init__(setup)
        self.given = [float(weights[t.name]) for t in self.teachers]

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """The shares (B, K, h, w)."""
        masked = torch.tensor(self.given, device=available.device) * available
        weights = masked / masked.sum(-1, keepdim=True).clamp_min(1e-12)
        return weights[..., None, None].expand_as(reading.errors)


class BestSingleGate(TeacherGate):
    """The available teacher of the highest cross-fitted score alone."""

    def __init__(self, setup: GateSetup) -> None:
        super().__init__(setup)
        self.scores = [-torch.inf if t.score is None else float(t.score) for t in self.teachers]

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """1 for the best available teacher (B, K, h, w), 0 where none has a score."""
        ranked = torch.where(available.bool(), torch.tensor(self.scores, device=available.device), -torch.inf)
        chosen = F.one_hot(ranked.argmax(-1), ranked.shape[-1]) * torch.isfinite(ranked.max(-1, keepdim=True).values)
        return chosen.float()[..., None, None].expand_as(reading.errors)
