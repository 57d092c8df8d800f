"""`data check` names everything that is wrong, at once, and changes nothing."""

import json
import re
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data.check import check_data, write_contact_sheet
from amkd_monai.data.datasets import TASKS, Task, get_task
from amkd_monai.data.datasets.described import Described
from amkd_monai.data.splits import SplitOptions
from amkd_monai.files.pictures import class_colours


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return get_task("kvasir_seg").write_phantom(tmp_path_factory.mktemp("kvasir"), count=10, size=(60, 90))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "Kvasir-SEG")


def test_a_sound_data_set_has_no_problems(root):
    report = check_data("kvasir_seg", root)
    assert report.problems == [] and len(report.items) == 10
    text = str(report)
    assert "20 image files, 0 not in the list" in text and "0 damaged item(s)" in text and "modes: RGB 10" in text
    assert "masks: 10, of which 0 empty" in text and "train: 7" in text and "no problems" in text


def test_the_split_is_that_of_the_options(root):
    assert "test: 2" in str(check_data("kvasir_seg", root, split=SplitOptions(folds=5, fold=3)))
    assert any("folds" in problem for problem in check_data("kvasir_seg", root, split=SplitOptions(fold=3)).problems)


def test_a_stand_in_is_named_and_an_empty_marker_is_a_problem(root):
    (root / "STAND-IN.txt").write_text("Frames of a pig.")
    report = check_data("kvasir_seg", root)
    assert "STAND-IN: Frames of a pig." in report.facts and not report.problems
    (root / "STAND-IN.txt").write_text("")
    assert any("STAND-IN.txt has no first line" in problem for problem in check_data("kvasir_seg", root).problems)


def test_everything_that_is_wrong_is_listed_at_once(root):
    images, masks = root / "images", root / "masks"
    (images / "phantom_001.jpg").write_bytes((images / "phantom_001.jpg").read_bytes()[:-900])
    (masks / "phantom_002.jpg").write_bytes(b"")
    Image.new("L", (5, 6)).save(masks / "phantom_003.jpg")
    Image.new("L", (7, 8)).save(masks / "phantom_004.jpg")
    (root / "other.png").write_bytes(b"")
    report = check_data("kvasir_seg", root)
    expected = (
        "images/phantom_001.jpg cannot be read",
        "masks/phantom_002.jpg cannot be read",
        "masks/phantom_003.jpg is 5x6 pixels",
        "masks/phantom_004.jpg is 7x8 pixels",
        "other.png cannot be read",
    )
    for words in expected:
        assert sum(words in problem for problem in report.problems) == 1, report.problems
    assert len(report.problems) == len(expected) and len(report.items) == 10
    assert report.damaged == {f"phantom_00{n}" for n in range(1, 5)} and "4 damaged item(s)" in str(report)


def test_masks_with_unexpected_values_and_empty_ones(root):
    mask = root / "masks" / "phantom_005.jpg"
    size = Image.open(mask).size
    grey = np.linspace(0, 100, size[0] * size[1]).reshape(size[::-1]).astype(np.uint8)
    mask.unlink()
    Image.fromarray(grey).save(mask.with_suffix(".png"))
    report = check_data("kvasir_seg", root)
    assert report.damaged == {"phantom_005"}
    assert check_data("kvasir_seg", root, mask_codes="threshold").problems == []
    assert len(report.problems) == 1 and "phantom_005.png cannot be used" in report.problems[0]
    for other in (root / "masks").iterdir():
        Image.new("1", Image.open(other).size).save(root / "masks" / f"{other.stem}.bmp")
        other.unlink()
    report = check_data("kvasir_seg", root)
    assert "masks: 10, of which 10 empty" in str(report) and "All masks are empty" in report.problems[0]


def test_duplicates_across_sections_are_a_problem_until_they_are_grouped(root):
    (root / "train.txt").write_text("".join(f"phantom_{n:03d}\n" for n in range(6)) + "copy\n")
    (root / "val.txt").write_text("".join(f"phantom_{n:03d}\n" for n in range(6, 10)))
    Image.open(root / "images" / "phantom_008.jpg").save(root / "images" / "copy.jpg", quality=60)
    shutil.copy(root / "masks" / "phantom_008.jpg", root / "masks" / "copy.jpg")
    report = check_data("kvasir_seg", root)
    (problem,) = report.problems
    assert problem.startswith("copy, phantom_008 look alike and lie in several sections")
    assert "1 clusters: copy = phantom_008" in str(report)
    report = check_data("kvasir_seg", root, options={"duplicate_distance": 32})
    assert report.problems == [] and "in no section: copy" in str(report)


def test_the_wrong_folder_is_one_problem(root):
    report = check_data("kvasir_seg", root.parent)
    assert len(report.problems) == 1 and f"one level too high, use {root}." in report.problems[0]
    assert report.items == []


def test_folders_of_single_cases_are_not_called_the_right_folder(root, tmp_path):
    for case in ("case_a", "case_b"):
        for part in ("images", "masks"):
            (tmp_path / "cases" / case / part).mkdir(parents=True)
            shutil.copy(root / part / "phantom_008.jpg", tmp_path / "cases" / case / part / "slide.jpg")
    (problem,) = check_data("kvasir_seg", tmp_path / "cases").problems
    assert "2 folders" in problem and "too high" not in problem and "collect" in problem


def test_class_labels_are_counted_and_conflicts_named(tmp_path, monkeypatch):
    """A classification task: the label is a class index."""
    rng = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "20.png")

    class Grades(Described):
        def find_items(self, root, cache_dir=None):
            files = sorted(root.glob("*.png"))
            return [{"image": str(f), "label": int(f.stem) % 3, "id": f.stem, "group": f.stem} for f in files]

    classes = ("none", "mild", "severe", "worst")
    task = Task("grades", classes, "fundus", "G", (), "classification", layout=Grades())
    monkeypatch.setitem(TASKS, "grades", task)
    report = check_data("grades", tmp_path)
    assert "classes: severe 5, none 4, mild 4" in str(report)
    assert any("0 and 20 are one image with the labels none and severe" in problem for problem in report.problems)
    assert "No image of the class(es) worst." in report.problems
    assert write_contact_sheet(tmp_path / "out" / "sheet.png", task, report.items).is_file()


def spoil_header(path, row):
    """Overwrite the affine of an uncompressed NIfTI, which nibabel itself would not write."""
    volume = nibabel.load(path)
    header = volume.header.copy()
    header["srow_x"] = row
    header["sform_code"], header["qform_code"] = 1, 0
    content = bytearray(path.read_bytes())
    content[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(content)


def test_volumes_with_nan_or_a_singular_affine_are_named(tmp_path):
    root = get_task("covid_volumes").write_phantom(tmp_path, cases=4, shape=(20, 18, 6))
    images = root / "COVID-19-CT-Seg_20cases"
    volume = nibabel.load(images / "case_002.nii.gz")
    array = volume.get_fdata(dtype=np.float32)
    array[3, 3, 3] = np.nan
    nibabel.Nifti1Image(array, volume.affine).to_filename(images / "case_002.nii.gz")
    plain = images / "case_003.nii"
    nibabel.Nifti1Image(np.asarray(nibabel.load(images / "case_003.nii.gz").dataobj), volume.affine).to_filename(plain)
    (images / "case_003.nii.gz").unlink()
    spoil_header(plain, [0, 0, 0, 0])
    problems = check_data("covid_volumes", root).problems
    assert any("case_002.nii.gz holds values that are not finite" in problem for problem in problems)
    assert sum("case_003.nii has a singular affine" in problem for problem in problems) == 1
    assert len(problems) == 2


def test_the_sheet_outlines_masks_in_pictures_and_volumes(root, tmp_path):
    for task, folder in (
        ("kvasir_seg", root),
        ("msd_heart", get_task("msd_heart").write_phantom(tmp_path, cases=2, shape=(12, 40, 44))),
    ):
        report = check_data(task, folder)
        path = write_contact_sheet(tmp_path / f"{task}.png", report.task, report.items, count=2)
        sheet = np.asarray(Image.open(path).convert("RGB"))
        assert sheet.shape[1] == 2 * 208
        assert max((sheet == class_colours(n)).all(axis=2).sum() for n in range(1, 7)) > 50
    with pytest.raises(ValueError, match="no image to draw"):
        write_contact_sheet(tmp_path / "x.png", report.task, [])


def test_the_sheet_shows_each_class_in_its_colour(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:30], mask[35:50, 30:70] = 1, 2
    Image.fromarray(np.arange(4800).astype(np.uint8).reshape(60, 80)).save(tmp_path / "images" / "a.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    report = check_data({"name": "three", "classes": ["background", "lesion", "rim"]}, tmp_path)
    path = write_contact_sheet(tmp_path / "sheet.png", report.task, report.items)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    for label in (1, 2):
        assert (sheet == class_colours(label)).all(axis=2).sum() > 50


def test_an_empty_mask_has_no_outline(tmp_path):
    root = get_task("busi").write_phantom(tmp_path, count=3, size=(60, 90))
    report = check_data("busi", root)
    normal = [item for item in report.items if item["class"] == "normal"]
    sheet = np.asarray(Image.open(write_contact_sheet(tmp_path / "sheet.png", report.task, normal)).convert("RGB"))
    assert not any((sheet == class_colours(n)).all(axis=2).any() for n in range(1, 7))


def test_the_command_prints_writes_and_tells_by_its_exit_code(root, tmp_path, capsys):
    arguments = ["data", "check", "kvasir_seg", "--dataset_dir", str(root), "--cache_dir", str(tmp_path / "cache")]
    arguments += ["--sheet", str(tmp_path / "sheet.png")]
    before = sorted(root.rglob("*"))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "no problems" in out and str(tmp_path / "sheet.png") in out
    assert sorted(root.rglob("*")) == before and (tmp_path / "sheet.png").is_file()
    (root / "images" / "phantom_001.jpg").write_bytes(b"x")
    assert main(arguments) == 1
    assert "1 problem(s)" in capsys.readouterr().out
    assert main([*arguments, "--data_options", json.dumps({"colour": 1})]) == 1
    assert "kvasir_seg has no data option colour" in capsys.readouterr().out
    configs = tmp_path / "own" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.json").write_text(json.dumps({"task": "kvasir_seg", "split_fractions": [0.5, 0.25, 0.25]}))
    (root / "images" / "phantom_001.jpg").unlink()
    main(["data", "check", str(configs.parent), *arguments[3:]])
    assert re.search("train: [45]\n", capsys.readouterr().out), "half of nine, not 70 %"
    assert main(["data", "check", str(ROOT / "bundles" / "multitask")]) == 1
    assert "bundle of each" in capsys.readouterr().err


def test_the_command_leaves_nothing_in_a_folder_without_bundles(root, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["data", "check", "kvasir_seg", "--dataset_dir", str(root)]) == 0
    assert not list((tmp_path / "here").iterdir())
    assert (tmp_path / "cache" / "amkd_monai" / "kvasir_seg" / "contact_sheet.png").is_file()


def test_help_and_data_commands_import_neither_torch_nor_monai(root, tmp_path):
    script = (
        "import sys; from amkd_monai.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'monai', 'scipy.stats'} & set(sys.modules)))"
    )
    check = ["data", "check", "kvasir_seg", "--dataset_dir", str(root), "--cache_dir", str(tmp_path)]
    for arguments, allowed in ((["--help"], "[]"), (["data", "fetch", "busi"], "[]"), (check, None)):
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                *arguments,
                *(["--sheet", str(tmp_path / "s.png")] if arguments is check else []),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        last = ended.stdout.splitlines()[-1]
        assert "torch" not in last and "monai" not in last, ended.stdout
        if allowed is not None:
            assert last == allowed
