"""The gate network: predicts from the student's features how much each teacher may be trusted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amkd_monai.distillation.alignment import ChannelNorm, pool_finer, to_grid

TASK_EMBEDDING = 8
UNUSABLE = -1e9
"""Score in place of minus infinity: a row without any teacher gives no NaN, nor does its gradient."""


class GateNetwork(nn.Module):
    """A multi-layer perceptron, per cell, over features, student-teacher similarity and the task.

    Input per location: normalised student features, their mean over the image, the cosine between the aligned student
    feature and each teacher's target, and an embedding of the data set. Output: one score per slot, plus a bias per
    data set and slot.

    Args:
        channels: of the student map.
        teachers: number K of teachers.
        slots: K, or K + 1 with a slot for abstention (the last one).
        tasks: number of data sets.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: int, teachers: int, slots: int, tasks: int = 1, hidden: int = 32) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.task = nn.Embedding(tasks, TASK_EMBEDDING)
        self.bias = nn.Parameter(torch.zeros(tasks, slots))
        last = nn.Linear(hidden, slots)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # every slot starts alike
        self.layers = nn.Sequential(nn.Linear(2 * channels + teachers + TASK_EMBEDDING, hidden), nn.GELU(), last)

    def forward(self, features: Tensor, cosines: Tensor, task: int = 0) -> Tensor:
        """Return scores (B, slots, h, w).

        Args:
            features: student map (B, C, h', w'), brought to the grid of ``cosines``.
            cosines: similarity of student and teachers (B, K, h, w), 0 where there is none.
            task: number of the data set.

        Raises:
            ValueError: there is no such data set.
        """
        if not 0 <= task < len(self.bias):
            raise ValueError(
                f"The gate knows {len(self.bias)} tasks, not task {task}: raise `tasks` in `gate_options`."
            )
        grid = (cosines.shape[-2], cosines.shape[-1])
        local = self.norm(pool_finer(features, grid)).movedim(1, -1)  # channels last from here on
        whole, embedding = local.mean((1, 2)), self.task.weight[task]
        first, *others = self.layers
        # what is the same in all cells is projected once per image, the features at the student's own size
        parts = first.weight.split([local.shape[-1], whole.shape[-1], cosines.shape[1], len(embedding)], dim=1)
        by_cell = to_grid(F.linear(local, parts[0]).movedim(-1, 1), grid).movedim(1, -1)
        by_image = F.linear(whole, parts[1], first.bias) + F.linear(embedding, parts[3])  # (B, hidden)
        hidden = by_cell + F.linear(cosines.movedim(1, -1), parts[2]) + by_image[:, None, None]
        for layer in others:
            hidden = layer(hidden)
        return (hidden + self.bias[task]).movedim(-1, 1)


def gate_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """Softmax over the slots that may be used.

    Args:
        scores: (B, K or K + 1, h, w); a slot beyond the K teachers is the abstention and always there.
        available: boolean (B, K).

    Returns:
        Like ``scores``; 0 where not available, all 0 where nothing is.
    """
    mask = _usable(scores, available)
    return torch.softmax(torch.where(mask, scores, UNUSABLE), dim=1) * mask


def gate_log_probabilities(scores: Tensor, available: Tensor) -> Tensor:
    """Logarithm of the softmax over the slots that may be used and the abstention.

    Args:
        scores: (B, K + 1, h, w).
        available: boolean (B, K).

    Returns:
        Like ``scores``; finite and very low, probability 0, where not available.
    """
    return torch.log_softmax(torch.where(_usable(scores, available), scores, UNUSABLE), dim=1)


def _usable(scores: Tensor, available: Tensor) -> Tensor:
    slots = available.bool()
    if scores.shape[1] > slots.shape[1]:
        slots = torch.cat([slots, torch.ones_like(slots[:, :1])], dim=1)
    return slots[:, :, None, None]


def with_abstention(trusted: Tensor) -> Tensor:
    """Append what reliabilities (B, K, h, w) leave to 1: (B, K + 1, h, w)."""
    return torch.cat([trusted, (1 - trusted.sum(1, keepdim=True)).clamp_min(0)], dim=1)


def gate_loss(target: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(sg(r) || g) over the teachers and the abstention, per sample.

    Args:
        target: reliabilities r and what they leave (B, K + 1, h, w); no gradient flows into them.
        log_predicted: log g (B, K + 1, h, w).

    Returns:
        (B,) in nats, zero where both agree.
    """
    return F.kl_div(log_predicted, target.detach(), reduction="none").sum(1).flatten(1).mean(1)


def agreement_auc(target: Tensor, predicted: Tensor) -> Tensor:
    """How well g finds the slot that the labels trust most: area under the ROC curve over cells and slots.

    Args:
        target: reliabilities r and what they leave (B, K + 1, h, w).
        predicted: g or log g (B, K + 1, h, w).

    Returns:
        A scalar in [0, 1], 0.5 for a gate that knows nothing; equal values of g count half.
    """
    score = predicted.detach()
    ordered, right = score.flatten().sort().values, score.gather(1, target.argmax(1, keepdim=True)).flatten()
    below = torch.searchsorted(ordered, right), torch.searchsorted(ordered, right, right=True)
    rank = (below[0] + below[1] + 1).double() / 2  # the mean rank of equal values
    positives = len(right)
    pairs = positives * (score.numel() - positives)
    return (rank.sum() - positives * (positives + 1) / 2) / max(1, pairs)
