"""Two processes on CPU (gloo) train one student."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bundle_runs import read_json, run_ranks, settings
from helpers import ROOT

EVERYTHING = {
    "gate": "learned",
    "return_code": "learned",
    "loss_gate": "agreement",
    "losses": {"output": 1.0, "feature": 0.2, "reconstruction": 0.2, "contrastive": 0.1},
    "contrastive": {"negatives": 8},
}


def torchrun(bundle, values):
    """The command of the documentation, in processes of its own."""
    given = {name: value for name, value in values.items() if name != "bundle_root"}
    arguments = [part for k, v in given.items() for part in (f"--{k}", v if isinstance(v, str) else repr(v))]
    configs = ",".join(f"'bundles/{bundle}/configs/{c}.json'" for c in ("train", "multi_gpu_train"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["monai.bundle", "run", "training", "--config_file", f"[{configs}]", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment, timeout=550)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["kvasir_seg"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["default", "everything"])
def test_torchrun_with_two_ranks(bundle, options, tmp_path):
    values = settings(bundle, tmp_path, tmp_path / "cache", max_epochs=1, admission={"mode": "all"}, **options)
    if options:
        run_ranks(2, bundle, values)
    else:
        torchrun(bundle, values)
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and record["epochs_done"] == 1
    assert record["steps_per_epoch"] == 2, "28 images, 2 ranks of batch 8: each rank takes its own part"
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert not any(k.startswith("module.") for k in state)
    assert all(bool(torch.isfinite(v.float()).all()) for v in state.values())
