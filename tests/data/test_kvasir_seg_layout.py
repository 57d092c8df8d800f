import logging
import shutil
from pathlib import Path

import pytest
from helpers import shared_data
from PIL import Image

from amkd_monai.data.datalist import datalist
from amkd_monai.data.datasets import get_task
from amkd_monai.data.splits import SplitOptions
from amkd_monai.files.names import DataProblems, natural

LAYOUT = get_task("kvasir_seg").layout
find_items, inference_items, split = LAYOUT.find_items, LAYOUT.inference_items, LAYOUT.split


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("kvasir_seg").write_phantom(tmp_path_factory.mktemp("kvasir"), count=8, size=(40, 60))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "Kvasir-SEG")


def ids(items):
    return [item["id"] for item in items]


def only_problem(root, name):
    """The problem of the one item that has one; all items are listed."""
    items = find_items(root)
    (item,) = (item for item in items if "problem" in item)
    assert len(items) == 8 and item["id"] == name
    return item["problem"]


def test_real_data_are_paired():
    items = find_items(shared_data("Kvasir-SEG"))
    assert len(items) == 154 and not any("problem" in item for item in items)
    assert ids(items) == sorted(ids(items), key=natural)
    assert all(Path(item["image"]).stem == Path(item["label"]).stem == item["id"] for item in items)
    assert len(inference_items(shared_data("Kvasir-SEG"))) == 154


def test_hidden_and_other_files_are_ignored(root):
    for name in ("._phantom_000.jpg", ".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "images" / name).write_bytes(b"\0" * 176)
        (root / "masks" / name).write_bytes(b"\0" * 176)
    (root / "images" / "folder.jpg").mkdir()
    assert len(find_items(root)) == len(inference_items(root)) == 8


def test_a_mask_may_have_another_suffix(root):
    mask = root / "masks" / "phantom_003.jpg"
    Image.open(mask).save(mask.with_suffix(".PNG"), format="png")
    mask.unlink()
    assert find_items(root)[3]["label"].endswith("phantom_003.PNG")


def test_identical_images_share_a_group(root):
    shutil.copy(root / "images" / "phantom_000.jpg", root / "images" / "copy.jpg")
    shutil.copy(root / "masks" / "phantom_000.jpg", root / "masks" / "copy.jpg")
    groups = {item["id"]: item["group"] for item in find_items(root)}
    assert groups["copy"] == groups["phantom_000"] == "copy+phantom_000"
    assert groups["phantom_001"] == "phantom_001"


def test_a_missing_folder_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No Kvasir-SEG data in .*/nowhere: expected the folders images/ and"):
        find_items(tmp_path / "nowhere")


def test_one_level_too_high_names_the_right_folder(root):
    with pytest.raises(FileNotFoundError, match=rf"one level too high, use {root}\."):
        find_items(root.parent)


@pytest.mark.parametrize("name", ["images", "masks"])
def test_one_level_too_low_names_the_right_folder(root, name):
    with pytest.raises(FileNotFoundError, match=rf"one level too low, use {root}\."):
        find_items(root / name)


def test_empty_folders_are_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(FileNotFoundError, match="No images in"):
        find_items(tmp_path)
    with pytest.raises(FileNotFoundError, match="No images to predict"):
        inference_items(tmp_path)


@pytest.mark.parametrize(("folder", "partner"), [("images", "image"), ("masks", "mask")])
def test_a_file_without_partner_is_named(root, folder, partner):
    (root / folder / "phantom_002.jpg").unlink()
    problem = only_problem(root, "phantom_002")
    assert "phantom_002.jpg lacks" in problem and partner in problem


def test_many_files_without_partner_are_counted(root):
    for mask in (root / "masks").glob("*.jpg"):
        mask.unlink()
    assert all("lacks a mask" in item["problem"] for item in find_items(root))
    with pytest.raises(DataProblems, match="7 more problems"):
        datalist("kvasir_seg", root).checked("stop")


def test_a_mask_of_another_size_is_named(root):
    Image.new("RGB", (10, 20)).save(root / "masks" / "phantom_001.jpg")
    assert "masks/phantom_001.jpg is 10x20 pixels" in only_problem(root, "phantom_001")


@pytest.mark.parametrize("folder", ["images", "masks"])
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_named(root, content, folder):
    (root / folder / "phantom_001.jpg").write_bytes(content)
    assert f"{folder}/phantom_001.jpg cannot be read" in only_problem(root, "phantom_001")


def test_two_files_of_one_id_are_named(root):
    shutil.copy(root / "images" / "phantom_001.jpg", root / "images" / "phantom_001.jpeg")
    (problem,) = [item["problem"] for item in find_items(root) if "problem" in item]
    assert "phantom_001.jpeg" in problem and "phantom_001.jpg have the same name" in problem


def test_file_lists_fix_the_test_section(root):
    items = find_items(root)
    (root / "train.txt").write_text("".join(f"{name}\n" for name in ids(items)[:5]))
    (root / "val.txt").write_text("\n".join(f"{name}.jpg" for name in ids(items)[5:]) + "\n\n")
    train, validation, test = split(root, items, SplitOptions(fractions=(0.6, 0.2, 0.2)))
    assert ids(test) == ids(items)[5:]
    assert (len(train), len(validation)) == (4, 1)
    assert sorted(ids(train + validation)) == ids(items)[:5]


def test_without_file_lists_the_split_is_random(root):
    assert [len(section) for section in split(root, find_items(root), SplitOptions(fractions=(0.5, 0.25, 0.25)))] == [
        4,
        2,
        2,
    ]


def test_one_file_list_alone_is_an_error(root):
    (root / "train.txt").write_text("phantom_000\n")
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing: give both"):
        split(root, find_items(root))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("phantom_000\nunknown", "phantom_001", "ids without an image: unknown"),
        ("phantom_000", "phantom_000", r"val\.txt .*train\.txt.*phantom_000"),
        ("phantom_000", "\n", r"val\.txt is empty"),
    ],
)
def test_contradicting_file_lists_are_an_error(root, train, test, message):
    (root / "train.txt").write_text(train)
    (root / "val.txt").write_text(test)
    with pytest.raises(ValueError, match=message):
        split(root, find_items(root))


def test_file_lists_that_leak_or_leave_out_are_announced(root, caplog):
    shutil.copy(root / "images" / "phantom_000.jpg", root / "images" / "copy.jpg")
    shutil.copy(root / "masks" / "phantom_000.jpg", root / "masks" / "copy.jpg")
    (root / "train.txt").write_text("copy\nphantom_001\nphantom_002\nphantom_003\n")
    (root / "val.txt").write_text("phantom_000\n")
    with caplog.at_level(logging.WARNING, "amkd_monai"):
        train, validation, test = split(root, find_items(root))
    assert ids(test) == ["phantom_000"]
    assert sorted(ids(train + validation)) == ["phantom_001", "phantom_002", "phantom_003"]
    assert "later section: copy." in caplog.text
    assert "neither file list" in caplog.text and "phantom_004, phantom_005" in caplog.text


def test_inference_on_a_plain_folder(root):
    (root / "images" / "._x.png").write_bytes(b"")
    items = inference_items(root / "images")
    assert len(items) == 8
    assert items[0] == {"image": str(root / "images" / "phantom_000.jpg"), "id": "phantom_000"}


def test_inference_without_the_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No images to predict in .*nowhere"):
        inference_items(tmp_path / "nowhere")


def test_folds_take_the_place_of_file_lists_and_fractions(root):
    items = find_items(root)
    (root / "train.txt").write_text("\n".join(ids(items)[:6]))
    (root / "val.txt").write_text("\n".join(ids(items)[6:]))
    tested = [item for k in range(4) for item in ids(split(root, items, SplitOptions(folds=4, fold=k))[2])]
    assert sorted(tested) == sorted(ids(items))
    with pytest.raises(ValueError, match="folds"):
        split(root, items, SplitOptions(fold=1))
