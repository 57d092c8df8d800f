"""Small students, trained on phantoms and exported once for all tests."""

from __future__ import annotations

import json

import pytest
from bundle_runs import TRAINING_ONLY, run, settings
from helpers import ROOT

from amkd_monai.__main__ import main


def train(bundle, folder):
    values = settings(bundle, folder, folder / "cache", teachers=[])
    if bundle == "msd_heart":
        values["volume_size"] = [16, 64, 32]  # multiples of 32
    run(bundle, ("train",), values)
    run(bundle, ("train", "evaluate"), values)
    kept = {k: v for k, v in values.items() if k not in (*TRAINING_ONLY, "bundle_root")}
    return [f"--set={key}={json.dumps(value)}" for key, value in kept.items()]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Train and export a bundle, once; return the folder of the run and the settings it is exported with."""
    done = {}

    def get(bundle, formats="ts,onnx,ort-int8,openvino,openvino-int8"):
        if bundle not in done:
            folder = tmp_path_factory.mktemp(bundle)
            done[bundle] = folder, train(bundle, folder)
            options = ["--formats", formats, "--accept-loss", "--calibration", "4", *done[bundle][1]]
            assert (
                main(["export", str(ROOT / "bundles" / bundle), "--to", str(folder / "dist" / bundle), *options]) == 0
            )
        return done[bundle]

    return get
