"""Is a teacher's answer worth learning from? Scores that decide, and are recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.distillation.losses import one_hot_area, soft_cross_entropy

VOLUME_RATIO_TOLERANCE = 0.10
"""A volume teacher that draws more than 10 % too much or too little is not admitted."""


@dataclass(frozen=True)
class AnswerScore:
    """How good answers are on the labelled samples.

    Attributes:
        dice: mean over cases (images or volumes) and foreground classes; cases without foreground are left out.
        cross_entropy: mean over grid cells, nats.
        volume_ratio: predicted by true foreground, over all cases.
    """

    dice: float
    cross_entropy: float
    volume_ratio: float


@torch.inference_mode()
def score_answers(store: FeatureStore, dataset: DecodedDataset, temperature: float = 1.0) -> AnswerScore:
    """Score cached answers against the labels at the decoded size.

    Args:
        store: ``logits`` (N, classes, h, w) of the dataset.
        dataset: its labels (N, 1, H, W).
        temperature: divides the logits (for the cross entropy; Dice does not depend on it).
    """
    classes = dataset.num_classes
    overlap: dict[str, np.ndarray] = {}
    errors: list[float] = []
    labelled = np.flatnonzero(dataset.has_label)
    for start in range(0, len(labelled), 32):
        rows = labelled[start : start + 32]
        logits = torch.from_numpy(store.read("logits", rows)).float() / temperature
        label = torch.from_numpy(np.stack([dataset.labels[i] for i in rows]))
        size = (logits.shape[-2], logits.shape[-1])
        target = one_hot_area(label, classes, size)
        errors += soft_cross_entropy(target, logits.log_softmax(1)).flatten(1).mean(1).tolist()
        answer = F.interpolate(logits, size=label.shape[-2:], mode="bilinear").argmax(1)
        for row, predicted, true in zip(rows, answer, label[:, 0], strict=True):
            sums = overlap.setdefault(dataset.cases[row], np.zeros((classes - 1, 3)))
            for c in range(1, classes):
                p, t = predicted == c, true == c
                sums[c - 1] += [float((p & t).sum()), float(p.sum()), float(t.sum())]
    table = np.stack(list(overlap.values()))  # (cases, classes - 1, 3)
    both, predicted_sum, true_sum = table[..., 0], table[..., 1], table[..., 2]
    valid = true_sum > 0
    dice = 2 * both[valid] / (predicted_sum + true_sum)[valid]
    ratio = predicted_sum.sum() / max(1.0, true_sum.sum())
    return AnswerScore(float(dice.mean()) if valid.any() else 0.0, float(np.mean(errors)), float(ratio))


def prior_entropy(dataset: DecodedDataset) -> float:
    """Entropy in nats of the class frequencies over all labelled pixels: the error of an answer that knows nothing."""
    rows = np.flatnonzero(dataset.has_label)
    counts = np.zeros(dataset.num_classes)
    for i in rows:
        counts += np.bincount(dataset.labels[i].ravel(), minlength=dataset.num_classes)[: dataset.num_classes]
    frequency = (counts / counts.sum()).clip(1e-12)
    return float(-(frequency * np.log(frequency)).sum())
