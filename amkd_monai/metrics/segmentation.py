"""Overlap and boundary metrics of one segmented case at its native resolution."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

from amkd_monai.data.datasets import Task
from amkd_monai.files.masks import IGNORED

METRICS = ("dice", "iou", "nsd", "hd95")
"""The metric columns of a case row; all lie in [0, 1] but ``hd95``, which has the unit of the spacing."""

BACKGROUND = "background"  # class of the row of label 0

STATUSES = ("ok", "missed", "false_positive", "empty_both")
"""What a row can be: both masks present, prediction empty, reference empty, both empty."""


def mask_rows(
    task: Task, case: str, pred: ArrayLike, reference: ArrayLike, spacing: Sequence[float]
) -> list[dict[str, Any]]:
    """Score one case, one row per foreground class and region, and of several foreground classes one of background.

    A class missing from the reference has no Dice: the row is NaN and its ``status`` says whether the prediction was
    rightly empty (``empty_both``) or not (``false_positive``). A class that is in the reference but not in the
    prediction is ``missed``: Dice, IoU and NSD are 0 and HD95, infinite, is recorded as NaN. Means over rows are
    therefore reported with the status counts (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024).

    A surface is the set of foreground pixels (voxels) with a background neighbour across a face, where outside the
    image is background; distances run between pixel centres. NSD is the fraction of both surfaces within the tolerance
    of the other one, each surface element counting once. HD95 is the larger of the two directed 95th percentiles. These
    are the definitions of :py:mod:`monai.metrics`, which needs torch. Background has neither NSD nor HD95.

    Args:
        task: gives classes, regions and the tolerance of the NSD in the unit of ``spacing``.
        case: id of the case.
        pred: predicted label map, (H, W) or (D, H, W) in any axis order, class indices.
        reference: reference label map of the same shape; pixels of 255 count nowhere.
        spacing: size of a pixel or voxel along each axis of the arrays (mm, or 1 for pixels).

    Returns:
        Rows with ``id``, ``class``, ``label`` (NaN for a region), ``status``, the :data:`METRICS`, ``pred_volume`` and
        ``reference_volume`` (unit of ``spacing`` to the power of the number of axes).

    Raises:
        ValueError: different or empty shapes, spacing or tolerance that is no size.
    """
    pred, reference, names = np.asarray(pred), np.asarray(reference), task.classes[1:]
    if pred.shape != reference.shape or pred.ndim not in (2, 3) or pred.size == 0:
        shapes = f"{pred.shape} and {reference.shape}"
        raise ValueError(f"pred and reference must be one non-empty (H, W) or (D, H, W), got shapes {shapes}.")
    if len(spacing) != pred.ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {pred.ndim} positive numbers, one per axis, got {list(spacing)}.")
    given = task.nsd_tolerance
    tolerances = given if isinstance(given, Mapping) else dict.fromkeys([*names, *task.regions], given)
    if not all(math.isfinite(t) and t >= 0 for t in tolerances.values()):
        raise ValueError(f"nsd_tolerance is {given}: give finite numbers that are not negative.")
    known = reference != IGNORED
    pred = _label_map(np.where(known, pred, 0), "pred", len(task.classes))
    reference = _label_map(np.where(known, reference, 0), "reference", len(task.classes))
    background = [(labels == 0)[known] for labels in (pred, reference)]
    pred, reference = _crop_to_foreground(pred, reference)
    rows = [
        {"class": name, "label": label, **_class_row(pred == label, reference == label, spacing, tolerances[name])}
        for label, name in enumerate(names, 1)
    ]
    for name, members in task.regions.items():
        found, true = (np.isin(labels, members) for labels in (pred, reference))
        rows.append({"class": name, "label": math.nan, **_class_row(found, true, spacing, tolerances[name])})
    if len(names) > 1:
        rows.append({"class": BACKGROUND, "label": 0, **_class_row(background[0], background[1], spacing, None)})
    return [{"id": case, **row} for row in rows]


def _class_row(
    pred: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float | None
) -> dict[str, Any]:
    """Status, metrics and volumes of one class from two boolean masks; no surfaces without a ``tolerance``."""
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
        surfaces = [mask & ~binary_erosion(mask) for mask in _crop_to_foreground(pred, reference)]
        to = [distance_transform_edt(~surface, sampling=[float(s) for s in spacing]) for surface in surfaces]
        distances = to[1][surfaces[0]], to[0][surfaces[1]]
        row["nsd"] = float((np.concatenate(distances) <= tolerance * (1 + 1e-9)).mean())
        row["hd95"] = float(max(np.percentile(d, 95) for d in distances))
    return row | {"pred_volume": n_pred * voxel, "reference_volume": n_reference * voxel}


def _crop_to_foreground(pred: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut both maps to the joint bounding box of their foreground; to nothing where there is none."""
    boxes = find_objects(((pred > 0) | (reference > 0)).astype(np.int8))
    box = boxes[0] if boxes else (slice(0),) * pred.ndim
    return pred[box], reference[box]


def _label_map(array: np.ndarray, name: str, num_classes: int) -> np.ndarray:
    """The array as small integers, after checking that its labels lie in [0, num_classes)."""
    if array.dtype.kind == "f" and not np.array_equal(array, array.round()):  # NaN differs from itself
        raise ValueError(f"{name} holds values that are not integers: pass a label map, not probabilities.")
    low, high = array.min(), array.max()
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name} holds labels from {low:g} to {high:g}, the classes are 0 to {num_classes - 1}.")
    return array.astype(np.int16)
