"""Two processes train a shared student as one process with the doubled batch does."""

from __future__ import annotations

import csv

import pytest
import torch
from bundle_runs import SHARED, SMALL, run, run_ranks, settings


def values(folder, cache, batch):
    tasks = {
        name: {**SMALL[SHARED]["tasks"][name], "recipe#augmentation": {}, "recipe#batch_size": batch}
        for name in ("kvasir_seg", "isic2017")
    }
    teachers = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
    options = {"tasks": tasks, "teachers": teachers, "loss_gate": "fixed", "scale_steps": 3}
    options |= {"network_def#_target_": "toy_norms.StillStudent"}  # not a rank's own statistics
    options |= {"network_def#dropout": 0.0, "steps_per_epoch": 3, "gate": "uniform"}
    return settings(SHARED, folder, cache, **options)


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_doubled_batch(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(SHARED, ("train",), values(one, tmp_path / "cache", 4))
    run_ranks(2, SHARED, values(two, tmp_path / "cache", 2))
    rows = [list(csv.DictReader((folder / "eval" / "history.csv").open())) for folder in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 2
    for single, double in zip(*rows, strict=True):
        for name in ("kvasir_seg/loss_scale", "isic2017/loss_scale", "kvasir_seg/val_dice"):
            assert float(double[name]) == pytest.approx(float(single[name]), rel=2e-3, abs=2e-3), name
        areas = [float(row["isic2017/val_mean_auc"]) for row in (single, double)]
        assert areas[1] == pytest.approx(areas[0], abs=0.0101)  # one pair of cases, whose order rounding may swap
    first, second = (torch.load(f / "models" / "model.pt", weights_only=True) for f in (one, two))
    start = torch.cat([v.flatten() for k, v in first.items() if k.startswith("heads.")])
    other = torch.cat([v.flatten() for k, v in second.items() if k.startswith("heads.")])
    torch.testing.assert_close(other, start, rtol=2e-3, atol=2e-4)
