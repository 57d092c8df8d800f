"""What the model zoo asks of a bundle's files."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest
import torch
from bundle_runs import ALL_BUNDLES, BUNDLES, SHARED, settings, workflow
from helpers import ROOT, shared_data

from amkd_monai.data.datasets import TASKS


def test_every_bundle_serves_the_task_of_its_name_and_all_but_one_task_have_a_bundle():
    assert {"aptos2019", "busi", "covid", "isic2017", "kvasir_seg", "msd_heart"} <= set(BUNDLES) <= set(TASKS)
    assert set(ALL_BUNDLES) == {*BUNDLES, SHARED}
    served = {
        json.loads(path.read_text()).get("task")
        for path in ROOT.glob("bundles/*/configs/*.json")
        if "metadata" not in path.name
    }
    assert set(TASKS) - served == {"isic2017_lesion"}, "kvasir_seg trains it, with `--task`"


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
def test_the_readme_has_the_sections_of_all_others(bundle):
    def sections(name):
        lines = (ROOT / "bundles" / name / "docs" / "README.md").read_text().splitlines()
        return [line for line in lines if line.startswith(("# ", "## "))]

    assert sections(bundle) == sections("kvasir_seg")
    text = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text()
    assert "Not for clinical use" in text
    assert not [other for other in BUNDLES if other != bundle and f"bundles/{other}/" in text]


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
def test_static_peer_check(bundle):
    tool = shared_data("..", "tools", "bundle_peer_check.py")
    ended = subprocess.run(
        [sys.executable, str(tool), str(ROOT / "bundles" / bundle), "--level", "1"], capture_output=True, text=True
    )
    failed = [line for line in ended.stdout.splitlines() if line.startswith("[FAIL]")]
    allowed = [] if (ROOT / "bundles" / bundle / "models" / "model.pt").is_file() else ["models/model.pt"]
    assert [line for line in failed if not any(a in line for a in allowed)] == []


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
def test_metadata_fits_the_schema_and_the_network(bundle, tmp_path):
    metadata = json.loads((ROOT / "bundles" / bundle / "configs" / "metadata.json").read_text())
    schema = json.loads(shared_data("..", "reference", "meta_schema_20240725.json").read_text())
    jsonschema.validate(metadata, schema)
    network = workflow(bundle, ("inference",), settings(bundle, tmp_path, tmp_path)).parser.get_parsed_content(
        "network"
    )
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    logits = network.eval()(torch.rand(1, image["num_channels"], *image["spatial_shape"]))
    assert logits.shape == (1, pred["num_channels"], *pred["spatial_shape"])
    assert list(pred["channel_def"]) == [str(i) for i in range(pred["num_channels"])]


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
def test_the_exported_network_scripts_and_agrees(bundle, tmp_path):
    network = workflow(bundle, ("inference",), settings(bundle, tmp_path, tmp_path)).parser.get_parsed_content(
        "network"
    )
    network.eval()
    image = torch.rand(2, 3, 64, 96)
    assert torch.equal(torch.jit.script(network)(image), network(image))
