"""The losses: pure functions from tensors to one value per location or per sample, in float32."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from amkd_monai.distillation.interface import Faults

_DICE: dict[str, Any] = {"include_background": False, "softmax": True, "to_onehot_y": True, "reduction": "none"}
_DICE |= {"smooth_nr": 1.0, "smooth_dr": 1.0}
OVERLAP_SMOOTHING = 0.1
"""Cells added to both sides of the overlap with a teacher, for images without foreground."""
UNLABELLED = 255
"""Class index of pixels without a label: no loss counts them."""
SURE = 30.0
"""Logit of background, relative to every other class, that replaces an answer where there is no label."""
_dice, _batch_dice = DiceLoss(**_DICE), DiceLoss(**_DICE, batch=True)


def task_loss(logits: Tensor, label: Tensor, batch_dice: bool = False) -> Tensor:
    """The supervised loss per sample: cross entropy of classes and findings, :func:`segmentation_task_loss` of masks.

    Logits (B, C), (B, 2, F) or (B, C, H, W) meet class indices in 0 to C - 1, (B,), (B, F) or (B, 1, H, W), else a
    ValueError; the result is (B,), in nats, of F findings their mean: the binary cross entropy.
    """
    if logits.ndim == 4:
        return segmentation_task_loss(logits, label, batch_dice)
    if label.ndim != logits.ndim - 1:
        what = "one class" if logits.ndim == 2 else "several findings"
        raise ValueError(f"The student predicts {what} per image, the labels are others: use a student for them.")
    loss = F.cross_entropy(logits.float(), label.long(), reduction="none")
    return loss if loss.ndim == 1 else loss.mean(1)


def segmentation_task_loss(logits: Tensor, label: Tensor, batch_dice: bool = False) -> Tensor:
    """Mean soft Dice loss of the foreground classes plus mean cross entropy (nats) per sample (B,).

    ``batch_dice`` pools overlaps over the batch, as for slices of volumes, many of which show no foreground; else every
    image counts alike, as in the per-image metric. Pixels labelled 255 count in neither loss; no masks, a ValueError.
    """
    if label.ndim != 4:
        raise ValueError("The student predicts masks, the labels are of whole images: use a student for classes.")
    ignored = label == UNLABELLED
    known = (~ignored).flatten(1).sum(1)
    background = SURE * (torch.arange(logits.shape[1], device=logits.device) == 0).float()
    logits = torch.where(ignored, background[:, None, None], logits.float())  # no gradient flows there
    label = label.masked_fill(ignored, 0)
    dice = _batch_dice(logits, label).mean() if batch_dice else _dice(logits, label).flatten(1).mean(1)
    cross_entropy = F.cross_entropy(logits, label[:, 0].long(), reduction="none").flatten(1).mean(1)
    return dice + cross_entropy * (label[0].numel() / known.clamp_min(1))


def note_classes(faults: Faults, label: Tensor, classes: int) -> None:
    """Note masks (B, 1, H, W), classes (B,) or findings (B, F) that are not in 0 to C - 1; masks may hold 255."""
    lowest, highest = torch.aminmax(torch.where(label == UNLABELLED, 0, label) if label.ndim == 4 else label)
    faults.note(
        f"A label holds the class {{}}, the student has classes 0 to {classes - 1}: correct the label or num_classes.",
        (lowest < 0) | (highest >= classes),
        torch.where(lowest < 0, lowest, highest),
    )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (B, h, w) of two maps (B, C, h, w) over their channels, 0 where one of them is 0.

    ``F.cosine_similarity`` divides both maps by their norms; this divides the products alone, in fewer passes.
    """
    norms = a.square().sum(1).clamp_min(1e-16).sqrt() * b.square().sum(1).clamp_min(1e-16).sqrt()
    return (a * b).sum(1) / norms


def feature_loss(aligned: Tensor, target: Tensor, similar: Tensor | None = None) -> Tensor:
    """Half cosine distance, half smooth L1, per location (B, h, w) (UNIC and DUNE use this pair).

    Of student features projected to the teacher's space and standardised teacher features (B, C, h, w), into which no
    gradient flows; ``similar`` is their cosine (B, h, w) with its gradient, where it is known already.
    """
    aligned, target = aligned.float(), target.detach().float()
    similar = cosine(aligned, target) if similar is None else similar
    distance = F.smooth_l1_loss(aligned.movedim(1, -1), target.movedim(1, -1), reduction="none")  # (B, h, w, C)
    # a sum's gradient needs no full-size map of its own, a mean's does
    return 0.5 * (1 - similar) + distance.sum(-1) * (0.5 / distance.shape[-1])


def reconstruction_loss(restored: Tensor, target: Tensor) -> Tensor:
    """0.5 MSE + 0.3 L1 + 0.2 (1 - cos) per location (B, h, w) (Liu et al., MultiMedDistill, 2026).

    Of restored and standardised teacher features (B, C, h, w); no gradient flows into the target.
    """
    restored, target = restored.float(), target.detach().float()
    difference = (restored - target).movedim(1, -1)  # (B, C, h, w) -> (B, h, w, C)
    direction = 1 - cosine(restored, target)
    magnitude = difference.square().sum(-1) * 0.5 + difference.abs().sum(-1) * 0.3  # sums: see feature_loss
    return magnitude / difference.shape[-1] + 0.2 * direction


def output_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation of class probabilities per location: T^2 KL(teacher || student) (Hinton et al., 2015).

    Student logits (B, C, h, w) and calibrated logits of one or of K teachers ((K,) B, C, h, w) give ((K,) B, h, w) in
    nats; no gradient flows into the teachers.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=-3)
    log_teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-3)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-3)
    return temperature**2 * divergence.clamp_min(0)


def overlap_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """1 - soft Dice of the foreground probabilities, per image (B, 1, 1), so that small targets count like large ones.

    Shapes as in :func:`output_loss`, of maps. Squares in the denominator make equal probabilities its minimum
    (Milletari et al., V-Net, 3DV 2016); the temperature does not enter.
    """
    student, teacher = (x.float().softmax(-3)[..., 1:, :, :] for x in (student_logits, teacher_logits.detach()))
    both = (student * teacher).sum((-2, -1))
    squares = student.square().sum((-2, -1)) + teacher.square().sum((-2, -1))
    return (1 - (2 * both + OVERLAP_SMOOTHING) / (squares + OVERLAP_SMOOTHING)).mean(-1)[..., None, None]


def soft_cross_entropy(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """Cross entropy (..., h, w) of soft targets (..., C, h, w) against log-probabilities (..., C, h, w), in nats."""
    return -(target * log_probabilities).sum(-3)


def as_map(logits: Tensor) -> Tensor:
    """Logits as a map (B, C, h, w); those about images, (B, C) and (B, 2, F), become (B, C, 1, 1), (B, 2, F, 1)."""
    return logits[(..., *[None] * (4 - logits.ndim))]


def label_map(label: Tensor) -> Tensor:
    """Labels as maps (B, 1, h, w): masks as they are, classes (B,) of one cell, findings (B, F) of F cells."""
    return label if label.ndim == 4 else label.reshape(len(label), 1, -1, 1)


def by_size(maps: Mapping[str, Tensor]) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Group maps {name: (B, C, h, w)} by their grid, {(h, w): {name: map}}: maps of one grid are computed together."""
    groups: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, values in maps.items():
        groups.setdefault((values.shape[-2], values.shape[-1]), {})[name] = values
    return groups


def one_hot_area(label: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """As :func:`class_areas`, (B, C, h, w); a label (B, 1, H, W) other than 0 to C - 1 or 255 is a ValueError."""
    faults = Faults()
    note_classes(faults, label, classes)
    faults.read()
    return class_areas(label, classes, size)


def class_areas(label: Tensor, classes: int, size: tuple[int, int]) -> Tensor:
    """Area fractions (B, C, h, w) of each class in the cells of a coarser grid, of labels (B, 1, H, W) in 0 to C - 1.

    Fractions refer to the labelled part of a cell (label not 255): 1 in sum, 0 where nothing is labelled.
    """
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


def pool_finer(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-pool student features (B, C, H, W) that are finer than a grid (h, w); others pass through."""
    height, width = features.shape[-2:]
    if (height, width) == tuple(size) or height < size[0] or width < size[1]:
        return features
    return F.adaptive_avg_pool2d(features, size)


def to_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring student features (B, C, H, W) to a grid (h, w): area-pooled down, bilinear up."""
    pooled = pool_finer(features, size)
    if tuple(pooled.shape[-2:]) == tuple(size):
        return pooled
    return F.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
