"""Overlap and boundary metrics of one segmented case at its native resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from torch import Tensor

METRICS = ("dice", "iou", "nsd", "hd95")
"""The metric columns of a case row; all lie in [0, 1] but ``hd95``, which has the unit of the spacing."""

BACKGROUND = "background"
"""Class of the row of label 0."""

STATUSES = ("ok", "missed", "false_positive", "empty_both")
"""What a row can be: both masks present, prediction empty, reference empty, both empty."""


def case_metrics(
    pred: Tensor,
    reference: Tensor,
    num_classes: int,
    spacing: Sequence[float],
    nsd_tolerance: float | Mapping[str, float],
    class_names: Sequence[str] | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Score one case, one row per foreground class and region, and of several foreground classes one of background.

    A class missing from the reference has no Dice: the row is NaN and its ``status`` says whether the prediction was
    rightly empty (``empty_both``) or not (``false_positive``). A class that is in the reference but not in the
    prediction is ``missed``: Dice, IoU and NSD are 0 and HD95, infinite, is recorded as NaN. Means over rows are
    therefore reported with the status counts (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024).

    A surface is the set of foreground pixels (voxels) with a background neighbour across a face, where outside the
    image is background; distances run between pixel centres. NSD is the fraction of both surfaces within the tolerance
    of the other one, each surface element counting once. HD95 is the larger of the two directed 95th percentiles. Both
    come from :py:mod:`monai.metrics`, always on the CPU.

    Args:
        pred: predicted label map, shape (H, W) or (D, H, W) in any axis order, any dtype holding integers.
        reference: reference label map of the same shape.
        num_classes: number of classes including the background, which is label 0.
        spacing: size of a pixel or voxel along each axis of the arrays (mm, or 1 for pixels).
        nsd_tolerance: boundary tolerance of the NSD in the unit of ``spacing``; or one for each class and region.
        class_names: names of the foreground classes 1, 2, ...; ``class_1`` and so on when left out.
        regions: foreground labels that are scored together, as one mask, by the region's name.

    Returns:
        Rows with ``class``, ``label`` (NaN for a region), ``status``, ``dice``, ``iou``, ``nsd``, ``hd95``,
        ``pred_volume`` and ``reference_volume`` (unit of ``spacing`` to the power of the number of axes). Background
        has neither NSD nor HD95.

    Raises:
        ValueError: shapes differ, a label is not an integer of [0, num_classes), or another argument does not fit.
    """
    if pred.shape != reference.shape or pred.ndim not in (2, 3) or pred.numel() == 0:
        shapes = f"{tuple(pred.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"pred and reference must be one non-empty (H, W) or (D, H, W), got shapes {shapes}.")
    if len(spacing) != pred.ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {pred.ndim} positive numbers, one per axis, got {list(spacing)}.")
    names, regions = list(class_names or (f"class_{label}" for label in range(1, num_classes))), dict(regions or {})
    every = [*names, *regions]
    tolerances = nsd_tolerance if isinstance(nsd_tolerance, Mapping) else dict.fromkeys(every, nsd_tolerance)
    if {*tolerances} != {*every} or not all(math.isfinite(t) and t >= 0 for t in tolerances.values()):
        wanted = f"one number, finite and not negative, or one for each of {', '.join(every)}"
        raise ValueError(f"nsd_tolerance must be {wanted}, got {nsd_tolerance}.")
    if num_classes < 2 or len(set(names)) != num_classes - 1 or len(names) != num_classes - 1:
        raise ValueError(f"class_names must be one name per foreground class of {num_classes} classes, got {names}.")
    pred, reference = _label_map(pred, "pred", num_classes), _label_map(reference, "reference", num_classes)
    background = (pred == 0, reference == 0)
    pred, reference = _crop_to_foreground(pred, reference)
    rows = [
        {"class": name, "label": label, **_class_row(pred == label, reference == label, spacing, tolerances[name])}
        for label, name in zip(range(1, num_classes), names, strict=True)
    ]
    for name, members in regions.items():
        found, true = (torch.isin(labels, torch.tensor(members).to(labels)) for labels in (pred, reference))
        rows.append({"class": name, "label": math.nan, **_class_row(found, true, spacing, tolerances[name])})
    if len(names) > 1:
        rows.append({"class": BACKGROUND, "label": 0, **_class_row(*background, spacing, None)})
    return rows


def _class_row(pred: Tensor, reference: Tensor, spacing: Sequence[float], tolerance: float | None) -> dict[str, Any]:
    """Status, metrics and volumes of one class from two boolean masks of shape (H, W) or (D, H, W).

    Without a ``tolerance`` no surfaces are looked at.
    """
    n_pred, n_reference, voxel = int(pred.sum()), int(reference.sum()), math.prod(float(s) for s in spacing)
    row: dict[str, Any] = {"status": "ok", **dict.fromkeys(METRICS, math.nan)}
    if n_reference == 0:
        row["status"] = "false_positive" if n_pred else "empty_both"
    elif n_pred == 0:
        row.update(status="missed", dice=0.0, iou=0.0, nsd=0.0)
    else:
        overlap = int((pred & reference).sum())
        row["dice"] = 2 * overlap / (n_pred + n_reference)
        row["iou"] = overlap / (n_pred + n_reference - overlap)
    if tolerance is None:
        row.update(nsd=math.nan, hd95=math.nan)
    elif row["status"] == "ok":
        # cropping changes no value: outside the array is background, as it is outside the joint bounding box
        y_pred, y = (mask[None, None].cpu() for mask in _crop_to_foreground(pred, reference))  # (1, 1, ...)
        options: dict[str, Any] = {"include_background": True, "spacing": [float(s) for s in spacing]}
        row["nsd"] = float(compute_surface_dice(y_pred, y, class_thresholds=[tolerance], **options))
        row["hd95"] = float(compute_hausdorff_distance(y_pred, y, percentile=95, **options))
    return row | {"pred_volume": n_pred * voxel, "reference_volume": n_reference * voxel}


def _crop_to_foreground(pred: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both maps to the joint bounding box of their foreground; to nothing where there is none."""
    inside = ((pred > 0) | (reference > 0)).nonzero()  # (N, axes)
    low, high = (inside.amin(0), inside.amax(0) + 1) if len(inside) else ([0] * pred.ndim, [0] * pred.ndim)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return pred[box], reference[box]


def _label_map(array: Tensor, name: str, num_classes: int) -> Tensor:
    """The array as a plain integer tensor, after checking that its labels lie in [0, num_classes)."""
    array = array.detach().as_subclass(Tensor)  # the bookkeeping of a MetaTensor slows every operation
    if not array.is_floating_point():
        array = array.to(torch.int64)
    elif not torch.equal(array, array.round()):  # NaN differs from itself
        raise ValueError(f"{name} holds values that are not integers: pass a label map, not probabilities.")
    low, high = (bound.item() for bound in torch.aminmax(array))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name} holds labels from {low:g} to {high:g}, but {num_classes} classes allow 0 to {num_classes - 1}."
        )
    return array.to(torch.int16)
