"""The foundation teachers at their full size, with fixed random weights: cost within limits, real images cached."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, shared_data
from monai.transforms import Compose, Resized, ScaleIntensityRanged

from amkd_monai.cache.build import cache_teacher
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.transforms import load_rgb
from amkd_monai.teachers.base import build_teacher

pytestmark = pytest.mark.slow
LIMIT_MB = 4500


@pytest.mark.parametrize("which", ["medsam", "retfound", "usfm"])
def test_memory_stays_within_the_limit_and_bfloat16_is_faithful(which):
    command = [sys.executable, str(ROOT / "benchmarks" / "teachers.py"), "--json", "--only", which, "--images", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found = json.loads(ended.stdout)
    print(which, found)
    assert found["peak"] < LIMIT_MB
    assert found["cosine"] > 0.9999
    assert found["gflop"] == pytest.approx({"medsam": 972, "retfound": 119, "usfm": 35}[which], rel=0.02)


@pytest.mark.parametrize(
    ("description", "shape"),
    [
        ({"kind": "medsam", "precision": "bfloat16"}, (256, 16, 16)),
        ({"kind": "retfound"}, (1024, 14, 14)),
        ({"kind": "usfm"}, (768, 14, 14)),
    ],
    ids=["medsam", "retfound", "usfm"],
)
def test_two_real_images_are_cached(description, shape, tmp_path):
    paths = sorted(shared_data("Kvasir-SEG", "images").iterdir())[:2]
    items = [{"image": str(path), "id": path.stem, "group": path.stem} for path in paths]
    chain = Compose([load_rgb("image"), ScaleIntensityRanged("image", 0, 255, 0, 1), Resized("image", (256, 256))])
    dataset = DecodedDataset(items, chain, tmp_path / "cache")
    teacher = build_teacher({"name": "t", **description, "weights": "random"})
    store = cache_teacher(teacher, dataset, tmp_path / "stores", batch_size=2)
    grid = store.read("grid", [0, 1]).astype(np.float32)
    assert store.is_complete and grid.shape == (2, *shape)
    assert np.isfinite(grid).all() and np.abs(grid[0] - grid[1]).mean() > 1e-4
    assert store.read("pooled", [0, 1]).shape == (2, shape[0])
