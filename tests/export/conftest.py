"""Small students, exported once for all tests."""

from __future__ import annotations

import json

import pytest
from bundle_runs import OVERLAYS, TRAINING_ONLY
from helpers import ROOT

from amkd_monai.__main__ import main

FURTHER = ("openvino", "openvino-int8", "hub", "triton")
"""Formats of one student for masks and one for classes; those of slices of volumes are the same network for masks."""
PATCHES = ("ts", "pt2", "onnx", "openvino", "hub", "triton")
"""Formats of a 3D student."""


@pytest.fixture(scope="session")
def exported(students):
    """Export a task's small student, once; return the folder of its run and how it is exported."""
    done = {}

    def get(task):
        if task not in done:
            folder, values = students(task)
            bundle, overlay = OVERLAYS.get(task, (task, ""))
            kept = {k: v for k, v in values.items() if k not in (*TRAINING_ONLY, "bundle_root") and "#" not in k}
            options = [f"--set={key}={json.dumps(value)}" for key, value in kept.items()]
            done[task] = folder, [str(ROOT / "bundles" / bundle), "--overlay", overlay, *options]
            formats = ["ts", "onnx", "ort-int8", *(FURTHER if task in ("kvasir_seg", "aptos2019") else ())]
            formats += ["pt2"] if task == "kvasir_seg" else []
            formats = PATCHES if task == "heart_patches" else formats
            options = ["--formats", ",".join(formats), "--accept-loss", "--calibration", "4"]
            assert main(["export", *done[task][1], "--to", str(folder / "dist" / task), *options]) == 0
        return done[task]

    return get
