"""The foundation teachers at their full size, with fixed random weights: cost, and all four teach real images."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, shared_data
from teachers.tiny_teachers import OFFICIAL, official_state

from amkd_monai.cache.store import FeatureStore
from amkd_monai.teachers.base import build_teacher

pytestmark = pytest.mark.slow
LIMIT_MB = 4500
BUNDLE = (
    "import runpy, torch; torch.set_float32_matmul_precision('medium'); "
    "runpy.run_module('monai.bundle', alter_sys=True, run_name='__main__')"
)
"""`python -m monai.bundle` with coarser sums where the processor has them: a third faster here."""


@pytest.mark.parametrize("which", ["medsam", "retfound", "usfm"])
def test_memory_stays_within_the_limit_and_bfloat16_is_faithful(which):
    command = [sys.executable, str(ROOT / "benchmarks" / "teachers.py"), "--json", "--only", which, "--images", "1"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # as users have it
    environment = {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found = json.loads(ended.stdout)
    print(which, found)
    assert found["peak"] < LIMIT_MB
    assert found["cosine"] > 0.9999
    assert found["gflop"] == pytest.approx({"medsam": 972, "retfound": 119, "usfm": 35}[which], rel=0.02)


def cheap(key, like):
    """A tensor like one on the meta device, of one block of noise again and again, in half precision."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    block = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).half() / 50
    values = block.repeat(like.numel() // len(block) + 1)[: like.numel()].view(like.shape)
    scales = like.ndim < 2 and key.endswith(("weight", "running_var"))
    return values + 1 if scales else values


def test_four_copied_files_teach_by_the_headline_command(tmp_path):
    """Full-size files in the official layouts, real images, a process of its own: `teachers` stays "auto"."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for which, file in OFFICIAL.items():
        prompts = {"prompts": ["polyp in endoscopy"]} if which == "biomedparse" else {}
        with torch.device("meta"):
            teacher = build_teacher({"name": which, "kind": which, "weights": "random", **prompts})
        state = {key: cheap(key, value) for key, value in official_state(which, teacher).items()}
        torch.save({"model": state} if which == "retfound" else state, weights / file)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for path in sorted(shared_data("Kvasir-SEG", kind).iterdir())[:4]:
            shutil.copy(path, tmp_path / "data" / kind)
    places = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "eval", "ckpt_dir": tmp_path / "models"}
    values = {**places, "cache_dir": tmp_path / "cache", "image_size": 64, "max_epochs": 1, "admission#mode": "all"}
    values["split_fractions"] = [0.5, 0.25, 0.25]
    command = ["-c", BUNDLE, "run", "training", "--config_file", "bundles/kvasir_seg/configs/train.json"]
    options = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AMKD_WEIGHTS": str(weights)}
    subprocess.run([sys.executable, *command, *options], check=True, cwd=ROOT, env=environment)

    record = json.loads((tmp_path / "eval" / "run.json").read_text())
    assert record["status"] == "completed" and record["data"]["counts"]["train"] == 2
    assert {t["name"]: t["file"] for t in record["teachers"]["chosen"]} == OFFICIAL
    taught = {t["name"]: t for t in record["distillation"]["teachers"]}
    asked = {"medsam": [1024, 1024], "biomedparse": [1024, 1024], "retfound": [224, 224], "usfm": [224, 224]}
    assert {name: t["asked_at"]["size"] for name, t in taught.items()} == asked
    assert not any(t["random_weights"] for t in taught.values())
    stores = [FeatureStore.open(path.parent) for path in (tmp_path / "cache").rglob("store.json")]
    train = [store for store in stores if "grid" in store.arrays and len(store) == 2]
    assert len(train) == len(OFFICIAL)
    (segments,) = (store for store in train if "logits" in store.arrays)
    assert {name: spec.shape for name, spec in segments.arrays.items()} == {
        "grid": (1536, 16, 16),
        "pooled": (1536,),
        "logits": (2, 256, 256),
    }
    for store in train:
        grid = store.read("grid", [0, 1]).astype(np.float32)
        assert np.isfinite(grid).all() and np.abs(grid[0] - grid[1]).mean() > 1e-4
