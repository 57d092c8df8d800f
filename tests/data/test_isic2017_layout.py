import shutil
from collections import Counter

import pytest
from helpers import shared_data

from amkd_monai.data.datasets import get_task
from amkd_monai.data.splits import SplitOptions

isic2017, isic2017_lesion = get_task("isic2017").layout, get_task("isic2017_lesion").layout
TRAINING = "ISIC-2017_Training_Part3_GroundTruth.csv"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("isic2017").write_phantom(tmp_path_factory.mktemp("isic"), counts=(15, 6, 6), height=32)


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "ISIC2017")


def counts(items):
    return [n for _, n in sorted(Counter(i["label"] for i in items).items())]


def test_real_images_keep_the_official_split_and_the_third_class_is_derived():
    root = shared_data("ISIC2017")
    sections = isic2017.split(root, isic2017.find_items(root))
    assert [counts(s) for s in sections] == [[45, 40, 35], [10, 10, 10], [12, 12, 12]]
    assert len(isic2017.inference_items(root)) == 36


def test_real_outlines_are_split_in_folds_where_the_test_section_has_none():
    root = shared_data("ISIC2017")
    items = isic2017_lesion.find_items(root)
    assert len(items) == 150 and all(i["label"].endswith(f"{i['id']}_segmentation.png") for i in items)
    assert sum(len(s) for s in isic2017_lesion.split(root, items)) == 150


def test_what_lies_beside_the_images_is_skipped(pristine):
    folder = pristine / "ISIC-2017_Training_Data"
    assert list(folder.glob("*_superpixels.png")) and list(folder.glob("*_metadata.csv"))
    assert len(isic2017.find_items(pristine)) == 27
    assert len(isic2017_lesion.find_items(pristine)) == 27
    assert [len(s) for s in isic2017_lesion.split(pristine, isic2017_lesion.find_items(pristine))] == [15, 6, 6]


def test_without_all_sections_folds_are_stratified(root):
    shutil.rmtree(root / "ISIC-2017_Test_v2_Data")
    (root / "ISIC-2017_Test_v2_Part3_GroundTruth.csv").unlink()
    items = isic2017.find_items(root)
    sections = isic2017.split(root, items, SplitOptions(folds=3))
    assert sum(len(s) for s in sections) == 21 and "section" not in sections[0][0]
    assert all(2 <= n <= 3 for n in counts(sections[2])) and len(counts(sections[1])) == 3


def replace(old, new):
    def spoil(root):
        text = (root / TRAINING).read_text()
        assert old in text
        (root / TRAINING).write_text(text.replace(old, new))

    return spoil


def row_numbers(root):
    head, *rows = (root / TRAINING).read_text().splitlines()
    numbered = [f"{i},{row.split(',', 1)[1]}" for i, row in enumerate(rows)]
    (root / TRAINING).write_text("\n".join([head, *numbered]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (row_numbers, ("ISIC-2017_Training_Data/", "is not there")),
        (replace("melanoma,seborrheic_keratosis", "melanoma,sk"), ("column(s) seborrheic_keratosis",)),
        (
            replace("ISIC_0000002,1.0,0.0", "ISIC_0000002,1.0,1.0"),
            ("ISIC_0000002", TRAINING, "melanoma, seborrheic_keratosis"),
        ),
        (replace("ISIC_0000002,1.0,0.0", "ISIC_0000002,0.7,0.0"), ("ISIC_0000002", TRAINING, "else 0")),
        (replace("ISIC_0000002,1.0", "ISIC_9999999,1.0"), ("ISIC_9999999", "is not there")),
        (replace("ISIC_0000002,1.0,0.0", ""), ("ISIC_0000002", f"{TRAINING} does not name")),
        (lambda root: (root / TRAINING).unlink(), (TRAINING, "is missing")),
    ],
)
def test_bad_input_is_one_sentence(root, spoil, words):
    spoil(root)
    try:
        texts = [item["problem"] for item in isic2017.find_items(root) if "problem" in item]
    except (ValueError, FileNotFoundError) as error:
        texts = [str(error)]
    assert any(all(word in text for word in words) for text in texts), texts
    assert all("\n" not in text and text.endswith(".") for text in texts)


def test_the_wrong_level_is_named(pristine):
    with pytest.raises(FileNotFoundError, match="one level too low"):
        isic2017.find_items(pristine / "ISIC-2017_Training_Data")
    with pytest.raises(FileNotFoundError, match="one level too high"):
        isic2017.find_items(pristine.parent)


def test_an_image_without_its_outline_is_named(root):
    mask = next((root / "ISIC-2017_Training_Part1_GroundTruth").iterdir())
    mask.unlink()
    (problem,) = (item["problem"] for item in isic2017_lesion.find_items(root) if "problem" in item)
    assert mask.stem.removesuffix("_segmentation") in problem and "lacks a mask" in problem
