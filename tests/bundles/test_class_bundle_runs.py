"""The bundles with one class per image train, calibrate, evaluate and predict, on phantoms and on real data."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from bundle_runs import COMPARED, read_json, run, settings, workflow
from helpers import shared_data
from ignite.engine import Events

from amkd_monai.data.datasets import get_task
from amkd_monai.metrics.summary import read_case_csv

BUNDLES = ("aptos2019", "isic2017")
SHORT = {"mode": "cross_fit", "folds": 2, "epochs": 1}
REAL = {"aptos2019": "APTOS2019_standin_IDRiD", "isic2017": "ISIC2017"}


def history_of(folder):
    return list(csv.DictReader((folder / "eval" / "history.csv").open()))


def log_likelihood(rows, prior=0.0, temperature=1.0):
    """Mean log-likelihood of rows of class probabilities, brought nearer to a prior by another temperature."""
    logs = []
    for row in rows:
        z = torch.tensor([v for k, v in row.items() if k.startswith("p_")]).clamp_min(1e-12).log()
        logs.append(float(((z - prior) / temperature + prior).log_softmax(0)[row["label"]]))
    return sum(logs) / len(logs)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_run_on_phantoms_trains_calibrates_evaluates_and_predicts(bundle, tmp_path, cache):
    task = get_task(bundle)
    values = settings(bundle, tmp_path, cache, admission=SHORT, teachers=COMPARED)
    training = workflow(bundle, ("train",), values)
    assert training.check_properties() == []
    training.run()
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and record["data"]["phantom"]
    assert record["best_validation"]["metric"] == f"val_{task.primary_metric}"
    distillation = record["distillation"]
    assert all(t["answers"].startswith("linear probe") and 0 < t["macro_auroc"] <= 1 for t in distillation["teachers"])
    assert distillation["undistilled_student_skill"] < 1
    history = history_of(tmp_path)
    assert float(history[-1]["loss_task"]) < float(history[0]["loss_task"])
    assert float(history[-1]["loss_feature"]) < float(history[0]["loss_feature"])
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert float(state["temperature"]) == pytest.approx(float(history[-1]["temperature"])) != 1

    run(bundle, ("train", "evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    value = metrics["summary"]["metrics"][task.primary_metric]
    assert metrics["primary_metric"] == task.primary_metric and value["ci_low"] <= value["value"] <= value["ci_high"]
    rows = read_case_csv(tmp_path / "eval" / "per_case.csv")
    assert len(rows) == metrics["summary"]["cases"] == record["data"]["counts"]["test"]
    assert {row["class"] for row in rows} == set(task.classes)

    # what is evaluated is the calibrated answer: at validation its temperature cannot be bettered
    validation = {
        **values,
        "validate#dataset#data": "$@datalist.validation",
        "output_dir": str(tmp_path / "validation"),
    }
    run(bundle, ("train", "evaluate"), validation)
    rows = read_case_csv(tmp_path / "validation" / "per_case.csv")
    here = log_likelihood(rows)
    if 0.25 < float(state["temperature"]) < 8:
        prior = state["offsets"] / (1 - 1 / state["temperature"])  # up to a constant
        assert here >= max(log_likelihood(rows, prior, t) for t in (0.7, 0.9, 1.1, 1.4)) - 1e-6
    else:
        assert math.isfinite(here)

    inference = {**values, "output_dir": str(tmp_path / "predictions")}
    run(bundle, ("inference",), inference)
    predictions = read_case_csv(tmp_path / "predictions" / "predictions.csv")
    assert predictions and list(predictions[0])[:3] == ["id", "class", "prediction"]
    assert all(row["class"] == task.classes[row["prediction"]] for row in predictions)
    if bundle == "isic2017":  # predicts the test section, so both tables hold the same answers
        evaluated = {row["id"]: row for row in read_case_csv(tmp_path / "eval" / "per_case.csv")}
        for row in predictions:
            assert row["p_melanoma"] == pytest.approx(evaluated[row["id"]]["p_melanoma"], abs=1e-5)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_real_images_train_and_evaluate(bundle, tmp_path, cache):
    data = shared_data(REAL[bundle])
    values = settings(bundle, tmp_path, cache, dataset_dir=str(data), max_epochs=2, image_size=96)
    values |= {"admission": {"mode": "all"}}
    run(bundle, ("train",), values)
    run(bundle, ("train", "evaluate"), values)
    summary = read_json(tmp_path / "eval" / "metrics.json")["summary"]
    assert summary["cases"] == {"aptos2019": 23, "isic2017": 36}[bundle]
    assert summary["metrics"]["macro_auroc"]["value"] > 0.45
    teacher = read_json(tmp_path / "eval" / "run.json")["distillation"]["teachers"][0]
    assert teacher["skill"] > 0.05 and teacher["macro_auroc"] > 0.65, (
        "a probe of ImageNet features knows more than chance"
    )
    assert all(float(row["loss_output"]) > 0 for row in history_of(tmp_path))


def test_few_labels_and_every_part_of_the_method_work_and_a_killed_run_resumes_to_the_same_student(tmp_path, cache):
    options = {"gate": "learned", "return_code": "learned", "loss_gate": "agreement", "labelled": 30, "max_epochs": 3}
    options["losses"] = {"output": 1.0, "feature": 0.2, "reconstruction": 0.2, "contrastive": 0.1}
    options |= {"admission": {"mode": "all"}, "recipe#class_balance": 0.0}
    options |= {"recipe#min_steps": 3}
    options["teachers"] = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("isic2017", ("train",), settings("isic2017", whole, cache, **options))
    assert read_json(whole / "eval" / "run.json")["labelled_samples"] == 30
    for row in history_of(whole):
        assert all(0 < float(row[f"loss_{name}"]) < 100 for name in options["losses"])
    started = workflow("isic2017", ("train",), settings("isic2017", broken, cache, **options))

    def stop(engine):
        raise KeyboardInterrupt

    trainer = started.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_STARTED(once=trainer.state.epoch_length * 2 + 2), stop)
    with pytest.raises(KeyboardInterrupt):
        started.run()
    run("isic2017", ("train",), settings("isic2017", broken, cache, resume=True, **options))
    for name in ("model.pt", "distillation.pt"):
        first, second = (torch.load(f / "models" / name, weights_only=True) for f in (whole, broken))
        first, second = (s.get("distiller", s) for s in (first, second))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert history_of(whole) == history_of(broken)


def test_lesion_outlines_train_in_the_bundle_for_masks(tmp_path, cache):
    values = settings("kvasir_seg", tmp_path, cache, task="isic2017_lesion", max_epochs=1, teachers=[])
    run("kvasir_seg", ("train",), values)
    run("kvasir_seg", ("train", "evaluate"), values)
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["task"] == "isic2017_lesion" and metrics["summary"]["metrics"]["dice"]["mean"] > 0.3
