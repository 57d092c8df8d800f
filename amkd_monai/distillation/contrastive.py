"""Contrastive distillation: pulls a student's image vector to its teacher's vector and away from others."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation.interface import Counter
from amkd_monai.errors import check_number

COOLEST, WARMEST = 0.03, 0.3  # range of the temperature


@dataclass(frozen=True)
class SampleTable:
    """What contrastive distillation must know of the whole training dataset of n samples."""

    vectors: Mapping[str, Tensor]  # {teacher: pooled features (n, C)}
    # (n,) integers; samples of one group (image, patient, volume, duplicates) are never negatives of each other
    groups: Tensor
    # (n,) class per sample, -1 where unknown; None for masks. Equal classes are never negatives.
    classes: Tensor | None = None


def contrastive_loss(similar: Tensor, own: Tensor, eligible: Tensor, temperature: Tensor | float) -> Tensor:
    """Cross entropy (B,) of finding the own teacher vector among the eligible ones (Tian et al., CRD, ICLR 2020).

    ``similar`` (B, m) and ``own`` (B,) are cosines of the student's vectors with m teacher vectors and with their own;
    ``eligible`` (B, m) marks the negatives among the m. A sample without any costs 0.
    """
    negatives = torch.where(eligible, similar.float() / temperature, -torch.inf)
    scores = torch.cat([own.float()[:, None] / temperature, negatives], dim=1)
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device), reduction="none")


class ContrastiveDistillation(Counter):
    """Heads from the pooled student map to each teacher's pooled standardised vectors, and the negatives.

    Up to ``negatives`` samples are drawn for each sample in every step. The temperature, trained if ``learnable``, and
    the count of steps are part of the state; the table of vectors is not.
    """

    def __init__(
        self,
        channels: int,
        samples: SampleTable,
        temperature: float = 0.07,
        learnable: bool = True,
        negatives: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__("step")
        check_number("contrastive#temperature", temperature, COOLEST, WARMEST)
        check_number("contrastive#negatives", negatives, 1, whole=True)
        self.negatives, self.seed = negatives, seed
        self.heads = nn.ModuleDict()
        self.table: dict[str, Tensor] = {}
        for name, vectors in samples.vectors.items():
            if not bool(torch.isfinite(vectors).all()):
                raise ValueError(f"The teacher '{name}' has pooled features that are not finite: rebuild its cache.")
            vectors = vectors.float()
            deviation = vectors.std(0, unbiased=False)
            deviation = torch.where(deviation > 1e-6, deviation, 1)
            self.table[name] = F.normalize((vectors - vectors.mean(0)) / deviation, dim=1)
            hidden = nn.LayerNorm(channels), nn.Linear(channels, 128), nn.GELU()
            self.heads[name] = nn.Sequential(*hidden, nn.Linear(128, vectors.shape[1]))
        self.groups, self.classes = samples.groups.long(), samples.classes
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learnable)

    @property
    def temperature(self) -> Tensor:
        """The temperature, a scalar within its range."""
        return self.log_temperature.exp().clamp(COOLEST, WARMEST)

    def forward(self, features: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        """Compute the loss of each teacher, {teacher: (B,)}, of a student map (B, C, h, w).

        ``index`` is the position of each sample in the training dataset (B,); none, or one beyond the table, is a
        ValueError. Each counted step draws new negatives.
        """
        if index is None:
            raise ValueError("Contrastive distillation needs the index of each sample: give the batch its index.")
        low, high, n = int(index.min()), int(index.max()), len(self.groups)
        if low < 0 or high >= n:
            raise ValueError(f"A batch has the samples {low} to {high} of {n}: prepare the targets for this dataset.")
        device = features.device
        if self.groups.device != device:
            self.groups = self.groups.to(device)
            self.classes = None if self.classes is None else self.classes.to(device)
            self.table = {name: vectors.to(device) for name, vectors in self.table.items()}
        index, pooled = index.to(device), features.float().mean((2, 3))
        keep, eligible = self._draw(self.eligible(index))
        out = {}
        for name, head in self.heads.items():
            student = F.normalize(head(pooled), dim=1)
            own = (student * self.table[name][index]).sum(1)
            similar = (student @ self.table[name].T).gather(1, keep)
            out[name] = contrastive_loss(similar, own, eligible, self.temperature)
        return out

    def eligible(self, index: Tensor) -> Tensor:
        """Which of all n samples may be negatives of which samples (B,): (B, n)."""
        allowed = self.groups[index][:, None] != self.groups[None, :]
        if self.classes is not None:
            own, other = self.classes[index][:, None], self.classes[None, :]
            allowed = allowed & ((own != other) | (own < 0))
        return allowed

    def _draw(self, eligible: Tensor) -> tuple[Tensor, Tensor]:
        """Draw min(negatives, n) samples per row: columns (B, m') and whether each is eligible (B, m')."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        keys = torch.rand(eligible.shape, generator=generator).to(eligible.device)
        keep = torch.where(eligible, keys, -1.0).topk(min(self.negatives, eligible.shape[1]), dim=1).indices
        return keep, eligible.gather(1, keep)
