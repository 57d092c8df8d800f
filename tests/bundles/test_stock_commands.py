"""MONAI's own bundle commands work on the training bundles, as docs/export.md writes them."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from bundle_runs import BUNDLES, settings, workflow
from helpers import ROOT, shared_data
from monai.bundle import ckpt_export, onnx_export, verify_metadata, verify_net_in_out

SPATIAL = {2: "height", 3: "width"}


def configs(bundle):
    folder = ROOT / "bundles" / bundle
    files = {name: str(folder / "configs" / f"{name}.json") for name in ("inference", "metadata")}
    return {"config_file": files["inference"], "meta_file": files["metadata"], "bundle_root": str(folder)}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_and_network_are_verified_offline(bundle):
    schema = shared_data("..", "reference", "meta_schema_20240725.json")
    verify_metadata(meta_file=configs(bundle)["meta_file"], filepath=str(schema))
    verify_net_in_out(net_id="network_def", device="cpu", **configs(bundle))


@pytest.mark.parametrize(("bundle", "answer_axes"), [("kvasir_seg", SPATIAL), ("aptos2019", {})])
def test_torchscript_and_onnx_of_any_size(bundle, answer_axes, tmp_path):
    built = workflow(bundle, ("inference",), settings(bundle, tmp_path, tmp_path))
    student = built.parser.get_parsed_content("network_def").eval()
    torch.save(student.state_dict(), tmp_path / "model.pt")
    common = {"net_id": "network_def", "ckpt_file": str(tmp_path / "model.pt"), **configs(bundle)}
    ckpt_export(filepath=str(tmp_path / "model.ts"), **common)
    axes = {"image": {0: "batch", **SPATIAL}, "pred": {0: "batch", **answer_axes}}
    converter = {"dynamo": False, "input_names": ["image"], "output_names": ["pred"], "opset_version": 18}
    onnx_export(
        filepath=str(tmp_path / "model.onnx"),
        use_trace=True,
        converter_kwargs={**converter, "dynamic_axes": axes},
        **common,
    )
    script = torch.jit.load(tmp_path / "model.ts")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 256, 256), (2, 3, 96, 160)):
        image = torch.rand(shape)
        expected = student(image).detach()
        torch.testing.assert_close(script(image).detach(), expected, atol=1e-5, rtol=0)
        (answer,) = session.run(["pred"], {"image": image.numpy()})
        np.testing.assert_allclose(answer, expected, atol=1e-4)
