"""A task that a file describes, and layouts of any folder: each reads what its format says, or names what is wrong."""

from __future__ import annotations

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from own_data import dicom_series, signed
from PIL import Image

from amkd_monai.bundles.new import new_bundle
from amkd_monai.data.check import check_data
from amkd_monai.data.datalist import datalist, find_items, inference_datalist, labelled_folder
from amkd_monai.data.datasets import get_task, recorded_task
from amkd_monai.files.names import DataProblems, images_to_predict

CELLS = {"name": "cells", "classes": ["background", "cell", "rim"], "modality": "microscopy"}
GRADES = {"name": "grades", "classes": ["no finding", "mild", "severe"], "kind": "classification"}
RNG = np.random.default_rng(0)


def picture(file, size=(20, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (*size, 3), dtype=np.uint8)).save(file)


def mask(file, values=(1, 2), size=(20, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros(size, np.uint8)
    levels[2:12, 2:20], levels[4:8, 4:8] = values
    Image.fromarray(levels).save(file)


def volume(file, values=None, shape=(6, 7, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.normal(size=shape).astype(np.float32) if values is None else RNG.choice(values, shape).astype(np.uint8)
    nib.save(nib.Nifti1Image(array, np.eye(4)), file)


def problem_of(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, OSError) as error:
        return error


def ids(sections):
    return [[item["id"] for item in section] for section in (sections.train, sections.validation, sections.test)]


def test_folders_of_images_and_labels_with_patients_in_the_names(tmp_path):
    for number in range(12):
        picture(tmp_path / "images" / f"p{number // 2}_{number}.png")
        mask(tmp_path / "labels" / f"p{number // 2}_{number}_mask.png")
    (tmp_path / "task.json").write_text(json.dumps({**CELLS, "layout": {"groups": r"(p\d+)_"}}))
    found = datalist(tmp_path / "task.json", tmp_path)
    patients = [{name.split("_")[0] for name in section} for section in ids(found)]
    assert all(patients) and sum(map(len, patients)) == 6
    assert found.task.prompts == ("cell in microscopy", "rim in microscopy") and found.task.is_classification is False
    assert recorded_task(found.describe()) == found.task, "a record alone tells the task"


def test_everything_wrong_with_a_folder_is_named_at_once(tmp_path):
    for number in range(9):
        picture(tmp_path / "images" / f"{number}.png")
        mask(tmp_path / "masks" / f"{number}.png")
    mask(tmp_path / "masks" / "0.png", (1, 7))
    mask(tmp_path / "masks" / "1.png", size=(20, 31))
    (tmp_path / "masks" / "2.png").unlink()
    picture(tmp_path / "images" / "3.jpg")
    volume(tmp_path / "images" / "4v.nii.gz")
    mask(tmp_path / "masks" / "alone.png")
    problems = "\n".join(check_data(CELLS, tmp_path).problems)
    for file, what in {
        "masks/0.png": "7", "masks/1.png": "31x20", "images/2.png": "lacks a mask", "images/3.jpg": "images/3.png",
        "images/4v.nii.gz": "2 dimensions", "masks/alone.png": "lacks an image",
    }.items():  # fmt: skip
        assert [line for line in problems.splitlines() if file in line and what in line], (file, problems)
    with pytest.raises(DataProblems) as refused:
        datalist(CELLS, tmp_path).checked("stop")
    assert len(refused.value.problems) == 5, "values are seen where masks are read"


def test_images_in_folders_below_those_that_are_read_are_named(tmp_path, caplog):
    for number in range(6):
        picture(tmp_path / "pairs" / "images" / ("." if number else "deep") / f"{number}.png")
        mask(tmp_path / "pairs" / "masks" / f"{number}.png")
        picture(tmp_path / "classes" / "ab"[number % 2] / ("p1" if number == 4 else ".") / f"{number}.png")
    cells = get_task({"name": "c", "kind": "classification", "classes": ["a", "b"], "modality": "microscopy"})
    assert [item["id"] for item in cells.layout.find_items(tmp_path / "classes")] == ["0", "1", "2", "3", "5"]
    assert "p1/4.png" in caplog.text
    caplog.clear()
    assert len(get_task(CELLS).layout.find_items(tmp_path / "pairs")) == 6 and "deep/0.png" in caplog.text
    caplog.clear()
    assert len(images_to_predict(tmp_path / "pairs" / "images")) == 5 and "deep/0.png" in caplog.text


def test_a_datalist_with_folds_is_split_by_them_and_absolute_paths_that_are_gone_are_named(tmp_path):
    entries = []
    for number in range(8):
        picture(tmp_path / "data" / f"{number}.png")
        mask(tmp_path / "data" / f"{number}_m.png")
        entry = {"image": f"data/{number}.png", "label": f"data/{number}_m.png", "fold": number % 4}
        entries.append(entry)
    content = {"training": entries, "testing": [{"image": "data/0.png"}]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    assert ids(datalist(CELLS, tmp_path, fold=1)) == [["0", "3", "4", "7"], ["2", "6"], ["1", "5"]]
    assert [item["id"] for item in inference_datalist(CELLS, tmp_path)] == ["0"]
    with pytest.raises(ValueError, match="fold 4"):
        datalist(CELLS, tmp_path, fold=4)
    entries.append({"image": "/gone/a.png", "label": "/gone/b.png", "fold": 0})
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    assert any("/gone/a.png" in problem for problem in check_data(CELLS, tmp_path).problems)
    for entry in ({"img": "data/0.png", "label": "data/0_m.png"}, {"image": [], "label": "data/0_m.png"}):
        (tmp_path / "datalist.json").write_text(json.dumps({"training": [*entries[:8], entry]}))
        assert any("without" in problem and "0_m.png" in problem for problem in check_data(CELLS, tmp_path).problems)
    content["testing"] = [{"image": "data/0.png", "label": "data/0_m.png"}]
    content["training"], content["validation"] = entries[2:8], entries[1:2]
    for entry in entries:
        del entry["fold"]
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    assert ids(datalist(CELLS, tmp_path)) == [["2", "3", "4", "5", "6", "7"], ["1"], ["0"]]


def test_folds_patients_and_labels_of_a_datalist_are_used_or_refused(tmp_path):
    task = {"name": "c", "kind": "classification", "classes": ["a", "b"], "modality": "microscopy"}

    def listed(test=(), **keys):
        entries = [{"image": f"{n}.png", "label": "ab"[n % 2], **{k: v(n) for k, v in keys.items()}} for n in range(12)]
        (tmp_path / "list.json").write_text(
            json.dumps({"training": entries[len(test) :], "test": entries[: len(test)]})
        )
        return task

    for number in range(12):
        picture(tmp_path / f"{number}.png")
    words = {"fold": lambda n: str(n % 4)}
    assert ids(datalist(listed(**words), tmp_path, fold=1)) == ids(
        datalist(listed(fold=lambda n: n % 4), tmp_path, fold=1)
    )
    for folds in (lambda n: 0, lambda n: n % 2, lambda n: f"f{n % 4}", lambda n: n % 4 if n else None):
        with pytest.raises(ValueError, match=r"fold"):
            datalist(listed(fold=folds), tmp_path)
    with pytest.raises(ValueError, match=r"1 fold.*training"):
        datalist(listed(test=range(3), fold=lambda n: 0), tmp_path)
    for key in ("patient", "PatientID", "group"):
        items = find_items(get_task(listed(**{key: lambda n: n // 4})), tmp_path)
        assert [item["group"] for item in items] == [str(n // 4) for n in range(12)], key
    for silent in (None, float("nan"), ""):
        problems = check_data(listed(label=lambda n, s=silent: s if n == 3 else "a"), tmp_path).problems
        assert any("3.png has no label" in problem for problem in problems), silent
    findings = {**task, "kind": "multilabel"}
    listed(label=lambda n: [["a", "b"], [], ["b"]][n % 3])
    assert [item["label"] for item in find_items(get_task(findings), tmp_path)][:3] == [3, 0, 2]
    listed(label=lambda n: [n % 2, 1])
    assert len([p for p in check_data(findings, tmp_path).problems if "[0, 1]" in p or "[1, 1]" in p]) == 12


def test_a_table_without_a_column_is_named(tmp_path):
    picture(tmp_path / "images" / "1.png")
    (tmp_path / "t.csv").write_text("image,mass\n1,0\n")
    findings = {"name": "c", "kind": "multilabel", "classes": ["mass", "rib"], "layout": {"form": "table"}}
    for read in (find_items, labelled_folder):
        with pytest.raises(FileNotFoundError, match=r"t\.csv.*label.*mass, rib"):
            read(get_task(findings), tmp_path)


def test_sections_without_one_for_training_are_refused(tmp_path):
    for section in ("val", "test"):
        for number in range(6):
            picture(tmp_path / section / "images" / f"{section}{number}.png")
            mask(tmp_path / section / "masks" / f"{section}{number}.png")
    with pytest.raises(ValueError, match="training"):
        datalist(CELLS, tmp_path)
    assert len(labelled_folder(CELLS, tmp_path).test) == 12


def test_nnunet_folders_are_read_as_they_are_and_a_missing_channel_is_named(tmp_path):
    for case in ("a_001", "a_002", "a_003", "a_004"):
        volume(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
        volume(tmp_path / "labelsTr" / f"{case}.nii.gz", [0, 1, 2])
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "cell": 1, "rim": 2}, "numTraining": 4}
    (tmp_path / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    volumes = {**CELLS, "dimensions": 3}
    items = find_items(volumes, tmp_path)
    assert [item["id"] for item in items] == ["a_001", "a_002", "a_003", "a_004"]
    assert items[0]["image"].endswith("a_001_0000.nii.gz") and items[0]["label"].endswith("labelsTr/a_001.nii.gz")
    volume(tmp_path / "imagesTs" / "b_0000.nii.gz")
    assert [item["id"] for item in inference_datalist(volumes, tmp_path)] == ["b"]
    volume(tmp_path / "imagesTr" / "a_001_0001.nii.gz")
    about["channel_names"]["1"] = "PET"
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    problems = check_data(volumes, tmp_path).problems
    assert len(problems) == 4 and any("lacks a_002_0001" in problem for problem in problems)
    assert any("a_001_0000.nii.gz gives 2 channel(s)" in problem for problem in problems)


def test_classes_and_channels_of_another_order_are_refused(tmp_path):
    for case in ("a", "b", "c"):
        volume(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
        volume(tmp_path / "imagesTr" / f"{case}_0001.nii.gz")
        volume(tmp_path / "labelsTr" / f"{case}.nii.gz", [0, 1, 2])
    scans = {**CELLS, "dimensions": 3, "channels": ["T1", "FLAIR"]}
    ordered = {"channel_names": {"0": "T1", "1": "flair"}, "labels": {"background": 0, "Cell": 1, "rim": 2}}

    def refusals(task=scans, **changes):
        (tmp_path / "dataset.json").write_text(json.dumps({**ordered, **changes}))
        reads = (datalist, labelled_folder, inference_datalist)
        return [isinstance(problem_of(read, task, tmp_path), ValueError) for read in reads]

    other = {"background": 0, "rim": 1, "cell": 2}
    assert refusals() == [False] * 3
    assert refusals(labels=other) == [True, True, False]
    assert refusals({**scans, "mask_codes": {"0": 0, "1": 2, "2": 1}}, labels=other) == [False] * 3
    assert refusals({**scans, "mask_codes": {"0": 0, "1": 2, "2": 1}}) == [True, True, False]
    assert refusals(labels={"background": 0, "lumen": 1, "wall": 2}) == [False] * 3, "other names may be other words"
    assert refusals(channel_names={"0": "FLAIR", "1": "T1"}) == [True] * 3


def test_class_folders_and_tables_give_classes_groups_and_sections(tmp_path):
    folders, table = tmp_path / "folders", tmp_path / "table"
    rows = ["path,grade,patient,split"]
    for number in range(18):
        section, grade = ("train", "val", "test")[number // 3 % 3], GRADES["classes"][number % 3]
        picture(folders / section / grade.title().replace(" ", "_") / f"{number}.png")
        picture(table / "images" / f"{number}.png")
        name = f"images\\{number}.png" if number % 4 else f"{number}.png"  # as Windows writes paths
        rows.append(f"{name},{number % 3 if number % 2 else grade},p{number // 9}_{section},{section}")
    (table / "labels.csv").write_text("\n".join(rows))
    layout = {"columns": {"label": "grade"}}
    for root, options in ((folders, {}), (table, layout)):
        found = datalist({**GRADES, "layout": options}, root)
        assert all(len(section) == 6 for section in ids(found))
        assert all(item["label"] == int(item["id"]) % 3 for item in found.train)
    assert found.train[0]["group"] == "p0_train"
    folds = [f"{row},{(n - 1) // 3 % 3 if n else 'fold'}".replace("split", "part") for n, row in enumerate(rows)]
    (table / "labels.csv").write_text("\n".join(folds))
    by_fold = datalist({**GRADES, "layout": layout}, table, fold=2)
    assert [ids(by_fold)[n] for n in (2, 0, 1)] == [ids(found)[n] for n in (2, 1, 0)]
    (table / "labels.csv").write_text("\n".join([*rows[:-1], "17.png,odd,p,test", "18.png,mild,p,test"]))
    problems = check_data({**GRADES, "layout": layout}, table).problems
    assert any("odd" in problem for problem in problems) and any("18.png" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "busi"}, "busi"),
        ({"classes": ["one"]}, "classes"),
        ({"kind": "boxes"}, "boxes"),
        ({"kind": "multilabel", "classes": ["a", "b|c"]}, r"\|"),
        ({"regions": {"whole": [1, 3]}}, "whole.* labels 1 to 2"),
        ({"classes": [f"c{i}" for i in range(256)]}, "at most 255"),
        ({"regions": {"whole": []}}, "whole.* labels 1 to 2"),
        ({"nsd_tolerance": {"whole": 2}}, "nsd_tolerance"),
        ({"prompts": ["a"]}, "1 prompts for 2"),
        ({"layout": {"folder": "x"}}, "layout"),
        ({"spacing": 3}, "primary_metric"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused_with_its_file(change, named, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({**CELLS, **change}))
    with pytest.raises(ValueError, match=named) as refused:
        get_task(tmp_path / "task.json")
    assert "task.json" in str(refused.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        get_task(tmp_path / "gone.json")


def test_a_class_that_a_section_lacks_is_named(tmp_path):
    for number in range(20):
        picture(tmp_path / "images" / f"{number}.png")
        mask(tmp_path / "masks" / f"{number}.png", (1, 2) if number == 0 else (1, 1))
    problems = check_data(CELLS, tmp_path).problems
    assert len(problems) == 2 and all("has no rim" in problem for problem in problems)


@pytest.mark.parametrize("patients", ["AABBCD", "AAAAAA", ["", "", "A", "A", "B", ""]])
def test_series_of_one_patient_are_one_group(patients, tmp_path):
    for number, patient in enumerate(patients):
        volume(tmp_path / f"{number}.nii.gz", (0, 90))
        signed(dicom_series(tmp_path / "set" / "images" / f"c{number}", tmp_path / f"{number}.nii.gz"), patient, "1.2")
        volume(tmp_path / "set" / "masks" / f"c{number}.nii.gz", (0, 1))
    items = find_items({**CELLS, "classes": ["background", "cell"], "dimensions": 3}, tmp_path / "set")
    groups = [item["group"] for item in items]
    several = len(set(patients)) > 1
    for a, b in itertools.combinations(range(6), 2):
        assert (groups[a] == groups[b]) == (several and patients[a] == patients[b]), "or of one study, without patient"
    assert patients != "AABBCD" or groups[4:] == ["c4", "c5"]


def test_another_folder_of_pictures_does_not_make_the_folder_above_a_data_set(tmp_path):
    picture(tmp_path / "others" / "a.png")
    (tmp_path / "empty").mkdir()
    for folder, is_hinted in ((tmp_path / "empty", False), (tmp_path / "others", True)):
        with pytest.raises(FileNotFoundError) as error:
            find_items(GRADES, folder)
        assert ("too low" in str(error.value)) == is_hinted


@pytest.mark.parametrize(("place", "other"), [("train/images/{}.png", "test/images/{}.png"), ("a/{}.png", "b/{}.png")])
def test_a_group_is_that_of_the_name_of_a_file_where_folders_tell_files_apart(place, other, tmp_path):
    for number in range(8):
        for folder in (place, other):
            picture(file := tmp_path / folder.format(f"p{number // 2}_{number}"))
            if "images" in folder:
                mask(tmp_path / folder.replace("images", "masks").format(file.stem), (1, 1))
    masked = {**CELLS, "classes": ["background", "cell"]}
    task = {**(masked if "images" in place else {**GRADES, "classes": ["a", "b"]}), "layout": {"groups": "([^_]+)_"}}
    items = find_items(get_task(task), tmp_path)
    assert len(items) == 16 and {item["group"] for item in items} == {"p0", "p1", "p2", "p3"}
    unfit = get_task({**task, "layout": {"groups": "(q)?p"}})
    assert not any("problem" in item for item in labelled_folder(unfit, tmp_path).test), "names of another hospital"
    unmatched = find_items(unfit, tmp_path)
    assert all("(q)?p" in item["problem"] for item in unmatched), "a group that takes no part is none"


def test_several_tables_are_sections_by_their_names_and_else_refused_like_several_datalists(tmp_path):
    for name, numbers in {"train": range(4), "val": range(4, 6), "test": range(6, 8)}.items():
        for number in numbers:
            picture(tmp_path / "images" / f"{number}.png")
        rows = [f"{number}.png,{'mild' if number % 2 else 'severe'}" for number in numbers]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label", *rows]))
    (tmp_path / "sites.csv").write_text("site,country\na,b\n")
    for name in ("._train.csv", "._list.json"):  # archives hold copies by macOS
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\xff")
    assert ids(datalist(GRADES, tmp_path)) == [["0", "1", "2", "3"], ["4", "5"], ["6", "7"]]
    (tmp_path / "sites.csv").write_text("image,label\n0.png,mild\n")
    with pytest.raises(ValueError, match=r"sites\.csv.*train\.csv"):
        find_items(get_task(GRADES), tmp_path)
    chosen = get_task({**GRADES, "layout": {"form": "table", "file": "val.csv"}})
    assert [item["id"] for item in find_items(chosen, tmp_path)] == ["4", "5"]
    entry = {"image": "images/0.png", "label": "mild"}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps({"training": [entry]}))
    with pytest.raises(ValueError, match=r"a\.json, b\.json"):
        find_items(get_task(GRADES), tmp_path)


def test_a_name_without_ending_that_two_files_have_is_refused(tmp_path):
    for name in ("1.jpg", "1.png", "2.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "labels.csv").write_text("id,label\n1.png,mild\n2,severe\n")
    assert [item["image"][-5:] for item in find_items(get_task(GRADES), tmp_path)] == ["1.png", "2.png"]
    (tmp_path / "labels.csv").write_text("id,label\n1,mild\n2,severe\n")
    with pytest.raises(ValueError, match=r"1\.jpg or 1\.png"):
        find_items(get_task(GRADES), tmp_path)


def test_entries_of_a_datalist_that_would_not_be_scored_are_named(tmp_path, caplog):
    lists = {"training": range(4), "validation": range(4, 6), "test": range(6, 9), "test_external": range(9, 11)}
    content = {}
    for name, numbers in lists.items():
        for number in numbers:
            picture(tmp_path / "images" / f"{number}.png")
        content[name] = [{"image": f"images/{number}.png", "label": "mild"} for number in numbers]
    content["test"][1]["label"] = None
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    found = datalist(GRADES, tmp_path)
    assert ids(found)[2] == ["6", "7", "8"] and "2 entries of test_external" in caplog.text
    with pytest.raises(DataProblems, match=r"images/7\.png has no label"):
        found.checked("stop")


def test_several_masks_of_one_volume_in_a_datalist_are_refused(tmp_path):
    for name in ("image", "first", "second"):
        volume(tmp_path / f"{name}.nii.gz", None if name == "image" else [0, 1])
    labels = ["first.nii.gz", "second.nii.gz"]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [{"image": "image.nii.gz", "label": labels}]}))
    (item,) = find_items({**CELLS, "dimensions": 3}, tmp_path)
    assert all(str(tmp_path / label) in item["problem"] for label in labels)


def test_folders_that_take_no_part_are_named_and_masks_are_no_images_of_a_class(tmp_path, caplog):
    for number, folder in enumerate((".", "train", "val")):
        picture(tmp_path / "pairs" / folder / "images" / f"{number}.png")
        mask(tmp_path / "pairs" / folder / ("other" if folder == "val" else "labels") / f"{number}.png")
    assert [item["id"] for item in get_task(CELLS).layout.find_items(tmp_path / "pairs")] == ["1"]
    for left in ("pairs/images", "pairs/labels", "pairs/val/images"):
        assert f"1 file(s) in {tmp_path / left} are left out" in caplog.text
    for name in ("mild/1.png", "mild/1_mask.png", "mild/1_overlay.png", "severe/2.png", "no finding/p1/3.png"):
        picture(tmp_path / "classes" / name)
    items = get_task(GRADES).layout.find_items(tmp_path / "classes")
    assert [item["id"] for item in items] == ["1", "2"] and "p1/3.png" in caplog.text


def test_what_a_form_does_not_use_is_said_once_by_new(tmp_path, caplog):
    for number in range(4):
        picture(tmp_path / "raw" / "imagesTr" / f"{number}_0000.png")
        mask(tmp_path / "raw" / "labelsTr" / f"{number}.png")
    picture(tmp_path / "raw" / "imagesTr" / "lone.png")
    mask(tmp_path / "raw" / "labelsTr" / "0.tif")
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    new_bundle("own", tmp_path / "raw", tmp_path)
    assert [record.getMessage().count("lone") for record in caplog.records] == [1]
    items = find_items(get_task(CELLS), tmp_path / "raw")
    assert [item["id"] for item in items if "0.tif" in item.get("problem", "")] == ["0"]


@pytest.mark.parametrize("label", [1, [], [0, 1]])
def test_a_label_that_is_no_file_is_no_mask(label, tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "0.png", "label": label}]}))
    (item,) = find_items(get_task(CELLS), tmp_path)
    assert str(label) in item["problem"]
