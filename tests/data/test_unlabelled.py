"""Further images without labels: none of a held-out section, one kind, by group, and only where a teacher answers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from amkd_monai.data.datalist import Datalist, datalist
from amkd_monai.data.datasets import get_task
from amkd_monai.data.sampling import BatchSampler
from amkd_monai.data.unlabelled import further_images, look_unlike

TEACHERS = [{"name": "any"}]


def picture(seed: int) -> Image.Image:
    """A picture with large structures of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Datalist:
    root = tmp_path_factory.mktemp("data") / "Kvasir-SEG"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(20):
        picture(number).save(root / "images" / f"p{number}.png")
        Image.fromarray(np.eye(96, dtype=np.uint8) * 255).save(root / "masks" / f"p{number}.png")
    return datalist("kvasir_seg", root)


def folder_of(tmp_path, **pictures):
    tmp_path.mkdir(exist_ok=True)
    for name, image in pictures.items():
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def test_images_of_held_out_sections_are_left_out_and_counted(data, tmp_path):
    held_out, of_training = data.test[0]["image"], data.train[0]["image"]
    folder = folder_of(tmp_path / "more", new=picture(100), other=picture(101))
    for name, source in (("copy_of_test", held_out), ("copy_of_training", of_training)):
        (folder / f"{name}.png").write_bytes(Path(source).read_bytes())
    blurred = Image.open(data.validation[0]["image"]).filter(ImageFilter.GaussianBlur(1)).resize((80, 80))
    blurred.save(folder / "validation_again.jpg", quality=70)
    found = further_images(data, str(folder), TEACHERS, tmp_path / "cache")
    assert sorted(item["id"] for item in found.items) == ["unlabelled0/new", "unlabelled0/other"]
    assert not any("label" in item for item in found.items)
    assert found.record["left_out"] == {"copies": 2, "like_validation_or_test": 1}
    assert found.hash != further_images(data, None, TEACHERS).hash


def test_pictures_that_look_alike_or_share_a_name_are_one_group(data, tmp_path):
    image = picture(200)
    folder = folder_of(tmp_path, a_1=image, a_2=image.resize((90, 90)), b_1=picture(201))
    groups = [item["group"] for item in further_images(data, [folder], TEACHERS).items]
    assert groups[0] == groups[1] != groups[2]
    named = further_images(data, [folder], TEACHERS, groups=r"(.*)_\d+").items
    assert [item["group"] for item in named] == ["unlabelled0/a", "unlabelled0/a", "unlabelled0/b"]


def test_what_cannot_be_used_is_refused(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / "a.nii.gz").write_bytes(b"")
    below = folder_of(tmp_path / "above", x=picture(1)).rename(tmp_path / "inner")
    (tmp_path / "outer").mkdir()
    below.rename(tmp_path / "outer" / "images")
    refused = {"missing": "missing", "empty": "empty", "volumes": "holds NIfTI volumes", "outer": "images"}
    for name, part in refused.items():
        with pytest.raises(FileNotFoundError, match=part):
            further_images(data, tmp_path / name, TEACHERS)
    own = str(data.root / "images")
    with pytest.raises(ValueError, match="All 20 images"):
        further_images(data, own, TEACHERS)
    with pytest.raises(ValueError, match="teachers"):
        further_images(data, own, [])
    folder = folder_of(tmp_path / "named", y=picture(300))
    for expression in ("(", "(.*)_"):
        with pytest.raises(ValueError, match="unlabelled_groups"):
            further_images(data, folder, TEACHERS, groups=expression)
    with pytest.raises(FileNotFoundError, match="pictures"):
        heart = Datalist(get_task("msd_heart"), data.root, "argument", data.train, data.validation, data.test, [])
        further_images(heart, folder, TEACHERS)


def test_groups_are_drawn_equally_often():
    has_label = [True] * 4 + [False] * 12
    groups = [*"wxyz", *"a" * 10, "b", "c"]
    options = {"batch_size": 8, "use_unlabelled": True, "min_steps": 30}
    drawn = np.concatenate(list(BatchSampler(has_label, has_label, groups=groups, **options)))
    counts = np.bincount(drawn, minlength=16)
    assert counts[4:14].sum() == counts[14] == counts[15] == 40 and set(counts[4:14]) == {4}
    alone = [BatchSampler(has_label, has_label, groups=of, **options) for of in (None, [str(i) for i in range(16)])]
    assert list(alone[0]) == list(alone[1])


class Samples:
    """Decoded grey images, the second half without labels."""

    def __init__(self, labelled, further):
        self.has_label = np.arange(20) < 10
        levels = [base + i for base in (labelled, further) for i in range(10)]
        self.images = np.stack([np.full((3, 8, 8), level, np.uint8) for level in levels])


def test_another_window_is_noticed():
    assert "grey level is 64" in look_unlike(Samples(140, 60)) and look_unlike(Samples(140, 142)) == ""
