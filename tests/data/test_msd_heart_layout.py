import gzip
import json
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers import shared_data

from amkd_monai.data import datalist
from amkd_monai.data.datasets import get_task
from amkd_monai.data.splits import SplitOptions

LAYOUT = get_task("msd_heart").layout
find_items, inference_items, split = LAYOUT.find_items, LAYOUT.inference_items, LAYOUT.split


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("msd_heart").write_phantom(tmp_path_factory.mktemp("heart"), cases=4, shape=(8, 20, 24))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "Task02_Heart")


def ids(items):
    return [item["id"] for item in items]


def only_problem(root, name, count=4):
    """The problem of the one item that has one; all items are listed."""
    items = find_items(root)
    (item,) = (item for item in items if "problem" in item)
    assert len(items) == count and item["id"] == name
    return item["problem"]


def edit_json(root, **changes):
    content = json.loads((root / "dataset.json").read_text())
    content.update(changes)
    (root / "dataset.json").write_text(json.dumps(content))


def test_real_full_resolution_cases():
    root = shared_data("MSD-Heart", "Task02_Heart")
    items = find_items(root)  # the folder holds `._*.nii.gz` files
    assert ids(items) == ["la_009", "la_016", "la_019"] and not any("problem" in item for item in items)
    assert all(Path(item[key]).is_file() for item in items for key in ("image", "label"))
    assert ids(inference_items(root)) == ["la_010"]
    assert [len(section) for section in split(root, items)] == [1, 1, 1]


def test_real_identical_images_stay_on_one_side_of_every_split():
    items = find_items(shared_data("MSD-Heart", "Task02_Heart_half"))
    assert len(items) == 11
    groups = {item["id"]: item["group"] for item in items}
    assert groups["la_005"] == groups["la_026"] == "la_005+la_026"
    assert len(set(groups.values())) == 10
    tested = []
    for fold in range(5):
        for seed in range(5):
            sections = split(Path(), items, SplitOptions(fold=fold, seed=seed))
            assert all(sections)
            assert len({i for i, section in enumerate(sections) if {"la_005", "la_026"} & set(ids(section))}) == 1
        tested += ids(split(Path(), items, SplitOptions(fold=fold))[2])
    assert sorted(tested) == ids(items)


def test_phantom_cases_are_found(root):
    items = find_items(root)
    assert ids(items) == ["la_001", "la_002", "la_003", "la_004"]
    assert items[0]["label"] == str(root / "labelsTr" / "la_001.nii.gz")


def test_a_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No MSD Heart data in .*/nowhere: expected dataset\.json with"):
        find_items(tmp_path / "nowhere")


def test_one_level_too_high_names_the_right_folder(root):
    with pytest.raises(FileNotFoundError, match=rf"one level too high, use {root}\."):
        find_items(root.parent)


@pytest.mark.parametrize("name", ["imagesTr", "labelsTr", "imagesTs"])
def test_one_level_too_low_names_the_right_folder(root, name):
    with pytest.raises(FileNotFoundError, match=rf"one level too low, use {root}\."):
        find_items(root / name)


def test_a_missing_dataset_json_is_an_error(root):
    (root / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected dataset\.json with"):
        find_items(root)


def test_a_damaged_dataset_json_is_an_error(root):
    (root / "dataset.json").write_text('{"training": [')
    with pytest.raises(ValueError, match=r"dataset\.json is not JSON"):
        find_items(root)


@pytest.mark.parametrize("training", [[], None, ["./imagesTr/la_001.nii.gz"], [{"image": "a"}]])
def test_a_dataset_json_without_pairs_is_an_error(root, training):
    edit_json(root, training=training)
    with pytest.raises(ValueError, match='list "training"'):
        find_items(root)


def test_labels_of_another_task_are_announced(root, caplog):
    edit_json(root, labels={"0": "background", "1": "spleen"})
    with caplog.at_level(logging.WARNING, "amkd_monai"):
        assert len(datalist.find_items("msd_heart", root)) == 4
    assert "spleen" in caplog.text and "left atrium" in caplog.text


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_listed_file_that_is_missing_is_named(root, folder):
    (root / folder / "la_002.nii.gz").unlink()
    assert f"{folder}/la_002.nii.gz is not there" in only_problem(root, "la_002")


def test_listed_hidden_files_are_ignored(root):
    training = [{"image": "./imagesTr/._la_001.nii.gz", "label": "./labelsTr/._la_001.nii.gz"}]
    edit_json(root, training=training + json.loads((root / "dataset.json").read_text())["training"])
    (root / "imagesTr" / "._la_001.nii.gz").write_bytes(b"\0" * 176)
    assert len(find_items(root)) == 4


def test_a_volume_listed_twice_is_an_error(root):
    edit_json(root, training=json.loads((root / "dataset.json").read_text())["training"] * 2)
    problems = [item["problem"] for item in find_items(root) if "problem" in item]
    assert len(problems) == 4 and any("la_001.nii.gz is listed twice" in problem for problem in problems)


def test_a_label_of_another_shape_is_named(root):
    label = root / "labelsTr" / "la_003.nii.gz"
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.eye(4)).to_filename(label)
    problem = only_problem(root, "la_003")
    assert "labelsTr/la_003.nii.gz cannot be used" in problem and "4 voxels" in problem and " 8" in problem


@pytest.mark.parametrize("change", ["shift", "flip", "spacing"])
def test_a_label_on_another_grid_is_named(root, change):
    file = root / "labelsTr" / "la_003.nii.gz"
    label = nibabel.load(file)
    affine = label.affine.copy()
    if change == "shift":
        affine[0, 3] += 5
    elif change == "flip":
        affine[:3, 1] *= -1
    else:
        affine[:3, 2] *= 1.1
    nibabel.Nifti1Image(np.asarray(label.dataobj), affine).to_filename(file)
    assert "labelsTr/la_003.nii.gz cannot be used" in only_problem(root, "la_003")


@pytest.mark.parametrize("kept_bytes", [0, 10, 60])
def test_a_volume_cut_in_its_header_is_named(root, kept_bytes):
    image = root / "imagesTr" / "la_003.nii.gz"
    image.write_bytes(image.read_bytes()[:kept_bytes])
    assert "imagesTr/la_003.nii.gz cannot be read" in only_problem(root, "la_003")


def test_a_volume_cut_behind_its_header_is_named(root):
    image = root / "imagesTr" / "la_003.nii.gz"
    image.write_bytes(image.read_bytes()[:-500])
    assert "imagesTr/la_003.nii.gz cannot be read" in only_problem(root, "la_003")


def test_a_volume_that_lacks_voxels_is_named(root):
    image = root / "imagesTr" / "la_003.nii.gz"
    image.write_bytes(gzip.compress(gzip.decompress(image.read_bytes())[:-10]))
    assert "ends before its last voxel" in only_problem(root, "la_003")


def test_a_volume_of_several_gzip_members_is_whole(root):
    image = root / "imagesTr" / "la_003.nii.gz"
    content = gzip.decompress(image.read_bytes())
    image.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    items = find_items(root)
    assert len(items) == 4 and not any("problem" in item for item in items)


def test_uncompressed_volumes_are_checked_too(root):
    for folder in ("imagesTr", "labelsTr"):
        packed = root / folder / "la_001.nii.gz"
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    edit_json(root, training=[{"image": "imagesTr/la_001.nii", "label": "labelsTr/la_001.nii"}])
    assert ids(find_items(root)) == ["la_001"] and "problem" not in find_items(root)[0]
    image = root / "imagesTr" / "la_001.nii"
    image.write_bytes(image.read_bytes()[:-10])
    assert "ends before its last voxel" in only_problem(root, "la_001", count=1)


def test_an_empty_test_list_in_dataset_json_is_harmless(root):
    edit_json(root, test=[], numTest=0)
    assert len(find_items(root)) == 4
    assert ids(inference_items(root)) == ["la_005", "la_006"]


def test_inference_falls_back_to_training_images(root):
    shutil.rmtree(root / "imagesTs")
    (root / "imagesTs").mkdir()
    (root / "imagesTs" / "._la_005.nii.gz").write_bytes(b"\0" * 176)
    assert ids(inference_items(root)) == ["la_001", "la_002", "la_003", "la_004"]


def test_inference_on_a_plain_folder(root):
    folder = root / "imagesTs"
    (folder / "._la_005.nii.gz").write_bytes(b"\0" * 176)
    (folder / "study.nii").write_bytes(gzip.decompress((folder / "la_005.nii.gz").read_bytes()))
    assert ids(inference_items(folder)) == ["la_005", "la_006", "study"]
    (folder / "la_005.nii").write_bytes(b"")
    items = inference_items(folder)
    assert sorted(Path(item["image"]).name for item in items) == [
        "la_005.nii", "la_005.nii.gz", "la_006.nii.gz", "study.nii",
    ]  # fmt: skip
    assert len(set(ids(items))) == 4, "two files of one name get two ids"


@pytest.mark.parametrize("make", [True, False])
def test_inference_without_volumes_is_an_error(tmp_path, make):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"No volumes to predict in .*empty: expected \.nii\.gz or \.nii"):
        inference_items(folder)
