"""Small students, trained on phantoms and exported once for all tests."""

from __future__ import annotations

import json

import pytest
from bundle_runs import TRAINING_ONLY, run, settings
from helpers import ROOT

from amkd_monai.__main__ import main

OVERLAYS = {"covid_volumes": ("covid", "volumes")}
"""Bundle and overlay of the tasks that are served by an overlay."""
FURTHER = ("openvino", "openvino-int8", "hub", "triton")
"""Formats of one student for masks and one for classes; those of volumes are the same network for masks."""


def train(task, folder):
    """Train and evaluate; return the arguments of `export` but for where to."""
    bundle, overlay = OVERLAYS.get(task, (task, ""))
    values = settings(bundle, folder, folder / "cache", teachers=[])
    if task == "msd_heart":
        values["volume_size"] = [16, 64, 32]  # multiples of 32
    if overlay:
        values |= {"spacing": [8.0, 8.0, 8.0], "volume_size": [-1, 64, 64], "max_epochs": 8}
    configs = ("train", overlay) if overlay else ("train",)
    run(bundle, configs, values)
    run(bundle, (*configs, "evaluate", *([f"{overlay}_evaluate"] if overlay else [])), values)
    kept = {k: v for k, v in values.items() if k not in (*TRAINING_ONLY, "bundle_root")}
    options = [f"--set={key}={json.dumps(value)}" for key, value in kept.items()]
    return [str(ROOT / "bundles" / bundle), "--overlay", overlay, *options]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Train and export a task's bundle, once; return the folder of the run and how it is exported."""
    done = {}

    def get(task):
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            done[task] = folder, train(task, folder)
            formats = ["ts", "onnx", "ort-int8", *(FURTHER if task in ("kvasir_seg", "aptos2019") else ())]
            options = ["--formats", ",".join(formats), "--accept-loss", "--calibration", "4"]
            assert main(["export", *done[task][1], "--to", str(folder / "dist" / task), *options]) == 0
        return done[task]

    return get
