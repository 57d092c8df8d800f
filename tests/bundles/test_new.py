"""What `new` says of a folder and writes into the bundle, for each kind of data; what it refuses."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from own_data import rimmed_pictures, rimmed_volumes
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.bundles.new import new_bundle
from amkd_monai.data.check import check_data
from amkd_monai.data.datasets import TASKS, get_task
from amkd_monai.files.names import DataProblems


def made(name, data, folder, **options):
    """The task, the training config and the facts of a new bundle."""
    bundle, facts = new_bundle(name, data, folder / "bundles", **options)
    config = json.loads((bundle / "configs" / "train.json").read_text())
    return get_task(bundle / "configs" / "task.json"), config, "\n".join(facts)


def test_values_that_are_no_class_indices_get_a_meaning(tmp_path):
    data = rimmed_pictures(tmp_path / "polyps", count=4, values=(0, 128, 255))
    task, config, facts = made("three", data, tmp_path)
    assert task.classes == ("background", "value 128", "value 255") and "128 in 4" in facts
    assert config["mask_codes"] == {"0": 0, "128": 1, "255": 2} == task.mask_codes
    assert check_data(task, data).problems == []
    with pytest.raises(ValueError, match="give 3 --classes"):
        made("two", data, tmp_path, classes=["background", "polyp"])
    assert not (tmp_path / "bundles" / "two").exists()
    with pytest.raises(ValueError, match="busi"):
        made("busi", data, tmp_path)
    with pytest.raises(FileExistsError, match="three"):
        made("three", data, tmp_path)


def test_files_that_cannot_be_used_leave_the_others_a_bundle(tmp_path):
    data = rimmed_pictures(tmp_path / "polyps", count=5)
    names = sorted(file.name for file in (data / "images").iterdir())
    entries = [{"image": f"images/{name}", "label": f"masks/{name}"} for name in names]
    gone = [{"image": "/gone/a.png", "label": f"masks/{names[0]}"}, {"image": f"images/{names[0]}", "label": "/gone/b"}]
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), data / "images" / "v.nii.gz")
    stray = {"image": "images/v.nii.gz", "label": "images/v.nii.gz"}
    (data / "list.json").write_text(json.dumps({"training": [stray, *gone, *entries[1:]]}))
    task, _, facts = made("listed", data, tmp_path)
    assert task.dimensions == 2 and "3 of them cannot be used" in facts
    problems = check_data(task, data).problems
    assert all(any(name in problem for problem in problems) for name in ("/gone/a.png", "/gone/b", "v.nii.gz"))
    (data / "list.json").write_text(json.dumps({"training": gone}))
    with pytest.raises(ValueError, match=r"/gone/a\.png is not there"):
        made("nothing", data, tmp_path)


def test_two_values_and_grey_levels_are_background_and_foreground(tmp_path):
    data = rimmed_pictures(tmp_path / "polyps", count=3, values=(0, 255, 255))
    assert made("two", data, tmp_path)[0].classes == ("background", "foreground")
    empty = rimmed_pictures(tmp_path / "empty", count=3, values=(0, 0, 0))
    with pytest.raises(ValueError, match="0 alone"):
        made("empty", empty, tmp_path)
    for mask in (data / "masks").iterdir():
        Image.open(mask).save(mask.with_suffix(".jpg"), quality=60)
        mask.unlink()
    task, config, _ = made("grey", data, tmp_path, classes=["background", "polyp"], modality="endoscopy")
    assert config["mask_codes"] == "auto" and task.prompts == ("polyp in endoscopy",)
    assert check_data(task, data).problems == []


def test_volumes_in_folders_of_classes_or_patients_are_refused(tmp_path):
    for name in ("p1/p1_t1", "p1/p1_seg", "p2/p2_t1", "p2/p2_seg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(
            nib.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4)),
            tmp_path / "data" / f"{name}.nii.gz",
        )
    with pytest.raises(ValueError, match=r"data holds volumes with classes"):
        made("brats", tmp_path / "data", tmp_path)


def test_regions_and_ignored_values_of_nnunet_are_taken(tmp_path):
    data = rimmed_volumes(tmp_path / "raw", cases=3)
    about = json.loads((data / "dataset.json").read_text())
    about["labels"] = {"background": 0, "whole": [1, 2], "left atrium": 2, "ignore": 3}
    (data / "dataset.json").write_text(json.dumps(about))
    task, config, _ = made("parts", data, tmp_path)
    assert task.classes == ("background", "label 1", "left atrium") and task.regions == {"whole": [1, 2]}
    assert config["mask_codes"] == {"0": 0, "1": 1, "2": 2, "3": "ignore"}


def test_a_ct_gets_a_window_around_its_labels_and_slices_along_its_longest_voxels(tmp_path):
    data = TASKS["covid_volumes"].write_phantom(tmp_path, cases=3, shape=(40, 36, 12))
    (data / "COVID-19-CT-Seg_20cases").rename(data / "images")
    (data / "Infection_Mask").rename(data / "masks")
    task, config, facts = made("lungs", data, tmp_path)
    window = next(step for step in config["train"]["preprocessing"]["transforms"] if "CtWindow" in step["_target_"])
    image = next(iter(sorted((data / "images").iterdir())))
    array, inside = (np.asarray(nib.load(data / k / image.name).dataobj) for k in ("images", "masks"))
    low, high = np.percentile(array[inside > 0], (0.5, 99.5))
    assert task.values == "ct" and task.modality == "CT" and "HU" in facts
    assert window["low"] < low < high < window["high"]
    spacing = nib.load(image).header.get_zooms()
    assert config["spacing"][0] == pytest.approx(max(spacing), abs=1e-3) and config["volume_size"][0] == -1


def test_a_table_gives_classes_and_a_column_the_groups(tmp_path, capsys):
    rows = ["file;label;patient"]
    for number in range(12):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 60), np.uint8)).save(
            tmp_path / "data" / f"{number}.png"
        )
        rows.append(f"{number}.png;{('no', 'yes')[number % 2]};p{number // 2}")
    (tmp_path / "data" / "list.csv").write_text("\n".join(rows))
    command = ["new", "calls", "--data", str(tmp_path / "data"), "--to", str(tmp_path / "bundles")]
    assert main([*command, "--groups", "patient"]) == 0
    assert "groups: 6" in capsys.readouterr().out
    task = get_task(tmp_path / "bundles" / "calls" / "configs" / "task.json")
    assert task.classes == ("no", "yes") and task.singled_out == ("yes",) and task.is_classification
    assert {item["group"] for item in task.layout.find_items(tmp_path / "data")} == {f"p{n}" for n in range(6)}
    assert main([*command[:1], "found", *command[2:]]) == 0
    assert "groups: 6" in capsys.readouterr().out, "a column of a usual name is taken"
    (tmp_path / "data" / "list.csv").write_text("\n".join(row.rpartition(";")[0] for row in rows))
    assert main([*command[:1], "alone", *command[2:]]) == 0
    assert "EACH IMAGE IS A GROUP OF ITS OWN" in capsys.readouterr().out
    (tmp_path / "data" / "list.csv").write_text("\n".join(["file,label", *(f"{n}.png,{n / 8}" for n in range(12))]))
    assert main([*command[:1], "measured", *command[2:]]) == 1 and "0.125" in capsys.readouterr().err
    assert main(["new", "none", "--data", str(tmp_path / "bundles")]) == 1
    assert "expected" in capsys.readouterr().err
    (tmp_path / "data").rename(tmp_path / "images")
    (tmp_path / "several").mkdir()
    (tmp_path / "images").rename(tmp_path / "several" / "images")
    (tmp_path / "several" / "findings.csv").write_text("image,effusion,nodule\n1,0,2\n2,1,1\n")
    assert main(["new", "findings", "--data", str(tmp_path / "several"), "--to", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "findings.csv" in said and "effusion, nodule" in said


def test_a_mask_of_several_colours_among_many_is_counted_and_named(tmp_path):
    data = rimmed_pictures(tmp_path / "polyps", count=5)
    first, *others = sorted((data / "masks").iterdir())
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    Image.fromarray(colours[np.asarray(Image.open(first))]).save(first)
    task, _, facts = made("coloured", data, tmp_path)
    assert len(task.classes) == 3 and str(first) in facts
    assert [str(first) in problem for problem in check_data(task, data).problems] == [True]
    for mask in others:
        Image.fromarray(colours[np.asarray(Image.open(mask))]).save(mask)
    with pytest.raises(DataProblems) as refused:
        made("all", data, tmp_path)
    assert len(refused.value.problems) == 5


def test_volumes_that_cannot_be_read_are_named(tmp_path):
    data = rimmed_volumes(tmp_path / "raw", cases=3)
    files = sorted((data / "imagesTr").iterdir())
    for file in files:
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataProblems) as refused:
        made("damaged", data, tmp_path)
    for file, problem in zip(files, refused.value.problems, strict=True):
        assert str(file) in problem and "dimensions" not in problem


def test_labels_of_volumes_below_0_are_refused(tmp_path):
    data = rimmed_volumes(tmp_path / "raw", cases=3)
    file = sorted((data / "labelsTr").iterdir())[1]
    label = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj).astype(np.int16) - 1, label.affine), file)
    with pytest.raises(ValueError, match=rf"{file.name} .*-1"):
        made("signed", data, tmp_path)
    assert not (tmp_path / "bundles").exists()


def test_pictures_of_a_class_may_all_end_as_masks_do(tmp_path):
    for number in range(12):
        file = tmp_path / "data" / ("grey", "white")[number % 2] / f"{number}_seg.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 200, (40, 60), np.uint8)).save(file)
    assert made("cells", tmp_path / "data", tmp_path)[0].classes == ("grey", "white")


@pytest.mark.parametrize("names", [("image", "mask"), ("image", "label"), ("{0}", "{0}_mask"), ("{0}", "{0}_seg")])
def test_folders_of_one_image_and_its_mask_are_no_classes(names, tmp_path):
    for number in range(8):
        for name, values in zip(names, (200, 2), strict=True):
            file = tmp_path / "data" / f"p{number}" / f"{name.format(number)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, values, (40, 60), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"p0 .*images/ and masks/"):
        made("cases", tmp_path / "data", tmp_path)
    for number in range(8):
        (tmp_path / "data" / f"p{number}").rename(tmp_path / f"p{number}")
        for kind, name in zip(("images", "masks"), names, strict=True):
            (tmp_path / "data" / kind).mkdir(exist_ok=True)
            (tmp_path / f"p{number}" / f"{name.format(number)}.png").rename(tmp_path / "data" / kind / f"{number}.png")
    assert made("masks", tmp_path / "data", tmp_path)[0].kind == "segmentation"
