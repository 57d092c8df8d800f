"""What docs/own.md tells to type and to write works: data, a description and a student of one's own."""

from __future__ import annotations

import csv
import json
import sys
from types import ModuleType

import jsonschema
import monai.bundle
import numpy as np
import pytest
from bundle_runs import read_json, run, settings
from doc_blocks import block_commands, blocks
from helpers import ROOT, shared_data
from own_data import rimmed_pictures, rimmed_volumes
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data import datalist
from amkd_monai.export.predict import Predictor, predict
from amkd_monai.label.student import ServedStudent
from amkd_monai.report.page import write_report

PAGE = ROOT / "docs" / "own.md"
QUICK = {"max_epochs": 1, "recipe#min_steps": 1, "teachers": []}


def dice(answer, reference):
    """Mean over the classes that the reference has, background apart: plain NumPy."""
    found = []
    for label in range(1, 3):
        a, b = answer == label, reference == label
        found.append(2 * (a & b).sum() / (a.sum() + b.sum()) if b.any() else np.nan)
    return found


def check_scores(bundle, references):
    """Every Dice of the evaluation is that of the label map that the bundle's own student gives for the file."""
    student = ServedStudent(bundle)
    scored = list(csv.DictReader((bundle / "eval" / "per_case.csv").open()))
    assert scored and {row["class"] for row in scored} >= set(student.task.classes[1:])
    for case in {row["id"] for row in scored}:
        image, reference = references(case)
        expected = dice(np.asarray(student.answer(image)), reference)
        rows = [row for row in scored if row["id"] == case and row["class"] in student.task.classes[1:]]
        rows.sort(key=lambda row: student.task.classes.index(row["class"]))
        found = [float(row["dice"] or "nan") for row in rows]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=case)
    return student


def check_files(bundle):
    """The files are those of the bundles of this project, but for the description."""
    reference = ROOT / "bundles" / "kvasir_seg"

    def sections(folder):
        lines = (folder / "docs" / "README.md").read_text().splitlines()
        return [line for line in lines if line.startswith(("# ", "## "))]

    def files(folder):
        return {str(file.relative_to(folder)) for place in ("configs", "docs") for file in (folder / place).iterdir()}

    assert files(bundle) == files(reference) | {"configs/task.json"} and (bundle / "LICENSE").is_file()
    assert sections(bundle) == sections(reference)
    assert not [f for f in bundle.rglob("*.*") if f.suffix in (".json", ".md", ".txt") and "<bundle>" in f.read_text()]
    metadata = read_json(bundle / "configs" / "metadata.json")
    jsonschema.validate(metadata, json.loads(shared_data("..", "reference", "meta_schema_20240725.json").read_text()))
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert list(pred["channel_def"].values()) == read_json(bundle / "configs" / "task.json")["classes"]


def test_three_commands_lead_from_pictures_of_three_classes_to_a_scored_student(tmp_path, monkeypatch, capsys):
    data = rimmed_pictures(tmp_path / "polyps")
    monkeypatch.chdir(tmp_path)
    new, *runs = block_commands(PAGE)[:3]
    groups = ["--groups", r"(patient\d+)_", "--classes", "background,rim,polyp"]
    assert main([str(data) if word == "DIR" else word for word in new[3:]] + groups) == 0
    said = capsys.readouterr().out
    assert "0 in 14, 1 in 14, 2 in 14" in said and "groups: 7" in said
    bundle = tmp_path / "bundles" / "mybundle"
    check_files(bundle)
    assert main(["data", "check", "bundles/mybundle"]) == 0
    assert main(["new", "mybundle", "--data", str(data)]) == 1, "no bundle is written over"
    for command in runs:
        words = command[4:] if command[3] == "run" else command[3:]
        run_id = words.pop(0) if not words[0].startswith("--") else None
        assert words[0] == "--config_file"
        files = json.loads(words[1].replace("'", '"')) if words[1].startswith("[") else words[1]
        monai.bundle.run(run_id=run_id, config_file=files, **QUICK, image_size=64)

    def references(case):
        return data / "images" / f"{case}.png", np.asarray(Image.open(data / "masks" / f"{case}.png"))

    student = check_scores(bundle, references)
    sections = datalist.datalist(bundle / "configs" / "task.json")
    patients = [{item["group"] for item in part} for part in (sections.train, sections.validation, sections.test)]
    assert all(patients) and sum(map(len, patients)) == 7
    record = read_json(bundle / "models" / "student.json")
    assert record["description"]["classes"] == ["background", "rim", "polyp"]
    assert "mybundle" in write_report([bundle / "eval"], tmp_path / "report.html").read_text(encoding="utf-8")

    assert main(["export", "bundles/mybundle", "--to", "exported", "--formats", "onnx", "--cases", "2"]) == 0
    predict(Predictor(tmp_path / "exported"), data / "images", tmp_path / "masks")
    image, _ = references(sections.test[0]["id"])
    (written,) = (tmp_path / "masks").glob(f"{image.stem}_mask.png")
    answer = np.asarray(student.answer(image))
    assert (np.asarray(Image.open(written)) != answer).mean() < 1e-3, "the values of the file are the classes"

    task = read_json(bundle / "configs" / "task.json")
    (bundle / "configs" / "task.json").write_text(json.dumps({**task, "nsd_tolerance": 5}))
    with pytest.raises((ValueError, RuntimeError), match="nsd_tolerance"):
        ServedStudent(bundle)


def test_volumes_in_nnunets_layout_are_learned_scored_and_predicted(tmp_path, monkeypatch, capsys):
    nib = pytest.importorskip("nibabel")
    data = rimmed_volumes(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "hearts", "--data", str(data)]) == 0
    assert "EACH IMAGE IS A GROUP" in capsys.readouterr().out
    bundle = tmp_path / "bundles" / "hearts"
    check_files(bundle)
    config = read_json(bundle / "configs" / "train.json")
    assert config["network_def"]["num_classes"] == 3 and config["volume_size"][0] == -1
    train, evaluate = (str(bundle / "configs" / f"{name}.json") for name in ("train", "evaluate"))
    longer = {**QUICK, "recipe#min_steps": 4, "recipe#batch_size": 4}
    monai.bundle.run(run_id="training", config_file=train, **longer)
    monai.bundle.run(config_file=[train, evaluate], **longer)

    def references(case):
        label = nib.load(data / "labelsTr" / f"{case}.nii.gz")
        return data / "imagesTr" / f"{case}_0000.nii.gz", np.asarray(label.dataobj)

    check_scores(bundle, references)
    assert read_json(bundle / "eval" / "metrics.json")["unit"] == "mm"


def test_pictures_with_classes_in_folders_become_a_bundle_that_trains(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 160)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(level, level + 60, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{name}{number}.png")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "shades", "--data", "data"]) == 0
    bundle = tmp_path / "bundles" / "shades"
    check_files(bundle)
    monai.bundle.run(run_id="training", config_file=str(bundle / "configs" / "train.json"), **QUICK)
    assert read_json(bundle / "eval" / "run.json")["data"]["description"]["classes"] == ["dark", "light"]


def module(name, text):
    made = ModuleType(name)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


def test_the_description_and_the_student_of_the_page_train_in_another_bundle(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_student", module("my_student", blocks(PAGE, "python")[0]))
    description, *_, overrides = map(json.loads, blocks(PAGE, "json"))
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for patient in range(8):
        for number in range(3):
            mask = np.zeros((48, 64), np.uint8)
            top, left = rng.integers(0, 24, 2)
            mask[top : top + 20, left : left + 20] = 255
            noise = rng.integers(0, 90, (48, 64, 3))
            name = f"p{patient}_{number}.png"
            Image.fromarray((noise + 0.6 * mask[..., None]).astype(np.uint8)).save(tmp_path / "data" / "images" / name)
            Image.fromarray(mask).save(tmp_path / "data" / "masks" / name)
    (tmp_path / "task.json").write_text(json.dumps(description))
    places = {"task": str(tmp_path / "task.json"), "dataset_dir": str(tmp_path / "data")}
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", **places, **overrides)
    values |= {"max_epochs": 3, "admission": {"mode": "all"}}
    ended = run("kvasir_seg", ("train",), values)
    assert type(ended.parser.get_parsed_content("network")).__name__ == "MyStudent"
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and record["data"]["task"] == "cells" and not record["data"]["phantom"]
    assert len(record["distillation"]["teachers"]) == 2
    metrics = run("kvasir_seg", ("train", "evaluate"), values) and read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["summary"]["metrics"]["dice"]["mean"] > 0.3
