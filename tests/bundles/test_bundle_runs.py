"""Each bundle trains, evaluates and predicts, on phantoms and on real data."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import SEGMENTATION, read_json, run, settings, workflow
from helpers import shared_data
from PIL import Image

from amkd_monai.data.datalist import inference_datalist
from amkd_monai.data.datasets import TASKS
from amkd_monai.files.names import file_id

SHORT = {"mode": "cross_fit", "folds": 2, "epochs": 1}
"""Admission by a student that learns for one epoch: the same code in a third of the time."""


@pytest.mark.parametrize("bundle", SEGMENTATION)
def test_a_run_on_phantoms_trains_evaluates_and_predicts(bundle, tmp_path, cache):
    values = settings(bundle, tmp_path, cache, admission=SHORT)
    training = workflow(bundle, ("train",), values)
    assert training.check_properties() == []
    training.run()
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed"
    assert record["data"]["phantom"] and record["data"]["source"] == "phantoms"
    teachers = record["distillation"]["teachers"]
    assert [t["name"] for t in teachers] == ["imagenet_lite1", "imagenet_lite2"]
    assert all(len(t["fingerprint"]) == 64 and t["licence"] == "Apache-2.0" for t in teachers)
    assert "undistilled_student_dice" not in record["distillation"], "encoders that give features only beat nobody"
    history = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[-1]["loss_task"]) < float(history[0]["loss_task"])
    assert float(history[-1]["loss_feature"]) < float(history[0]["loss_feature"])
    assert all(float(row["weight_task"]) == 1 for row in history)
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert not any("align" in key or "teacher" in key for key in state)

    run(bundle, ("train", "evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert 0 < metrics["summary"]["metrics"]["dice"]["mean"] <= 1
    assert (tmp_path / "eval" / "per_case.csv").is_file()

    inference = {**values, "output_dir": str(tmp_path / "masks")}
    run(bundle, ("inference",), inference)
    check_masks(tmp_path / "masks", inference_datalist(bundle, cache_dir=cache), TASKS[bundle].dimensions)


def check_masks(folder, items, dimensions):
    """Every image has a mask on its own grid."""
    written = {p.name.split("_mask.")[0]: p for p in folder.iterdir() if p.is_file()}
    assert written.keys() == {file_id(Path(item["image"])) for item in items}
    for item in items:
        path = written[file_id(Path(item["image"]))]
        if dimensions == 2:
            source, mask = Image.open(item["image"]), Image.open(path)
            assert mask.size == source.size and mask.size[0] != mask.size[1]
            assert set(np.unique(np.asarray(mask))) <= {0, 255}
        else:
            source, mask = nib.load(item["image"]), nib.load(path)
            assert mask.shape == source.shape
            np.testing.assert_allclose(mask.affine, source.affine, atol=1e-5)
            assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_ct_volumes_train_evaluate_and_predict_by_an_overlay(tmp_path, cache):
    values = settings("covid", tmp_path, cache, teachers=[], max_epochs=8)
    values |= {"spacing": [8.0, 8.0, 8.0], "volume_size": [-1, 48, 48]}
    run("covid", ("train", "volumes"), values)
    run("covid", ("train", "volumes", "evaluate", "volumes_evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert (metrics["task"], metrics["unit"]) == ("covid_volumes", "mm")
    assert 0.1 < metrics["summary"]["metrics"]["dice"]["mean"] <= 1
    run("covid", ("inference", "volumes_inference"), {**values, "output_dir": str(tmp_path / "masks")})
    check_masks(tmp_path / "masks", inference_datalist("covid_volumes", cache_dir=cache), 3)


def test_real_ultrasound_images_are_scored_with_empty_references_apart(tmp_path, cache):
    data = shared_data("BUSI", "Dataset_BUSI_with_GT")
    values = settings("busi", tmp_path, cache, dataset_dir=str(data), teachers=[], max_epochs=2)
    run("busi", ("train",), values)
    last = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))[-1]
    assert float(last["val_empty_references"]) >= 3 and 0 <= float(last["val_false_positive_rate"]) <= 1
    run("busi", ("train", "evaluate"), values)
    summary = read_json(tmp_path / "eval" / "metrics.json")["summary"]
    assert summary["cases"] == 18 and summary["empty_references"] == 6
    assert summary["metrics"]["dice"]["n"] == 12, "normals are in no mean"
    rows = list(csv.DictReader((tmp_path / "eval" / "per_case.csv").open()))
    assert {row["id"] for row in rows if row["status"] in ("false_positive", "empty_both")} == {
        row["id"] for row in rows if row["id"].startswith("normal")
    }
    assert all(row["dice"] == "" for row in rows if row["id"].startswith("normal"))


def test_real_slices_keep_the_official_test_section(tmp_path, cache):
    data = shared_data("COVID", "COVID-SemiSeg")
    values = settings("covid", tmp_path, cache, dataset_dir=str(data), teachers=[], max_epochs=2)
    run("covid", ("train",), values)
    run("covid", ("train", "evaluate"), values)
    rows = list(csv.DictReader((tmp_path / "eval" / "per_case.csv").open()))
    official = {p.stem for p in (data / "TestingSet" / "LungInfection-Test" / "Imgs").iterdir()}
    assert {row["id"] for row in rows} == official


def test_real_polyps_with_few_labels_learn_from_the_specialist(tmp_path, cache):
    data = shared_data("Kvasir-SEG")
    specialist = {
        "name": "specialist",
        "kind": "specialist",
        "path": str(shared_data("..", "weights", "kvasir_specialist.ts")),
        "image_size": 224,
    }
    values = settings("kvasir_seg", tmp_path, cache, dataset_dir=str(data), labelled=12, teachers=[specialist])
    values |= {"image_size": 96, "max_epochs": 3, "split_fractions": [0.5, 0.15, 0.35], "admission": SHORT}
    run("kvasir_seg", ("train",), values)
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["labelled_samples"] == 12 and record["training_samples"] == 77
    (teacher,) = record["distillation"]["teachers"]
    assert teacher["outputs_admitted"] and teacher["dice"] > 0.8, "the specialist knows these polyps"
    assert record["best_validation"]["value"] > 0.4
    history = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))
    assert float(history[-1]["loss_output"]) < float(history[0]["loss_output"])


def test_real_heart_volumes_train_and_evaluate_in_millimetres(tmp_path, cache):
    data = shared_data("MSD-Heart", "Task02_Heart_half")
    values = settings("msd_heart", tmp_path, cache, dataset_dir=str(data), teachers=[], max_epochs=2)
    values |= {"spacing": [2.5, 5.0, 2.74], "volume_size": [96, 48, 64]}
    run("msd_heart", ("train",), values)
    run("msd_heart", ("train", "evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["unit"] == "mm"
    assert metrics["summary"]["metrics"]["dice"]["mean"] > 0.5
    rows = list(csv.DictReader((tmp_path / "eval" / "per_case.csv").open()))
    ids = {row["id"] for row in rows}
    assert len(ids) >= 2 and all(30_000 < float(row["reference_volume"]) < 300_000 for row in rows), "cubic millimetres"
    assert len(ids & {"la_005", "la_026"}) != 1, "one image with two labels never lies on both sides of a split"
