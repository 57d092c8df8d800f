"""The map of the features shows neighbours as neighbours, is the same each time, and says what it cannot draw."""

from __future__ import annotations

import json

import numpy as np
import pytest

from amkd_monai.report.figures import plane
from amkd_monai.report.page import feature_maps, read_run


def groups(count: int, channels: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, C) around two far centres, and the centre (N,) of each."""
    rng = np.random.default_rng(seed)
    value = (np.arange(count) % 2).astype(np.float32)
    return (rng.normal(size=(count, channels)) + 30 * value[:, None]).astype(np.float32), value


def run_with(folder, task="isic2017", teachers=(), **arrays):
    folder.mkdir(exist_ok=True)
    record = {
        "data": {"task": task},
        "status": "completed",
        "distillation": {"teachers": [{"name": t} for t in teachers]},
    }
    (folder / "run.json").write_text(json.dumps(record))
    if arrays:
        np.savez(folder / "features.npz", **arrays)
    return read_run(folder)


@pytest.mark.parametrize("count", [5, 6, 40])
def test_neighbours_stay_neighbours(count):
    vectors, value = groups(count)
    points = plane(vectors)
    assert points.shape == (count, 2) and np.isfinite(points).all() and points.std(0).min() > 0
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(count, np.inf))
    if count >= 40:  # of fewer, each has hardly a neighbour
        assert (value[distance.argmin(1)] == value).all()


def test_the_plane_is_the_same_each_time_and_whatever_the_scale_of_a_channel():
    vectors, _ = groups(20)
    first = plane(vectors)
    np.random.default_rng().normal(size=3)
    np.testing.assert_array_equal(plane(vectors), first)
    np.testing.assert_allclose(plane(vectors * np.float32(4)), first, atol=1e-6)
    assert not np.allclose(plane(groups(20, seed=1)[0]), first)


def test_constant_channels_do_no_harm():
    vectors, _ = groups(10)
    vectors[:, 0] = 3
    assert np.isfinite(plane(vectors)).all()


def test_classes_are_named_and_every_image_is_a_point(tmp_path):
    vectors, value = groups(12)
    run = run_with(tmp_path / "a", teachers=["eyes"], student=vectors, teacher_eyes=vectors[:, :7], value=value)
    maps, missing = feature_maps(run)
    assert [name for name, _ in maps] == ["student", "teacher eyes"] and not missing
    for _, svg in maps:
        assert svg.startswith("<svg") and svg.count("<use") >= 12


def test_masks_are_coloured_by_foreground_and_images_without_it_are_grey(tmp_path):
    vectors, value = groups(12)
    maps, missing = feature_maps(run_with(tmp_path / "a", "kvasir_seg", student=vectors, value=value / 4))
    assert [name for name, _ in maps] == ["student"] and not missing and "#999999" in maps[0][1]
    maps, _ = feature_maps(run_with(tmp_path / "a", "kvasir_seg", student=vectors, value=value / 4 + 0.1))
    assert "#999999" not in maps[0][1]


def test_a_teacher_may_be_called_student(tmp_path):
    vectors, value = groups(6)
    run = run_with(tmp_path / "a", teachers=["student"], student=vectors, teacher_student=vectors[:, :3], value=value)
    assert [name for name, _ in feature_maps(run)[0]] == ["student", "teacher student"]


def test_what_cannot_be_drawn_is_said(tmp_path):
    vectors, value = groups(12)
    assert "kept none" in feature_maps(run_with(tmp_path / "none"))[1][0]
    few = run_with(tmp_path / "few", student=vectors[:4], value=value[:4])
    assert feature_maps(few)[0] == [] and "4 labelled training images are fewer than 5" in feature_maps(few)[1][0]
    broken = vectors.copy()
    broken[3, 2] = np.nan
    run = run_with(
        tmp_path / "bad",
        teachers=["a", "b", "c"],
        student=vectors,
        teacher_a=broken,
        teacher_b=np.ones_like(vectors),
        value=value,
    )
    maps, missing = feature_maps(run)
    assert [name for name, _ in maps] == ["student"]
    assert "teacher a" in missing[0] and "not finite" in missing[0]
    assert "teacher b" in missing[1] and "the same for all images" in missing[1]
    assert "features of c " in missing[2] and "not distilled" in missing[2]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"student": np.ones((6, 2))}, r"features\.npz"),
        ({"student": np.ones((6, 2)), "value": np.zeros(5)}, r"features\.npz"),
        ({"student": np.ones(6), "value": np.zeros(6)}, r"features\.npz"),
        ({"student": np.ones((6, 2)), "value": np.full(6, 7.0)}, r"features\.npz.*of a class"),
    ],
)
def test_features_that_contradict_themselves_are_refused(tmp_path, arrays, words):
    with pytest.raises(ValueError, match=words):
        feature_maps(run_with(tmp_path / "a", **arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_damaged_file_is_named(tmp_path, content):
    run = run_with(tmp_path / "a")
    (tmp_path / "a" / "features.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"features\.npz is damaged"):
        feature_maps(run)
