"""Labelled DICOM pictures: every layout reads them as `predict` does and keeps patients together."""

from __future__ import annotations

import csv
import json

import monai.bundle
import numpy as np
import pytest
from monai.bundle import ConfigParser
from own_data import dicom_picture
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.bundles.new import new_bundle
from amkd_monai.data.check import check_data
from amkd_monai.data.datalist import datalist, find_items
from amkd_monai.data.datasets import get_task
from amkd_monai.export.predict import Input, Predictor, predict
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.steps import prepare
from amkd_monai.label.student import ServedStudent
from amkd_monai.metrics.summary import read_case_csv

WINDOW = {"WindowCenter": "1000", "WindowWidth": "1600", "RescaleSlope": "2", "RescaleIntercept": "-500"}
QUICK = {"max_epochs": 1, "teachers": [], "recipe#min_steps": 4}
COUNT = 40


def scene(number):
    """Stored values (64, 72) of 12 bits of a radiograph with a bright square, and the mask of the square."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(300, 700, (5, 5)).astype(np.float32))
    values, mask = np.asarray(coarse.resize((72, 64), Image.Resampling.BICUBIC)).copy(), np.zeros((64, 72), np.uint8)
    top, left = rng.integers(6, 36, 2)
    mask[top : top + 18, left : left + 18] = 255
    values[mask > 0] += 350
    return values.astype(np.uint16), mask


def xray(path, number):
    """Write a scene as a DICOM picture of the patient number // 2, every third inverted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"PhotometricInterpretation": "MONOCHROME1"} if number % 3 == 0 else {}
    return dicom_picture(
        path, scene(number)[0], PatientID=f"p{number // 2}", BitsStored=12, HighBit=11, **WINDOW, **how
    )


def masked(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(number)[1]).save(path)


def pairs(root):
    for n in range(COUNT):
        xray(root / "images" / f"1.2.{n}.dcm", n)
        masked(root / "masks" / f"1.2.{n}.png", n)


def listed(root):
    entries = []
    for n in range(COUNT):
        xray(root / "x" / f"{n}.DCM", n)
        masked(root / "y" / f"{n}.png", n)
        entries.append({"image": f"x/{n}.DCM", "label": f"y/{n}.png"})
    (root / "data.json").write_text(json.dumps({"training": entries}))


def raw(root):
    for n in range(COUNT):
        xray(root / "imagesTr" / f"case{n}_0000.dcm", n)
        masked(root / "labelsTr" / f"case{n}.png", n)
    about = {"channel_names": {"0": "X-ray"}, "labels": {"background": 0, "square": 255}, "numTraining": COUNT}
    (root / "dataset.json").write_text(json.dumps({**about, "file_ending": ".dcm"}))


def folders(root):
    for n in range(COUNT):
        xray(root / ("well", "ill")[n // 2 % 2] / f"{n}.dcm", n)


def table(root, header="image,label", cells=("well", "ill"), suffix=""):
    rows = [f"{n}{suffix},{cells[n // 2 % 2]}" for n in range(COUNT)]
    for n in range(COUNT):
        xray(root / "images" / f"{n}.dcm", n)
    (root / "labels.csv").write_text("\n".join([header, *rows]))


def findings(root):
    table(root, "image,mass,fluid", ("1,0", "0,1"), ".dcm")


LAYOUTS = {
    "pairs": pairs,
    "datalist": listed,
    "nnunet": raw,
    "classes": folders,
    "table": table,
    "findings": findings,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_labelled_dicom_pictures_and_keeps_patients_together(layout, tmp_path):
    LAYOUTS[layout](tmp_path / "data")
    bundle, facts = new_bundle("own", tmp_path / "data", tmp_path / "bundles")
    assert any(fact.startswith(f"groups: {COUNT // 2}, with DICOM images of one patient") for fact in facts), facts
    task = get_task(bundle / "configs" / "task.json")
    assert task.dimensions == 2 and (task.layout.form or "pairs") == ("table" if layout == "findings" else layout)
    found = datalist(task, tmp_path / "data")
    sections = [found.train, found.validation, found.test]
    patients = [{item["group"] for item in section} for section in sections]
    assert sum(map(len, sections)) == COUNT and all(patients) and sum(map(len, patients)) == COUNT // 2
    assert not check_data(task, tmp_path / "data").problems
    item = found.train[0]
    number = int("".join(filter(str.isdigit, item["id"].removeprefix("1.2.").removesuffix("_0000"))))
    values = (scene(number)[0] * 2.0 - 500 - (1000 - 0.5)) / 1599 + 0.5
    shown = (values.clip(0, 1) * 255).round().astype(np.uint8)
    expected = 255 - shown if number % 3 == 0 else shown
    assert np.array_equal(read_picture(item["image"]), np.repeat(expected[..., None], 3, -1))


def test_a_student_is_trained_on_dicom_pictures_as_predict_reads_them(tmp_path, monkeypatch):
    pairs(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "xray", "--data", "data"]) == 0 and main(["data", "check", "bundles/xray"]) == 0
    bundle = tmp_path / "bundles" / "xray"
    train, evaluate, infer = (str(bundle / "configs" / f"{n}.json") for n in ("train", "evaluate", "inference"))
    monai.bundle.run(run_id="training", config_file=train, **QUICK)
    monai.bundle.run(config_file=[train, evaluate], **QUICK)
    monai.bundle.run(config_file=infer, dataset_dir="data/images")
    assert main(["export", "bundles/xray", "--to", "out", "--formats", "ts,onnx", "--cases", "2"]) == 0
    predictor, parser = Predictor(tmp_path / "out"), ConfigParser()
    parser.read_config(train)
    parser["bundle_root"] = str(bundle)
    decoded, items = (
        parser.get_parsed_content("train#dataset"),
        find_items(bundle / "configs" / "task.json", tmp_path / "data"),
    )
    files, seen = {item["id"]: item["image"] for item in items}, 0
    for index, case in enumerate(decoded.ids):
        array, _ = predictor.read(Input(case, [files[case]]))
        expected = prepare(array, predictor.config["steps"])[0]
        assert np.abs(decoded.image(index) - expected * 255).max() <= 0.5 + 1e-3, "equal but for rounding to 8 bits"
        seen += 1
    assert seen >= 8 and str(files[decoded.ids[0]]).endswith(".dcm")
    assert predict(predictor, "data/images", "answers") == 0
    student, rows = ServedStudent(bundle), read_case_csv(bundle / "eval" / "per_case.csv")
    for case, file in files.items():
        offline, answer = (
            np.asarray(Image.open(tmp_path / place / f"{case}_mask.png")) > 0
            for place in ("bundles/xray/eval/masks", "answers")
        )
        assert (offline != answer).mean() < 1e-3 and np.array_equal(student.answer(file).numpy() > 0, offline), case
        for row in (row for row in rows if row["id"] == case):
            truth = np.asarray(Image.open(tmp_path / "data" / "masks" / f"{case}.png")) > 0
            assert row["dice"] == pytest.approx(2 * (truth & offline).sum() / (truth.sum() + offline.sum()), abs=1e-6)
    assert main(["evaluate", "out", "--data", "data", "--output", "scores", "--seen", "apart"]) == 0
    with (tmp_path / "scores" / "per_case.csv").open() as file:
        again = {row["id"]: float(row["dice"]) for row in csv.DictReader(file)}
    assert again == pytest.approx({row["id"]: row["dice"] for row in rows}, abs=5e-3)


def test_what_dicom_pictures_cannot_be_used_for_is_named(tmp_path):
    root = tmp_path / "data"
    pairs(root)
    task = get_task(new_bundle("own", root, tmp_path / "b")[0] / "configs" / "task.json")
    values = scene(0)[0]
    dicom_picture(root / "images" / "1.2.0.dcm", values)
    dicom_picture(root / "images" / "1.2.1.dcm", values, **WINDOW, NumberOfFrames=2, Rows=32)
    dicom_picture(root / "images" / "1.2.2.dcm", values, **WINDOW, Manufacturer="amkd_monai")
    (root / "images" / "1.2.3.dcm").write_bytes(bytes(128) + b"DICM")
    dicom_picture(root / "images" / "1.2.4.dcm", values[:60], **WINDOW)
    (root / "masks" / "1.2.5.png").unlink()
    dicom_picture(root / "masks" / "1.2.5.dcm", scene(5)[1])
    problems = check_data(task, root).problems
    words = ("no window", "several frames", "is a prediction", "as DICOM", "64 pixels", "Mask")
    for number, word in enumerate(words):
        (said,) = (problem for problem in problems if f"1.2.{number}." in problem)
        assert word in said and said.count(". ") == 0, said
    with pytest.raises(ValueError, match=r"masks.*1\.2\.5\.dcm"):
        new_bundle("again", root, tmp_path / "b")
    for number in range(8):
        case = ("one", "two")[number % 2]
        file = tmp_path / "series" / case / f"{number}.dcm"
        file.parent.mkdir(parents=True, exist_ok=True)
        dicom_picture(file, scene(number)[0], **WINDOW, PatientID=case)
    with pytest.raises(ValueError, match="one DICOM patient or study"):
        new_bundle("cases", tmp_path / "series", tmp_path / "b")
