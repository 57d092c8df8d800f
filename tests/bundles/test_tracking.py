"""MONAI's MLflow tracking works on a bundle, and the bundle's own settings keep what a run leaves."""

from __future__ import annotations

import pytest
from bundle_runs import read_json, run, settings
from helpers import ROOT, needs

CONFIGS = ROOT / "bundles" / "kvasir_seg" / "configs"


def recorded(folder, experiment):
    """{name of a run: (its run, names of its artifacts)}."""
    mlflow = needs("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns.db")
    runs = client.search_runs(client.get_experiment_by_name(experiment).experiment_id)
    return {r.info.run_name: (r, {a.path for a in client.list_artifacts(r.info.run_id)}) for r in runs}


def test_settings_keep_record_tables_student_and_scores(tmp_path, cache):
    needs("mlflow")
    needs("sqlalchemy")
    values = settings("kvasir_seg", tmp_path, cache, teachers=[])
    run("kvasir_seg", ("train",), {**values, "tracking": str(CONFIGS / "mlflow.json"), "experiment_name": "polyps"})
    training, files = recorded(tmp_path / "eval", "polyps")["eval"]
    assert files == {"run.json", "history.csv", "model.pt"} and training.info.status == "FINISHED"
    assert {"train_loss", "val_dice"} <= training.data.metrics.keys()

    run("kvasir_seg", ("train", "evaluate"), {**values, "tracking": str(CONFIGS / "mlflow.json")})
    evaluation, files = recorded(tmp_path / "eval", "kvasir_seg")["eval evaluation"]
    assert files == {"metrics.json", "per_case.csv", "report.html"} and evaluation.info.status == "FINISHED"
    dice = read_json(tmp_path / "eval" / "metrics.json")["summary"]["metrics"]["dice"]["mean"]
    assert evaluation.data.metrics["dice_mean"] == pytest.approx(dice)


def test_monais_own_settings_work_too(tmp_path, cache):
    needs("mlflow")
    needs("sqlalchemy")
    values = settings("kvasir_seg", tmp_path, cache, teachers=[], max_epochs=1)
    run("kvasir_seg", ("train",), {**values, "tracking": "mlflow"})
    ((training, _),) = recorded(tmp_path / "eval", "monai_experiment").values()
    assert training.info.status == "FINISHED" and "val_dice" in training.data.metrics
