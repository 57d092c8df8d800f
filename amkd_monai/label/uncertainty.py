"""How unsure a student is of its answer about one image, from its probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mask_uncertainty(probabilities: Tensor) -> float:
    """One minus the Soft Dice Confidence: the Dice that the probabilities themselves do not promise the mask.

    For each foreground class, ``1 - 2 sum(p m) / (sum(p) + sum(m))`` with probability p and mask m; the mean of the
    classes. An image on which nothing is found has 1: it is worth a look.

    Source: Borges et al., "Soft Dice Confidence", 2024, https://arxiv.org/abs/2402.10665.

    Args:
        probabilities: (C, H, W) or (C, D, H, W), softmax; channel 0 is background.

    Returns:
        0 (sure) to 1.
    """
    classes = range(1, len(probabilities))
    answer = probabilities.argmax(0)
    values = []
    for index in classes:
        probability, mask = probabilities[index].double(), (answer == index).double()
        values.append(1 - 2 * (probability * mask).sum() / (probability.sum() + mask.sum()).clamp_min(1e-12))
    return float(torch.stack(values).mean())


def class_uncertainty(probabilities: Tensor) -> float:
    """Entropy of class probabilities (C,) as a part of its largest value, ln C: 0 (sure) to 1."""
    p = probabilities.double()
    return float(-torch.xlogy(p, p).sum() / math.log(len(p)))
