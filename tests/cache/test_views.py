"""Views are replayed exactly, by every teacher and the student; shown on a real network and photographs."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut
from toy_dataset import CountingTeacher, decoded, write_items

from amkd_monai.cache.build import MATRIX, ask, cache_teacher, view_matrix, view_set
from amkd_monai.cache.store import ArraySpec
from amkd_monai.data.sampling import warp
from amkd_monai.teachers.base import build_teacher

LITE0 = {"name": "lite0", "kind": "timm", "model": "tf_efficientnet_lite0"}
VIEWS = 4


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Four parts of a photograph, and what a real network says about four views of each."""
    folder = tmp_path_factory.mktemp("real")
    items = []
    for number in range(4):
        top, left = divmod(number, 2)
        part = astronaut()[256 * top : 256 * top + 256, 256 * left : 256 * left + 256]
        Image.fromarray(part).save(folder / f"{number}.png")
        Image.fromarray((part[..., 0] > 128).astype(np.uint8) * 255).save(folder / f"{number}_mask.png")
        paths = {"image": str(folder / f"{number}.png"), "label": str(folder / f"{number}_mask.png")}
        items.append({**paths, "id": str(number), "group": str(number)})
    dataset, teacher = decoded(items, folder), build_teacher(LITE0)
    stores = {
        dtype: cache_teacher(teacher, dataset, folder, views=VIEWS, dtype=dtype, description=LITE0)
        for dtype in ("float16", "int8")
    }
    return teacher, dataset, stores


def cosine(a, b):
    """Mean cosine of the cells of maps (N, C, h, w)."""
    a, b = (torch.from_numpy(np.asarray(x, np.float32)) for x in (a, b))
    return float(torch.cosine_similarity(a, b, dim=1).mean())


def test_the_views_are_those_of_the_method():
    assert [v["view"] for v in view_set(4)] == ["identity", "horizontal_flip", "crop", "crop"]
    assert view_set(1) == [{"view": "identity"}]
    with pytest.raises(ValueError, match="views is 0"):
        view_set(0)


def test_a_view_depends_on_the_sample_alone_and_stays_inside_the_image():
    matrices = np.stack([view_matrix(p, f"s{i}", "hash", (60, 90)) for i in range(50) for p in view_set(4)[2:]])
    assert len({m.tobytes() for m in matrices}) == 100 and matrices.dtype == np.float32
    again = view_matrix(view_set(9)[3], "s49", "hash", (60, 90))
    np.testing.assert_array_equal(again, matrices[-1])
    assert not np.array_equal(view_matrix(view_set(4)[3], "s49", "changed", (60, 90)), again)
    to_pixels = np.diag([90.0, 60.0])  # a crop is a rotated, scaled, maybe mirrored rectangle: no shear
    linear = to_pixels @ matrices[:, :, :2] @ np.linalg.inv(to_pixels)
    side = np.sqrt(np.abs(np.linalg.det(linear)))
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), side[:, None, None] ** 2 * np.eye(2), atol=1e-5)
    assert 0.7 <= side.min() < 0.75 and 0.95 < side.max() <= 1.0
    assert np.abs(matrices[:, :, 2]).max() <= 0.3 and {-1.0, 1.0} == set(np.sign(np.linalg.det(linear)))
    np.testing.assert_array_equal(view_matrix({"view": "identity"}, "a", "b", (60, 90)), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(view_matrix(view_set(2)[1], "a", "b", (60, 90)), [[-1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("view", range(VIEWS))
def test_a_replayed_view_gives_the_stored_map_and_a_wrong_one_is_caught(real, view):
    """The student's image, made from the stored matrix, is what the teacher saw; any other geometry is far off."""
    teacher, dataset, stores = real
    store, everything = stores["float16"], range(4)
    replayed = store.read(MATRIX, everything, view)
    stored = store.read("grid", everything, view)
    assert cosine(ask(teacher, dataset, everything, "cpu", replayed)["grid"], stored) > 0.9999
    identity = np.tile(np.eye(2, 3, dtype=np.float32), (4, 1, 1))
    wrong = {
        "not warped": identity,
        "warped the other way": np.linalg.inv(np.concatenate([replayed, [[[0, 0, 1]]] * 4], 1))[:, :2],
        "another view": store.read(MATRIX, everything, (view + 1) % VIEWS),
        "another sample's view": replayed[::-1],
    }
    for name, matrices in wrong.items():
        if not np.allclose(matrices, replayed, atol=1e-4):
            said = ask(teacher, dataset, everything, "cpu", np.ascontiguousarray(matrices, np.float32))["grid"]
            assert cosine(said, stored) < 0.85, name


def test_an_unwarped_map_is_far_from_right_and_a_warped_one_near(real):
    """Why the maps of a store of one view are warped with the image, and why that is called approximate."""
    teacher, dataset, stores = real
    flip = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]).expand(4, 2, 3)
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]).expand(4, 2, 3)
    stored = torch.from_numpy(stores["float16"].read("grid", range(4)).astype(np.float32))
    near = {}
    for name, theta in (("flip", flip), ("quarter", quarter)):
        true = ask(teacher, dataset, range(4), "cpu", theta.numpy())["grid"]
        near[name] = cosine(warp(stored, theta), true)
        assert cosine(stored, true) < near[name] - 0.2
    assert near["flip"] > 0.75 > near["quarter"]


def test_int8_keeps_real_features_at_half_the_size(real):
    _, _, stores = real
    exact, coded = stores["float16"], stores["int8"]
    assert coded.arrays["grid"].dtype == "int8" and coded.arrays["pooled"].dtype == "float16"
    for view in range(VIEWS):
        a, b = (store.read("grid", range(4), view).astype(np.float64) for store in (exact, coded))
        cells = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        channels = (a * b).sum((2, 3)) / np.linalg.norm(a, axis=(2, 3)) / np.linalg.norm(b, axis=(2, 3))
        assert cells.min() > 0.999 and np.nanmin(channels) > 0.999
    sizes = [sum(f.stat().st_size for f in s.directory.glob("v*")) for s in (exact, coded)]
    assert 0.5 < sizes[1] / sizes[0] < 0.54


def test_a_label_is_warped_with_the_image_and_keeps_its_values(tmp_path):
    dataset = decoded(write_items(tmp_path / "in", 3), tmp_path)

    class Labelled(CountingTeacher):
        uses_labels = True

        def forward(self, image, label):
            self.said = label
            return super().forward(image)

    teacher, flip = Labelled(), np.tile(np.float32([[-1, 0, 0], [0, 1, 0]]), (3, 1, 1))
    ask(teacher, dataset, range(3), "cpu", flip)
    np.testing.assert_array_equal(teacher.said.numpy(), np.asarray(dataset.labels)[..., ::-1])
    assert teacher.said.dtype == torch.uint8


def test_more_views_compute_only_the_new_ones(tmp_path):
    dataset = decoded(write_items(tmp_path / "in", 6), tmp_path)
    one, several = CountingTeacher(), CountingTeacher()
    first = cache_teacher(one, dataset, tmp_path)
    store = cache_teacher(several, dataset, tmp_path, views=3)
    assert several.seen == 12 and store.directory != first.directory
    np.testing.assert_array_equal(store.read("grid", range(6)), first.read("grid", range(6)))
    assert store.arrays[MATRIX] == ArraySpec((2, 3), "float32") and MATRIX not in first.arrays
    order, views = [5, 0, 3, 3], [2, 0, 1, 2]
    mixed = store.read("grid", order, views)
    for row, (index, view) in enumerate(zip(order, views, strict=True)):
        np.testing.assert_array_equal(mixed[row], store.read("grid", [index], view)[0])
