"""Case metrics against implementations written here from the definitions (numpy and scipy, no MONAI)."""

import math

import numpy as np
import pytest
import torch
from helpers import case_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist

from amkd_monai.data.datasets import get_task
from amkd_monai.metrics.segmentation import METRICS, STATUSES, mask_rows
from amkd_monai.metrics.summary import format_table, summarise


def score(pred, reference, spacing=None, tolerance=1.0):
    """The only row of a binary case given as numpy arrays."""
    pred, reference = np.asarray(pred), np.asarray(reference)
    spacing = [1.0] * pred.ndim if spacing is None else spacing
    (row,) = case_metrics(torch.from_numpy(pred), torch.from_numpy(reference), 2, spacing, tolerance)
    return row


def surface(mask):
    """Foreground with a background neighbour across a face; outside the image is background."""
    padded = np.pad(mask.astype(bool), 1)
    interior = np.ones_like(padded)
    for axis in range(mask.ndim):
        interior &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return (padded & ~interior)[(slice(1, -1),) * mask.ndim]


def surface_distances(a, b, spacing):
    """Directed distances between surface centres, by brute force over all pairs."""
    points_a, points_b = (np.argwhere(surface(m)) * np.asarray(spacing) for m in (a, b))
    pairs = cdist(points_a, points_b)
    return pairs.min(axis=1), pairs.min(axis=0)


def surface_distances_edt(a, b, spacing):
    """The same from Euclidean distance transforms."""
    surface_a, surface_b = surface(a), surface(b)
    to_a, to_b = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in (surface_a, surface_b))
    return to_b[surface_a], to_a[surface_b]


def blobs(shape, seed):
    """A smooth random shape and a disturbed copy of it, both int64."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    other = field + 0.5 * ndimage.gaussian_filter(rng.normal(size=shape), 2)
    return (field > 0.02).astype(np.int64), (other > 0.02).astype(np.int64)


CASES = [
    ((31, 45), (1.0, 1.0)),
    ((40, 23), (0.5, 1.7)),
    ((17, 22, 13), (0.8, 0.8, 3.0)),
    ((12, 15, 19), (1.25, 1.37, 1.0)),
]


@pytest.mark.parametrize("distances", [surface_distances, surface_distances_edt])
@pytest.mark.parametrize(("shape", "spacing"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_independent_implementations(shape, spacing, seed, distances):
    pred, reference = blobs(shape, seed)
    tolerance = 1.1
    row = score(pred, reference, spacing, tolerance)
    overlap = np.logical_and(pred, reference).sum()
    assert row["dice"] == pytest.approx(2 * overlap / (pred.sum() + reference.sum()))
    assert row["iou"] == pytest.approx(overlap / np.logical_or(pred, reference).sum())
    forward, backward = distances(pred, reference, spacing)
    within = (forward <= tolerance).sum() + (backward <= tolerance).sum()
    assert row["nsd"] == pytest.approx(within / (len(forward) + len(backward)), abs=1e-6)
    assert row["hd95"] == pytest.approx(max(np.percentile(forward, 95), np.percentile(backward, 95)), abs=1e-4)
    assert row["pred_volume"] == pytest.approx(pred.sum() * np.prod(spacing))
    assert row["reference_volume"] == pytest.approx(reference.sum() * np.prod(spacing))


def test_equals_monai_on_the_uncropped_image():
    pred, reference = (np.pad(mask, ((4, 9), (0, 7), (3, 0))) for mask in blobs((17, 22, 13), 3))
    spacing = [0.8, 1.0, 2.5]
    row = score(pred, reference, spacing, 1.5)
    y_pred, y = torch.from_numpy(pred)[None, None], torch.from_numpy(reference)[None, None]
    assert row["dice"] == pytest.approx(compute_dice(y_pred, y).item(), abs=1e-6)
    assert row["iou"] == pytest.approx(compute_iou(y_pred, y).item(), abs=1e-6)
    expected = compute_surface_dice(y_pred, y, [1.5], include_background=True, spacing=spacing)
    assert row["nsd"] == pytest.approx(expected.item(), abs=1e-6)
    expected = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing)
    assert row["hd95"] == pytest.approx(expected.item(), abs=1e-6)


def test_background_around_a_case_changes_nothing():
    pred, reference = blobs((16, 21), 5)  # both touch the border
    assert score(np.pad(pred, 6), np.pad(reference, 6), (0.7, 1.4)) == score(pred, reference, (0.7, 1.4))


def test_spacing_follows_its_axis():
    pred, reference = blobs((11, 16, 13), 4)
    row = score(pred, reference, (0.5, 1.0, 3.0))
    turned = score(pred.transpose(2, 0, 1).copy(), reference.transpose(2, 0, 1).copy(), (3.0, 0.5, 1.0))
    assert turned == pytest.approx(row)


def test_two_points_by_hand():
    pred, reference = np.zeros((9, 9), int), np.zeros((9, 9), int)
    pred[1, 1] = reference[4, 5] = 1
    row = score(pred, reference, (1.0, 1.0), tolerance=5.0)
    assert (row["dice"], row["iou"], row["hd95"], row["nsd"]) == (0.0, 0.0, 5.0, 1.0)
    row = score(pred, reference, (2.0, 1.0), tolerance=7.2)
    assert row["hd95"] == pytest.approx(math.hypot(6, 4), abs=1e-6)
    assert row["nsd"] == 0.0


def test_nsd_tolerance_is_inclusive_for_multiples_of_the_spacing():
    pred, reference = np.zeros((4, 20), int), np.zeros((4, 20), int)
    pred[:, 2], reference[:, 5] = 1, 1  # 3 columns apart; 3 * 0.7 is 2.0999999999999996
    assert score(pred, reference, (0.7, 0.7), tolerance=2.1)["nsd"] == 1.0
    pred[:], reference[:] = 0, 0
    pred[:, 2], reference[:, 8] = 1, 1  # 6 * 0.7 is 4.199999999999999
    assert score(pred, reference, (0.7, 0.7), tolerance=4.1)["nsd"] == 0.0


def test_rows_of_several_classes():
    reference = torch.zeros(8, 8, dtype=torch.int64)
    reference[:3, :3], reference[5:, 5:] = 1, 2
    pred = reference.clone()
    pred[5:, 5:] = 3
    *rows, background = case_metrics(pred, reference, 5, (1, 1), 1.0, ["a", "b", "c", "d"])
    assert [row["class"] for row in rows] == ["a", "b", "c", "d"]
    assert (background["class"], background["label"], background["dice"]) == ("background", 0, 1.0)
    assert [row["label"] for row in rows] == [1, 2, 3, 4]
    assert [row["status"] for row in rows] == ["ok", "missed", "false_positive", "empty_both"]
    assert (rows[0]["dice"], rows[0]["nsd"], rows[0]["hd95"]) == (1.0, 1.0, 0.0)
    assert (rows[2]["pred_volume"], rows[2]["reference_volume"]) == (9.0, 0.0)


@pytest.mark.parametrize(("shape", "spacing"), CASES[1:3])
def test_classes_regions_and_background_are_each_scored_as_a_mask_of_its_own(shape, spacing):
    (pred, reference), (more, other) = blobs(shape, 3), blobs(shape, 4)
    pred, reference = pred + 2 * more, reference + 2 * other  # 0 to 3
    tolerances, regions = {"a": 0.6, "b": 1.1, "c": 2.0, "a or c": 1.5}, {"a or c": (1, 3)}
    labels = [torch.from_numpy(array) for array in (pred, reference)]
    rows = case_metrics(*labels, 4, spacing, tolerances, ["a", "b", "c"], regions)
    members = {"a": [1], "b": [2], "c": [3], "a or c": [1, 3], "background": [0]}
    assert [row["class"] for row in rows] == list(members)
    for row in rows:
        p, t = (np.isin(array, members[row["class"]]) for array in (pred, reference))
        assert row["dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
        assert row["iou"] == pytest.approx((p & t).sum() / (p | t).sum())
        assert row["reference_volume"] == pytest.approx(t.sum() * np.prod(spacing))
        if row["class"] == "background":
            assert math.isnan(row["nsd"]) and math.isnan(row["hd95"]) and row["label"] == 0
            continue
        forward, backward = surface_distances(p, t, spacing)
        within = sum((distances <= tolerances[row["class"]]).sum() for distances in (forward, backward))
        assert row["nsd"] == pytest.approx(within / (len(forward) + len(backward)), abs=1e-6)
        assert row["hd95"] == pytest.approx(max(np.percentile(forward, 95), np.percentile(backward, 95)), abs=1e-4)

    summary = summarise([{"id": "case", **row} for row in rows])
    dices = {row["class"]: row["dice"] for row in rows}
    assert summary["metrics"]["dice"]["mean"] == pytest.approx(np.mean([dices[name] for name in "abc"]))
    four = [dices[name] for name in ("a", "b", "c", "background")]
    assert summary["with_background"]["dice"]["mean"] == pytest.approx(np.mean(four))
    assert list(summary["with_background"]) == ["dice", "iou"]
    assert list(summary["classes"]) == ["a", "b", "c"] and sum(summary["status"].values()) == 3
    assert summary["regions"]["a or c"]["metrics"]["dice"]["mean"] == dices["a or c"]
    table = format_table(summary, "test")
    assert all(f"{name} dice" in table for name in ("a", "a or c", "with background"))


def test_pixels_without_a_label_count_in_no_class_and_not_as_background():
    rng = np.random.default_rng(0)
    pred, reference = rng.integers(0, 3, (2, 12, 15))
    known = rng.random(reference.shape) < 0.7
    task = get_task({"name": "three", "classes": ["background", "a", "b"]})
    for row in mask_rows(task, "case", pred, np.where(known, reference, 255), (1, 1)):
        p, t = (labels[known] == row["label"] for labels in (pred, reference))
        assert row["dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
        assert row["reference_volume"] == t.sum()


@pytest.mark.parametrize(
    ("in_pred", "in_reference", "status", "overlap"),
    [(0, 0, "empty_both", math.nan), (1, 0, "false_positive", math.nan), (0, 1, "missed", 0.0)],
)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5)])
def test_empty_cases(in_pred, in_reference, status, overlap, shape):
    row = score(np.full(shape, in_pred), np.full(shape, in_reference))
    assert row["status"] == status
    np.testing.assert_equal([row[m] for m in METRICS], [overlap, overlap, overlap, math.nan])
    assert row["pred_volume"] == in_pred * np.prod(shape)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int32, torch.float16, torch.float32])
def test_any_dtype_and_meta_tensors(dtype):
    pred, reference = (torch.from_numpy(m) for m in blobs((20, 17), 1))
    expected = case_metrics(pred, reference, 2, (1, 1), 1.0)
    assert case_metrics(pred.to(dtype), MetaTensor(reference.to(torch.float32)), 2, (1, 1), 1.0) == expected


ZEROS = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (ZEROS, torch.zeros(4, 5), 2, (1, 1), 1.0),
            r"\(4, 4\) and \(4, 5\)",
        ),
        ((ZEROS[None, None], ZEROS[None, None], 2, (1, 1), 1.0), r"\(1, 1, 4, 4\)"),
        ((ZEROS[:0], ZEROS[:0], 2, (1, 1), 1.0), "non-empty"),
        ((ZEROS + 2, ZEROS, 2, (1, 1), 1.0), "pred holds labels from 2 to 2, the classes are 0 to 1"),
        ((ZEROS, ZEROS - 1, 2, (1, 1), 1.0), "reference holds labels from -1"),
        ((ZEROS, ZEROS + math.inf, 2, (1, 1), 1.0), "reference holds labels from inf"),
        ((ZEROS + 0.3, ZEROS, 2, (1, 1), 1.0), "not probabilities"),
        ((ZEROS + math.nan, ZEROS, 2, (1, 1), 1.0), "not integers"),
        ((ZEROS, ZEROS, 2, (1, 1, 1), 1.0), "spacing must be 2 positive numbers"),
        ((ZEROS, ZEROS, 2, (1, 0), 1.0), "spacing must be"),
        ((ZEROS, ZEROS, 2, (1, 1), -1.0), "nsd_tolerance"),
        ((ZEROS, ZEROS, 3, (1, 1), {"a": 1.0}, ["a", "b"]), "nsd_tolerance .* for each of a, b"),
        ((ZEROS, ZEROS, 3, (1, 1), 1.0, ["lesion", "lesion"]), "a name of its own"),
    ],
)
def test_errors_are_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        case_metrics(*arguments)
    assert "\n" not in str(error.value)


@st.composite
def mask_pairs(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    fill = hnp.arrays(np.uint8, shape, elements=st.integers(0, 1))
    constant = st.integers(0, 1).map(lambda value: np.full(shape, value, np.uint8))
    masks = st.one_of(fill, constant)
    spacing = draw(st.lists(st.floats(0.1, 5.0), min_size=len(shape), max_size=len(shape)))
    return draw(masks), draw(masks), spacing


@settings(max_examples=80, deadline=None, derandomize=True)
@given(mask_pairs(), st.floats(0.0, 4.0))
def test_properties_of_random_masks(case, tolerance):
    pred, reference, spacing = case
    row, swapped = score(pred, reference, spacing, tolerance), score(reference, pred, spacing, tolerance)
    assert row["status"] in STATUSES
    values = np.array([row[m] for m in METRICS])
    if row["status"] == "ok":
        assert np.isfinite(values).all()
        assert ((values[:3] >= 0) & (values[:3] <= 1)).all()
        assert row["iou"] == pytest.approx(row["dice"] / (2 - row["dice"]))
        assert 0 <= row["hd95"] <= np.linalg.norm(np.multiply(pred.shape, spacing)) + 1e-4
        np.testing.assert_allclose([swapped[m] for m in METRICS], values, rtol=1e-6)
    elif row["status"] == "missed":
        np.testing.assert_equal(values, [0, 0, 0, math.nan])
        assert swapped["status"] == "false_positive"
    else:
        assert np.isnan(values).all()
    perfect = score(reference, reference, spacing, tolerance)
    if reference.any():
        assert [perfect[m] for m in METRICS] == [1.0, 1.0, 1.0, 0.0]
