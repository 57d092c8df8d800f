"""Two processes train a shared student as one process with the doubled batch does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from bundle_runs import SHARED, SMALL, run, settings
from helpers import ROOT


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
    given = values(two, tmp_path / "cache", 2)
    given.pop("bundle_root")
    arguments = [part for k, v in given.items() for part in (f"--{k}", v if isinstance(v, str) else repr(v))]
    configs = ",".join(f"'bundles/{SHARED}/configs/{c}.json'" for c in ("train", "multi_gpu_train"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["monai.bundle", "run", "training", "--config_file", f"[{configs}]", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "engines")])
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
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
