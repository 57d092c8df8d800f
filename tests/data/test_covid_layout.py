import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image

from amkd_monai.data.datalist import datalist
from amkd_monai.data.datasets import TASKS, get_task
from amkd_monai.data.splits import SplitOptions
from amkd_monai.files.masks import read_mask

LAYOUT = get_task("covid").layout
find_items, inference_items, split = LAYOUT.find_items, LAYOUT.inference_items, LAYOUT.split
TRAIN, TEST = (Path(LAYOUT.official[section][0]).parent for section in ("train", "test"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("covid").write_phantom(tmp_path_factory.mktemp("covid"), count=12, size=(60, 90))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "COVID")


@pytest.fixture
def semiseg(root, tmp_path):
    """The same slices as COVID-SemiSeg: 8 for training, 4 for testing."""
    folder = tmp_path / "COVID-SemiSeg"
    for section, numbers in ((TRAIN, range(8)), (TEST, range(8, 12))):
        for source, name, suffix in (("images", "Imgs", "jpg"), ("masks", "GT", "png")):
            (folder / section / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(root / source / f"{number}.{suffix}", folder / section / name)
    return folder


def ids(items):
    return [item["id"] for item in items]


def test_real_pairs_in_two_folders():
    items = find_items(shared_data("COVID"))
    assert len(items) == 68
    assert [int(name) for name in ids(items)] == sorted(int(name) for name in ids(items))
    assert all(item["image"].endswith(".jpg") and item["label"].endswith(".png") for item in items)
    train, validation, test = split(shared_data("COVID"), items)
    assert len(train) + len(validation) + len(test) == 68
    assert not {item["group"] for item in train} & {item["group"] for item in test}


def test_the_real_official_split_is_kept(caplog):
    root = shared_data("COVID", "COVID-SemiSeg")
    items = find_items(root)
    with caplog.at_level(logging.WARNING, "amkd_monai"):
        train, validation, test = split(root, items)
    assert len(test) == 33 and all("TestingSet" in item["image"] for item in test)
    assert all("TrainingSet" in item["image"] for item in train + validation)
    assert len(train) + len(validation) == 33 and "later section: 5, 17" in caplog.text
    assert len(inference_items(root)) == 33


def test_the_official_layout(semiseg):
    items = find_items(semiseg)
    assert ids(items) == [str(n) for n in range(12)]
    train, validation, test = split(semiseg, items)
    assert sorted(ids(test)) == sorted(str(n) for n in range(8, 12)) and validation and train
    assert sorted(ids(inference_items(semiseg))) == sorted(str(n) for n in range(8, 12))


def test_shares_that_leave_nothing_for_training_give_an_empty_section(semiseg):
    train, validation, test = split(semiseg, find_items(semiseg), SplitOptions(fractions=(0.0, 0.0, 1.0)))
    assert not train and len(validation) == 8 and len(test) == 4
    with pytest.raises(ValueError, match="train"):
        datalist("covid", str(semiseg), fractions=(0.0, 0.0, 1.0))


def test_slices_of_one_name_in_both_official_sections_are_told_apart(semiseg):
    for name, suffix in (("Imgs", "jpg"), ("GT", "png")):
        shutil.copy(semiseg / TRAIN / name / f"3.{suffix}", semiseg / TEST / name / f"3.{suffix}")
    items = find_items(semiseg)
    assert len(set(ids(items))) == 13 and len({i["group"] for i in items}) == 12, (
        "one picture in two files is one group"
    )
    train, validation, test = split(semiseg, items)
    assert len(train + validation) == 7 and len(test) == 5, "the copy stays in the test section"


def test_folders_and_endings_are_configurable(root):
    (root / "images").rename(root / "ct")
    for mask in (root / "masks").glob("*.png"):
        mask.rename(mask.with_name(f"{mask.stem}_seg.png"))
    items = find_items(root, folders=("ct", "masks"), mask_ending="_seg")
    assert ids(items) == [str(n) for n in range(12)] and items[0]["label"].endswith("0_seg.png")
    for mask in (root / "masks").glob("*.png"):
        mask.rename(root / "ct" / mask.name)
    assert len(find_items(root, folders=("ct", "ct"), mask_ending="_seg")) == 12
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*frames"):
        find_items(root, folders=("frames", "masks"))
    with pytest.raises(ValueError, match="must name two folders"):
        find_items(root, folders=("ct",))


def test_frames_is_another_name_of_images(root):
    (root / "images").rename(root / "frames")
    assert len(find_items(root)) == len(inference_items(root)) == 12


def test_classes_of_the_masks_are_merged(root):
    mask = root / "masks" / "3.png"
    inside = np.asarray(Image.open(mask)) > 0
    classes = inside.astype(np.uint8)
    classes[: inside.shape[0] // 2][inside[: inside.shape[0] // 2]] = 2
    Image.fromarray(classes).save(mask)
    assert set(np.unique(classes)) == {0, 1, 2}
    assert (read_mask([mask], codes=TASKS["covid"].mask_codes) == inside).all()
    with pytest.raises(ValueError, match=r"3\.png cannot be used.*mask_codes"):
        read_mask([mask])


def test_slices_that_look_alike_share_a_group(root):
    Image.open(root / "images" / "4.jpg").save(root / "images" / "100.jpg", quality=50)
    shutil.copy(root / "masks" / "4.png", root / "masks" / "100.png")
    groups = {item["id"]: item["group"] for item in find_items(root)}
    assert groups["100"] == groups["4"] == "100+4"
    assert len(set(groups.values())) == 12
    for seed in range(5):
        sections = split(root, find_items(root), SplitOptions(seed=seed))
        assert len({i for i, section in enumerate(sections) if {"4", "100"} & set(ids(section))}) == 1


def test_a_missing_partner_is_named(root):
    (root / "masks" / "3.png").unlink()
    (item,) = [item for item in find_items(root) if "problem" in item]
    assert item["id"] == "3" and "lacks a mask" in item["problem"] and "masks" in item["problem"]


def test_the_wrong_folder_level_names_the_right_one(root, semiseg):
    with pytest.raises(FileNotFoundError, match=rf"one level too low, use {root}\."):
        find_items(root / "images")
    with pytest.raises(FileNotFoundError, match=rf"one level too low, use {semiseg}\."):
        find_items(semiseg / "TrainingSet")
    with pytest.raises(FileNotFoundError, match="expected the folders of COVID-SemiSeg"):
        find_items(root / "nowhere")
