"""Gates for comparison, no defaults: without knowledge of the labels, and those of the published system."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amkd_monai.distillation import gates
from amkd_monai.distillation.gates import GateNetwork, GateReading, GateSetup, LossGate, TeacherGate
from amkd_monai.errors import check_number


class UniformGate(TeacherGate):
    """Equal weights, 1 / n for the n available teachers."""

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """Weights (B, K, h, w), 0 for a teacher that is not available (K,)."""
        return gates.uniform(reading.errors, available).detach()


class PaperGate(TeacherGate):
    """As published: a network's softmax over the teachers, one weight per image, trained by the losses it weighs."""

    looks = True

    def __init__(self, setup: GateSetup, hidden: int = 32) -> None:
        super().__init__(setup)
        if k := len(self.teachers):
            self.network = GateNetwork(setup.channels, k, k, setup.tasks, hidden)

    def score(self, features: Tensor, cosines: Tensor, task: int) -> Tensor:
        """Scores (B, K, h, w), equal in all cells, of the network for the means over the image."""
        assert self.network is not None
        pooled = features.mean((2, 3), keepdim=True), cosines.mean((2, 3), keepdim=True)
        return self.network(*pooled, task).expand(-1, -1, *self.grid)

    def weights(self, reading: GateReading, available: Tensor) -> Tensor:
        """The softmax (B, K, h, w) over the available teachers (K,), with gradient to the network."""
        assert reading.scores is not None
        return gates.gate_probabilities(reading.scores, available)


class FixedLossGate(LossGate):
    """The priors times the strength are the factors, whatever the size of the losses."""

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factor of each loss and of ``task``, numbers."""
        return {"task": 1.0, **{name: strength * prior for name, prior in self.priors.items()}}


class PaperLossGate(LossGate):
    """As published: initial weights times softmax(gate(f) / 2), trained by the losses that it weighs."""

    def __init__(
        self, priors: Mapping[str, float], warmup_steps: int = 100, channels: int = 0, task: float = 1.0
    ) -> None:
        super().__init__(priors)
        check_number("loss_gate_options#task", task, 0)
        self.initial = {"task": task, **self.priors}
        self.gate = nn.Sequential(nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, len(self.initial)))

    def weights(self, strength: float, features: Tensor | None = None) -> Mapping[str, float | Tensor]:
        """Return the factors, scalars, of a map (B, C, h, w): means over the batch, with gradient to the gate."""
        assert features is not None
        shares = torch.softmax(self.gate(features.float().mean((2, 3))) / 2, dim=1).mean(0)
        factors = {n: share * self.initial[n] for n, share in zip(self.initial, shares, strict=True)}
        return {n: factor if n == "task" else strength * factor for n, factor in factors.items()}


GATES = {"uniform": UniformGate, "paper": PaperGate}
LOSS_GATES = {"fixed": FixedLossGate, "paper": PaperLossGate}
