"""The losses: pure functions from tensors to one value per location or per sample, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from amkd_monai.distillation.deferred import Faults

_DICE_OPTIONS = {
    "include_background": False,
    "softmax": True,
    "to_onehot_y": True,
    "reduction": "none",
    "smooth_nr": 1.0,
    "smooth_dr": 1.0,
}
UNLABELLED = 255
"""Class index of pixels without a label: no loss counts them."""
SURE = 30.0
"""Logit of background, less that of any other class, that stands in for an answer where there is no label."""
_dice, _batch_dice = DiceLoss(**_DICE_OPTIONS), DiceLoss(**_DICE_OPTIONS, batch=True)


def task_loss(logits: Tensor, label: Tensor, batch_dice: bool = False, class_weights: Tensor | None = None) -> Tensor:
    """The task's loss per sample (B,): that of classes for logits (B, C), that of masks for logits (B, C, H, W).

    Labels must be in 0 to C - 1 (:func:`note_classes`).
    """
    if logits.ndim == 2:
        return classification_task_loss(logits, label, class_weights)
    return segmentation_task_loss(logits, label, batch_dice)


def classification_task_loss(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy per sample.

    Args:
        logits: (B, C).
        label: class indices (B,), integer.
        class_weights: (C,) factors of the classes; their scale matters, a mean of 1 over the samples is meant.

    Returns:
        (B,) in nats, times the weight of the sample's class.

    Raises:
        ValueError: the labels are no classes of images.
    """
    if label.ndim != 1:
        raise ValueError("The student answers one class per image, the labels are masks: use a student for masks.")
    weights = None if class_weights is None else class_weights.to(logits).float()
    return F.cross_entropy(logits.float(), label.long(), weight=weights, reduction="none")


def note_classes(faults: Faults, label: Tensor, classes: int) -> None:
    """Note labels, masks (B, 1, H, W) or classes (B,), that are not in 0 to C - 1; masks may hold 255."""
    lowest, highest = torch.aminmax(torch.where(label == UNLABELLED, 0, label) if label.ndim > 1 else label)
    faults.note(
        f"A label holds the class {{}}, the student has classes 0 to {classes - 1}: correct the label or num_classes.",
        (lowest < 0) | (highest >= classes),
        torch.where(lowest < 0, lowest, highest),
    )


def as_map(logits: Tensor) -> Tensor:
    """Logits as a map (B, C, h, w); one answer per image (B, C) becomes a map of one cell (B, C, 1, 1)."""
    return logits[:, :, None, None] if logits.ndim == 2 else logits


def without_unlabelled(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Make both logits (B, C, ...) and label (B, 1, ...) background where the label is 255: no gradient flows there."""
    ignored = label == UNLABELLED
    sure = SURE * (torch.arange(logits.shape[1], device=logits.device) == 0).to(logits.dtype)
    return torch.where(ignored, sure.view(-1, *[1] * (logits.ndim - 2)), logits), label.masked_fill(ignored, 0)


def segmentation_task_loss(logits: Tensor, label: Tensor, batch_dice: bool = False) -> Tensor:
    """Soft Dice plus cross entropy per sample.

    Args:
        logits: (B, C, H, W).
        label: class indices (B, 1, H, W), integer; 255 is no label and counts in neither loss.
        batch_dice: pool overlaps over the batch, as for slices of volumes, many of which show no foreground; else
            every image counts alike, as in the per-image metric.

    Returns:
        (B,): mean soft Dice loss of the foreground classes plus mean cross entropy (nats).

    Raises:
        ValueError: the labels are no masks.
    """
    if label.ndim != 4:
        raise ValueError("The student answers masks, the labels are one class per image: use a student for classes.")
    known = (label != UNLABELLED).flatten(1).sum(1)
    logits, label = without_unlabelled(logits.float(), label)
    dice = _batch_dice(logits, label).mean() if batch_dice else _dice(logits, label).flatten(1).mean(1)
    cross_entropy = F.cross_entropy(logits, label[:, 0].long(), reduction="none").flatten(1).mean(1)
    return dice + cross_entropy * (label[0].numel() / known.clamp_min(1))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two maps over their channels, 0 where one of them is 0.

    ``F.cosine_similarity`` divides both maps by their norms; this divides the products alone, in fewer passes.

    Args:
        a: (B, C, h, w), floating point.
        b: like ``a``.

    Returns:
        (B, h, w) in [-1, 1].
    """
    norms = a.square().sum(1).clamp_min(1e-16).sqrt() * b.square().sum(1).clamp_min(1e-16).sqrt()
    return (a * b).sum(1) / norms


def feature_loss(aligned: Tensor, target: Tensor, similar: Tensor | None = None) -> Tensor:
    """Half cosine distance, half smooth L1, per location (UNIC and DUNE use this pair).

    Args:
        aligned: student features projected to the teacher's space (B, C, h, w).
        target: standardised teacher features (B, C, h, w); no gradient flows into them.
        similar: their cosine (B, h, w) with its gradient, where it is known already.

    Returns:
        (B, h, w), zero for equal inputs.
    """
    aligned, target = aligned.float(), target.detach().float()
    similar = cosine(aligned, target) if similar is None else similar
    distance = F.smooth_l1_loss(aligned.movedim(1, -1), target.movedim(1, -1), reduction="none")  # (B, h, w, C)
    # a sum's gradient needs no full-size map of its own, a mean's does
    return 0.5 * (1 - similar) + distance.sum(-1) * (0.5 / distance.shape[-1])


def output_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation of class probabilities per location: T^2 KL(teacher || student) (Hinton et al., 2015).

    Args:
        student_logits: (B, C, h, w).
        teacher_logits: (B, C, h, w), calibrated, or those of K teachers (K, B, C, h, w); no gradient flows into them.
        temperature: KD temperature T >= 1.

    Returns:
        (B, h, w), or (K, B, h, w), in nats, zero for equal logits.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-3)
    log_teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-3)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-3)
    return temperature**2 * divergence.clamp_min(0)


def soft_cross_entropy(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """Cross entropy (..., h, w) of soft targets (..., C, h, w) against log-probabilities (..., C, h, w), in nats."""
    return -(target * log_probabilities).sum(-3)


def by_size(maps: Mapping[str, Tensor]) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Group maps {name: (B, C, h, w)} by their grid, {(h, w): {name: map}}: those of one grid are computed together."""
    groups: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, values in maps.items():
        groups.setdefault((values.shape[-2], values.shape[-1]), {})[name] = values
    return groups


def one_hot_area(label: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """Area fractions of each class in the cells of a coarser grid.

    Args:
        label: class indices (B, 1, H, W), integer; 255 is no label.
        classes: number of classes C.
        size: (h, w) of the grid.

    Returns:
        (B, C, h, w), fractions of the labelled part of a cell: 1 in sum over the classes, 0 where nothing is labelled.

    Raises:
        ValueError: a label is not in 0 to C - 1.
    """
    faults = Faults()
    note_classes(faults, label, classes)
    faults.read()
    return class_areas(label, classes, size)


def class_areas(label: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """As :func:`one_hot_area`, for labels that are known to be in 0 to C - 1."""
    one_hot = label == torch.arange(1, classes, device=label.device)[:, None, None]  # (B, 1, H, W) -> (B, C - 1, H, W)
    area = F.adaptive_avg_pool2d(one_hot.float(), size)
    known = F.adaptive_avg_pool2d((label != UNLABELLED).float(), size)
    area = area / known.clamp_min(1e-6)
    return torch.cat([((known > 0).float() - area.sum(1, keepdim=True)).clamp_min(0), area], dim=1)


def area_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-pool logits (B, C, H, W) to a coarser grid (h, w); the same size passes through."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.adaptive_avg_pool2d(logits.contiguous(), size)  # few channels: slow where they lie side by side
