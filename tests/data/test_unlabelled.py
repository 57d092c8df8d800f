"""Further images without labels: none of a held-out section, one kind, by group, and only where a teacher answers."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import needs
from own_data import dicom_picture, dicom_series, signed
from PIL import Image, ImageFilter

from amkd_monai.data.datalist import Datalist, datalist, further_images
from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import look_unlike
from amkd_monai.data.sampling import BatchSampler
from amkd_monai.data.transforms import load_rgb

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
    assert found.record["left_out"] == {"copies": 2, "like_validation_or_test": 1, "of_their_patients": 0}
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
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "1").write_bytes(bytes(128) + b"DICM")
    refused = {
        "slices": "dcm",
        "missing": "missing",
        "empty": "empty",
        "volumes": r"a\.nii\.gz",
        "outer": "images",
    }
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
    with pytest.raises(FileNotFoundError, match=r"y\.png.*volumes"):
        heart = Datalist(get_task("msd_heart"), data.root, "argument", data.train, data.validation, data.test, [])
        further_images(heart, folder, TEACHERS)


def volume(path: Path, seed: int) -> Path:
    """A NIfTI volume of whole numbers with large structures of its own."""
    levels = np.asarray(picture(seed).resize((24, 28)).convert("L")).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.stack([levels + z for z in range(5)], 2), np.diag([2.0, 2.0, 3.0, 1.0])), path)
    return path


def test_series_of_dicom_are_volumes_by_patient_without_those_of_held_out_sections(tmp_path):
    held_out = volume(tmp_path / "held_out.nii.gz", 0)
    test = dicom_series(tmp_path / "test" / "case", volume(tmp_path / "t.nii.gz", 1))
    validation = [{"image": str(held_out), "id": "v", "group": "v"}, {"image": "gone", "id": "g", "problem": "gone"}]
    known = [{"image": str(test), "id": "t", "group": "t"}]
    heart = Datalist(get_task("msd_heart"), tmp_path, "argument", [], validation, known, [])
    folder = tmp_path / "more"
    shutil.copy(volume(tmp_path / "n.nii.gz", 2), folder.mkdir() or folder / "nifti.nii.gz")
    dicom_series(folder / "again", held_out)
    for number in range(3, 7):
        dicom_series(folder / f"series{number}", volume(tmp_path / f"{number}.nii.gz", number))
    found = further_images(heart, folder, TEACHERS, tmp_path / "cache")
    assert {item["id"] for item in found.items} == {
        f"unlabelled0/{n}" for n in ("nifti", *map("series{}".format, range(3, 7)))
    }
    assert found.record["left_out"] == {"copies": 0, "like_validation_or_test": 1, "of_their_patients": 0}
    for series, patient, study in ((test, "A", "1"), *((folder / f"series{n}", p, s) for n, p, s in TOLD)):
        signed(series, patient, study)
    found = further_images(heart, folder, TEACHERS, tmp_path / "cache")
    groups = {item["id"][12:]: item["group"] for item in found.items}
    assert (
        groups.keys() == {"nifti", "series4", "series5", "series6"}
        and found.record["left_out"]["of_their_patients"] == 1
    )
    assert groups["series4"] == groups["series5"] != groups["series6"] and found.record["groups"] == 3
    assert not any("Smith" in group for group in groups.values()), "a cache keeps groups"
    one = further_images(heart, folder / "series6", TEACHERS)
    assert [(item["id"], item["image"]) for item in one.items] == [("unlabelled0/series6", str(folder / "series6"))]
    folder.rename(tmp_path / "test" / "more")
    shutil.rmtree(tmp_path / "test" / "case")
    with pytest.raises(FileNotFoundError, match="more"):
        further_images(heart, tmp_path / "test", TEACHERS)


TOLD = ((3, "A", "2"), (4, "Smith", "3"), (5, "Smith", "4"), (6, "", "5"))


def test_pictures_of_dicom_are_read_as_they_are_shown_or_refused(data, tmp_path):
    grey = np.asarray(picture(400).convert("L"))
    wide = (grey.astype(np.int16) * 4) - 300  # a window from -200 on, 512 wide, after the rescaling by 2 and 100
    window = {"RescaleSlope": "2", "RescaleIntercept": "100", "WindowCenter": ["56", "1"], "WindowWidth": ["512", "2"]}
    files = {
        "grey": (grey, {}),
        "inverted": (255 - grey, {"PhotometricInterpretation": "MONOCHROME1"}),
        "colour": (np.asarray(picture(401)), {"PatientID": "B"}),
        "window": (wide, {**window, "PatientID": "A"}),
    }
    shown = {name: dicom_picture(tmp_path / f"{name}.dcm", *of[:1], **of[1]) for name, of in files.items()}
    read = {name: load_rgb()({"image": str(file)})["image"].numpy() for name, file in shown.items()}
    for name in ("grey", "inverted"):
        assert np.array_equal(read[name], np.repeat(grey[None], 3, 0)), name
    assert np.array_equal(read["colour"], np.asarray(picture(401)).transpose(2, 0, 1))
    itk = needs("SimpleITK")
    values = itk.GetArrayFromImage(itk.ReadImage(str(shown["window"])))[0].astype(float)
    expected = np.interp(values, (56 - 0.5 - 511 / 2, 56 - 0.5 + 511 / 2), (0, 255)).round()
    assert np.array_equal(read["window"][0], expected) and 20 < len(np.unique(expected)) < 200

    found = further_images(data, tmp_path, TEACHERS, tmp_path / "cache")
    assert {item["id"][12:]: item["group"] for item in found.items}.keys() == files.keys()
    assert found.record["groups"] == 3, "two of them look alike"
    refused = {"no window": (wide, {}), "sigmoid": (wide, {**window, "VOILUTFunction": "SIGMOID"})}
    refused["frames"] = (grey, {"NumberOfFrames": 2, "Rows": 48})
    refused["high"] = (grey.astype(np.uint16) << 8, {**window, "BitsStored": 8, "HighBit": 15})
    refused["six"] = (grey >> 2, {"BitsStored": 6, "HighBit": 5})
    refused["each frame"] = (grey, {"PerFrameFunctionalGroupsSequence": []})
    for name, (values, tags) in refused.items():
        with pytest.raises(ValueError, match=f"{name}.dcm"):
            load_rgb()({"image": str(dicom_picture(tmp_path / f"{name}.dcm", values, **tags))})


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
