"""Each bundle trains, evaluates and predicts, on phantoms and on real data."""

from __future__ import annotations

import csv

import pytest
import torch
from bundle_runs import SEGMENTATION, check_masks, read_json, run, settings, workflow
from helpers import shared_data

from amkd_monai.data.datalist import inference_datalist
from amkd_monai.data.datasets import TASKS


@pytest.mark.parametrize("bundle", SEGMENTATION)
def test_a_run_on_phantoms_trains_evaluates_and_predicts(bundle, tmp_path, cache):
    values = settings(bundle, tmp_path, cache)
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
    short = {"mode": "cross_fit", "folds": 2, "epochs": 1}
    values = settings("kvasir_seg", tmp_path, cache, dataset_dir=str(data), labelled=12, teachers=[specialist])
    values |= {"image_size": 96, "max_epochs": 3, "split_fractions": [0.5, 0.15, 0.35], "admission": short}
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
