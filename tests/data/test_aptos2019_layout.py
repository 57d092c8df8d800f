import csv
import logging
import shutil
from collections import Counter

import numpy as np
import pytest
from helpers import shared_data
from PIL import Image

from amkd_monai.data.datasets import get_task
from amkd_monai.data.splits import SplitOptions
from amkd_monai.data.transforms import CropFundusd
from amkd_monai.files.steps import crop_disc

LAYOUT = get_task("aptos2019").layout
find_items, inference_items, split = LAYOUT.find_items, LAYOUT.inference_items, LAYOUT.split


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("aptos2019").write_phantom(tmp_path_factory.mktemp("aptos"), count=25, unlabelled=2, height=40)


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / pristine.name)


def table(path):
    return list(csv.reader(path.open()))


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def resplit(root, nested):
    """Turn the original layout into the copy with three tables."""
    _, *rows = table(root / "train.csv")
    for file in ("train.csv", "test.csv"):
        (root / file).unlink()
    shutil.rmtree(root / "test_images")
    for name, csv_name, part in (("val_images", "valid", rows[15:20]), ("test_images", "test", rows[20:])):
        folder = root / name / name if nested else root / name
        folder.mkdir(parents=True)
        for code, _ in part:
            (root / "train_images" / f"{code}.png").rename(folder / f"{code}.png")
        write(root / f"{csv_name}.csv", [["id_code", "diagnosis"], *part])
    if nested:
        (root / "train_images").rename(root / "inner")
        (root / "train_images").mkdir()
        (root / "inner").rename(root / "train_images" / "train_images")
    write(root / "train_1.csv", [["id_code", "diagnosis"], *rows[:15]])


def test_real_photographs_are_split_by_grade_and_conflicting_duplicates_stay_together(caplog):
    root = shared_data("APTOS2019_standin_IDRiD")
    with caplog.at_level(logging.WARNING, logger="amkd_monai"):
        items = find_items(root)
    assert Counter(i["label"] for i in items) == {0: 29, 1: 16, 2: 28, 3: 19, 4: 19}
    assert "IDRiD_064_test (severe), IDRiD_118_train (no DR)" in caplog.text
    tests = []
    for fold in range(5):
        train, validation, test = split(root, items, SplitOptions(fold=fold))
        groups = [{i["group"] for i in section} for section in (train, validation, test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        counts = Counter(i["label"] for i in test)
        assert all(abs(counts[g] - n / 5) <= 1.6 for g, n in {0: 29, 1: 16, 2: 28, 3: 19, 4: 19}.items())
        assert len(Counter(i["label"] for i in validation)) == 5
        tests += [i["id"] for i in test]
    assert sorted(tests) == [i["id"] for i in items]


@pytest.mark.parametrize("nested", [False, True])
def test_three_tables_keep_their_sections(root, nested):
    resplit(root, nested)
    items = find_items(root)
    sections = split(root, items)
    assert [len(s) for s in sections] == [15, 5, 5] and "section" not in sections[0][0]
    assert len(inference_items(root)) == 5


@pytest.mark.parametrize(
    "names", [("0", "1", "2", "3", "4"), ("No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR")]
)
@pytest.mark.parametrize("sections", [False, True])
def test_class_folders_are_read(pristine, tmp_path, names, sections):
    _, *rows = table(pristine / "train.csv")
    for number, (code, grade) in enumerate(rows):
        section = ("train", "valid", "test")[min(2, number % 5)] if sections else "."
        folder = tmp_path / section / names[int(grade)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine / "train_images" / f"{code}.png", folder)
    items = find_items(tmp_path)
    assert {i["id"]: i["label"] for i in items} == {code: int(grade) for code, grade in rows}
    assert [len(s) for s in split(tmp_path, items)] == ([5, 5, 15] if sections else [16, 4, 5])


def test_a_duplicate_across_given_sections_stays_in_the_later_one(root, caplog):
    resplit(root, False)
    copied = next((root / "train_images").iterdir())
    victim = next((root / "test_images").iterdir())
    shutil.copy(copied, victim)
    with caplog.at_level(logging.WARNING, logger="amkd_monai"):
        train, _, test = split(root, find_items(root))
    assert len(train) == 14 and len(test) == 5 and "Left out of train, as the same images lie" in caplog.text
    assert copied.stem in caplog.text


def broken_grade(root):
    rows = table(root / "train.csv")
    write(root / "train.csv", [*rows[:-1], [rows[-1][0], "7"]])


def missing_column(root):
    write(root / "train.csv", [[row[0]] for row in table(root / "train.csv")])


def missing_image(root):
    next((root / "train_images").iterdir()).unlink()


def unnamed_image(root):
    shutil.copy(next((root / "train_images").iterdir()), root / "train_images" / "stranger.png")


def repeated_id(root):
    rows = table(root / "train.csv")
    write(root / "train.csv", [*rows, rows[-1]])


def no_rows(root):
    write(root / "train.csv", [["id_code", "diagnosis"]])


def no_table(root):
    (root / "train.csv").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (broken_grade, ("'7'", "use one of no DR")),
        (missing_column, ("train.csv", "diagnosis", "it has id_code")),
        (missing_image, ("is not there", "train_images")),
        (unnamed_image, ("stranger", "train.csv does not name")),
        (repeated_id, ("listed twice",)),
        (no_rows, ("does not name",)),
        (no_table, ("train_1.csv", "is missing")),
    ],
)
def test_bad_input_is_one_sentence(root, spoil, words):
    spoil(root)
    try:
        texts = [item["problem"] for item in find_items(root) if "problem" in item]
    except (ValueError, FileNotFoundError) as error:
        texts = [str(error)]
    assert any(all(word in text for word in words) for text in texts), texts
    assert all("\n" not in text and text.endswith(".") for text in texts)


def test_an_official_table_without_grades_is_left_out_aloud(root, caplog):
    with caplog.at_level(logging.WARNING, logger="amkd_monai"):
        assert len(find_items(root)) == 25
    assert caplog.text.count("test.csv needs the column(s) diagnosis") == 1


def test_the_wrong_level_is_named(pristine):
    with pytest.raises(FileNotFoundError, match="one level too low"):
        find_items(pristine / "train_images")
    with pytest.raises(FileNotFoundError, match="one level too high"):
        find_items(pristine.parent)


def test_borders_are_cut_and_the_disc_stays_round(pristine):
    y, x = np.mgrid[:60, :100]
    disc = ((x - 40) ** 2 + (y - 30) ** 2 <= 28**2) * 180.0 + 3.0
    image = np.stack([disc] * 3).astype(np.float32)
    image[:, 5, 95] = 255  # a bright speck in the border
    np.testing.assert_array_equal(crop_disc(image), image[:, 3:58, 13:68], "the outermost rows hold a pixel each")
    cut = CropFundusd("image")({"image": image, "label": 2})
    assert cut["image"].shape == (3, 55, 55) and cut["label"] == 2
    wide = CropFundusd("image")({"image": image[:, 10:50]})["image"]
    assert wide.shape == (3, 57, 57) and wide[:, :8].max() == 0 == wide[:, -8:].max() and wide[:, 8].max() > 0
    dark = np.zeros((3, 4, 6), np.float32)
    assert CropFundusd("image")({"image": dark})["image"].shape == (3, 6, 6)
    for item in find_items(pristine)[:6]:
        pixels = np.asarray(Image.open(item["image"]), np.float32).transpose(2, 0, 1)
        side = CropFundusd("image")({"image": pixels})["image"].shape
        assert side[1] == side[2] <= pixels.shape[2]
