"""One small distillation per kind of task on phantoms, with its recorded figures: a change of structure keeps them."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bundles"))
from bundle_runs import COMPARED, read_json, run, settings

SHORT = {"mode": "cross_fit", "folds": 2, "epochs": 1}
"""The students that decide on admission learn for one epoch: both teachers of classes are admitted all the same."""

RECORDED = {
    "kvasir_seg": {
        "loss_total": (1.67080805, 1.54156655),
        "loss_task": (1.52221596, 1.36578596),
        "loss_feature": (0.44625369, 0.38339409),
        "loss_gate": (0.02753995, 0.02427742),
        "gate_auc": (0.57971191, 0.61877441),
        "val_dice": (0.21231283, 0.27690336),
    },
    "aptos2019": {
        "loss_total": (3.53007197, 2.85460138),
        "loss_task": (2.17774941, 1.48885031),
        "loss_output": (0.92371324, 0.81403780),
        "loss_feature": (0.44289815, 0.38166216),
        "loss_gate": (0.50604228, 0.44846877),
        "gate_auc": (0.74340820, 0.81860352),
        "val_qwk": (0.75221239, 0.36050157),
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
    options = {"max_epochs": 2, "admission": SHORT} | ({"teachers": COMPARED} if bundle == "aptos2019" else {})
    run(bundle, ("train",), settings(bundle, tmp_path, tmp_path / "cache", **options))
    history = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))
    for name, expected in RECORDED[bundle].items():
        for row, value, tolerance in zip(history, expected, (1e-3, 1e-2), strict=True):  # steps enlarge rounding
            assert float(row[name]) == pytest.approx(value, rel=tolerance), name
    distillation = read_json(tmp_path / "eval" / "run.json")["distillation"]
    assert [t["name"] for t in distillation["teachers"]] == ["imagenet_lite1", "imagenet_lite2"]
