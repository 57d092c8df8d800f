import shutil
from collections import Counter

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image
from toy_images import photo_chain

from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import BadSampleError, DecodedDataset
from amkd_monai.data.splits import SplitOptions
from amkd_monai.files.masks import read_mask
from amkd_monai.files.names import DataProblems

LAYOUT = get_task("busi").layout
find_items, inference_items, split = LAYOUT.find_items, LAYOUT.inference_items, LAYOUT.split


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("busi").write_phantom(tmp_path_factory.mktemp("busi"), count=3, size=(60, 90))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "Dataset_BUSI_with_GT")


def ids(items):
    return [item["id"] for item in items]


def test_real_data():
    root = shared_data("BUSI", "Dataset_BUSI_with_GT")
    items = find_items(root)
    assert Counter(item["class"] for item in items) == {"benign": 23, "malignant": 33, "normal": 33}
    by_id = {item["id"]: item for item in items}
    assert len(by_id["benign (25)"]["label"]) == 2, "the only one with two lesions"
    assert sum(isinstance(item["label"], list) for item in items) == 1
    first, second = (read_mask([file]) > 0 for file in by_id["benign (25)"]["label"])
    assert (read_mask(by_id["benign (25)"]["label"]) == (first | second)).all() and (first & ~second).any()
    assert not any("mask" in item["id"] for item in items)
    numbers = [int(item["id"].split("(")[1][:-1]) for item in items if item["class"] == "benign"]
    assert numbers == sorted(numbers)
    for item in items:
        files = item["label"] if isinstance(item["label"], list) else [item["label"]]
        assert read_mask(files).any() == (item["class"] != "normal")
    assert by_id["malignant (4)"]["group"] == by_id["malignant (5)"]["group"] == "malignant (4)+malignant (5)"
    assert len(inference_items(root)) == 89


def test_real_folds_hold_every_class_and_cut_no_group():
    root = shared_data("BUSI", "Dataset_BUSI_with_GT")
    items = find_items(root)
    tested = []
    for fold in range(5):
        sections = split(root, items, SplitOptions(fold=fold))
        assert sorted(ids([item for section in sections for item in section])) == sorted(ids(items))
        groups = [{item["group"] for item in section} for section in sections]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        for section, share in zip(sections, (0.68, 0.12, 0.2), strict=True):
            counts = Counter(item["class"] for item in section)
            for name, total in (("benign", 23), ("malignant", 33), ("normal", 33)):
                assert abs(counts[name] - share * total) <= 2
        tested += ids(sections[2])
    assert sorted(tested) == sorted(ids(items))


def test_normals_can_be_dropped(root):
    assert {item["class"] for item in find_items(root, normals=False)} == {"benign", "malignant"}
    shutil.rmtree(root / "normal")
    assert len(find_items(root)) == 7


def test_other_files_are_ignored_or_named(root):
    (root / "benign" / "._benign (1).png").write_bytes(b"\0" * 176)
    (root / "benign" / "Thumbs.db").write_bytes(b"\0")
    shutil.copy(root / "benign" / "benign (1).png", root / "benign" / "contact.png")
    items = find_items(root)
    (problem,) = (item["problem"] for item in items if "problem" in item)
    assert len(items) == 9 and "contact.png lacks a mask" in problem


def test_an_image_without_mask_and_a_mask_without_image_are_named(root):
    (root / "malignant" / "malignant (2)_mask.png").unlink()
    (problem,) = (item["problem"] for item in find_items(root) if "problem" in item)
    assert f"{root / 'malignant' / 'malignant (2).png'} lacks a mask" in problem
    (root / "malignant" / "malignant (2).png").rename(root / "malignant" / "malignant (2)_mask.png")
    (problem,) = (item["problem"] for item in find_items(root) if "problem" in item)
    assert f"{root / 'malignant' / 'malignant (2)_mask.png'} lacks an image" in problem


def test_a_further_mask_alone_is_still_a_mask(root):
    (root / "benign" / "benign (1)_mask.png").unlink()
    item = find_items(root)[0]
    assert item["id"] == "benign (1)" and item["label"].endswith("benign (1)_mask_1.png")


def test_all_masks_of_another_size_are_listed_at_once(root, tmp_path):
    for name in ("benign (1)_mask_1", "benign (3)_mask"):
        Image.new("1", (10, 20)).save(root / "benign" / f"{name}.png")
    items = find_items(root)
    problems = {item["id"]: item["problem"] for item in items if "problem" in item}
    assert len(items) == 8 and list(problems) == ["benign (1)", "benign (3)"]
    assert "benign (1)_mask_1.png is 10x20 pixels" in problems["benign (1)"]
    assert "benign (3)_mask.png is 10x20 pixels" in problems["benign (3)"]
    with pytest.raises(DataProblems, match=r"benign \(1\)_mask_1\.png .*1 more problem") as caught:
        DecodedDataset(items, photo_chain(), tmp_path / "cache")
    assert caught.value.problems == list(problems.values())
    decoded = DecodedDataset(items, photo_chain(), tmp_path / "cache", on_bad_sample="skip")
    assert decoded.skipped == list(problems) and len(decoded) == 6


@pytest.mark.parametrize("place", ["", "benign"])
def test_the_wrong_folder_level_names_the_right_one(root, place):
    given = root / place if place else root.parent
    with pytest.raises(FileNotFoundError, match=rf"one level too (low|high), use {root}\."):
        find_items(given)


def test_inference_on_a_plain_folder(root):
    assert ids(inference_items(root / "benign")) == ["benign (1)", "benign (2)", "benign (3)"]
    with pytest.raises(FileNotFoundError, match="No images to predict"):
        inference_items(root / "nowhere")


def test_a_mask_with_other_levels_is_read_by_the_bundles_transform(root):
    mask = root / "benign" / "benign (2)_mask.png"
    inside = np.asarray(Image.open(mask))
    Image.fromarray(inside.astype(np.uint8)).save(mask)  # 0 and 1 instead of 0 and 255
    assert (read_mask([mask]) == inside).all() and inside.any()


def test_a_truncated_image_is_left_to_the_decoder(root, tmp_path):
    image = root / "benign" / "benign (2).png"
    image.write_bytes(image.read_bytes()[:-2000])
    items = find_items(root)
    assert len(items) == 8 and next(i for i in items if i["id"] == "benign (2)")["group"] == "benign (2)"
    with pytest.raises(BadSampleError, match=r"benign \(2\)\.png.* cannot be read"):
        DecodedDataset(items, photo_chain(), tmp_path / "cache")
    decoded = DecodedDataset(items, photo_chain(), tmp_path / "cache", on_bad_sample="skip")
    assert decoded.skipped == ["benign (2)"] and len(decoded) == 7
    assert dict(zip(decoded.ids, decoded.has_foreground, strict=True))["normal (1)"] == np.False_


def test_all_masks_of_an_image_are_decoded_and_part_of_the_cache(root, tmp_path):
    item = find_items(root)[0]
    alone = {**item, "label": item["label"][0]}
    both, first = (DecodedDataset([i], photo_chain(), tmp_path / "cache") for i in (item, alone))
    assert both.labels[0].sum() > 1.2 * first.labels[0].sum() > 0
    inside = np.asarray(Image.open(item["label"][1]))
    Image.fromarray(np.zeros_like(inside)).save(item["label"][1])
    changed = DecodedDataset([item], photo_chain(), tmp_path / "cache")
    np.testing.assert_array_equal(changed.labels[0], first.labels[0])
