"""One small distillation per kind of task on phantoms, with its recorded figures: a change of structure keeps them."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bundles"))
from bundle_runs import read_json, run, settings

RECORDED = {
    "kvasir_seg": {
        "loss_total": (1.67138499, 1.51793382),
        "loss_task": (1.52219296, 1.36579710),
        "loss_feature": (0.44797890, 0.38863770),
        "loss_gate": (0.02743369, 0.02405353),
        "gate_auc": (0.58660889, 0.60107422),
        "val_dice": (0.24350305, 0.31567082),
    },
    "aptos2019": {
        "loss_total": (3.50717103, 2.66574205),
        "loss_task": (2.17981203, 1.49494936),
        "loss_output": (0.91201959, 0.79161346),
        "loss_feature": (0.44697699, 0.38924879),
        "loss_gate": (0.48019790, 0.42971649),
        "gate_auc": (0.75341797, 0.82324219),
        "val_qwk": (0.54901961, 0.87628866),
    },
}


@pytest.fixture
def one_thread():
    """The order of sums, and so their last digits, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", RECORDED)
def test_a_run_on_phantoms_has_the_recorded_figures(bundle, tmp_path, one_thread):
    run(bundle, ("train",), settings(bundle, tmp_path, tmp_path / "cache", max_epochs=2))
    history = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))
    for name, expected in RECORDED[bundle].items():
        assert [float(row[name]) for row in history] == pytest.approx(expected, rel=1e-3), name
    distillation = read_json(tmp_path / "eval" / "run.json")["distillation"]
    assert [t["name"] for t in distillation["teachers"]] == ["imagenet_lite1", "imagenet_lite2"]
