"""MONAI's own bundle commands work on the training bundles, as docs/export.md writes them."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from bundle_runs import ALL_BUNDLES, SHARED, settings, workflow
from helpers import ROOT, shared_data
from monai.bundle import ckpt_export, create_workflow, onnx_export, verify_metadata, verify_net_in_out

from amkd_monai.networks.student import Head, SharedStudent
from amkd_monai.weights import CheckpointError

SPATIAL = {2: "height", 3: "width"}


def configs(bundle):
    folder = ROOT / "bundles" / bundle
    files = {name: str(folder / "configs" / f"{name}.json") for name in ("inference", "metadata")}
    return {"config_file": files["inference"], "meta_file": files["metadata"], "bundle_root": str(folder)}


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
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


def test_a_training_is_created_without_its_preparation(tmp_path):
    places = {name: str(tmp_path / name) for name in ("output_dir", "ckpt_dir", "cache_dir")}
    files = {**configs("kvasir_seg"), "config_file": str(ROOT / "bundles/kvasir_seg/configs/train.json")}
    created = create_workflow(workflow_type="train", **files, **places)
    assert created.check_properties() == []
    assert not {"datalist", "targets", "distiller"} & set(created.parser.ref_resolver.resolved_content)
    assert isinstance(created.network_def, torch.nn.Module) and not list(tmp_path.iterdir())
    del created.parser.config["train"]["inferer"]
    with pytest.raises(KeyError, match="train_inferer"):
        created.check_properties()


def test_a_shared_student_is_exported_by_task(tmp_path):
    """ckpt_export takes one task's part of the checkpoint of all heads, also where the bundle was copied away."""
    heads = {"kvasir_seg": Head("segmentation", 2), "aptos2019": Head("classification", 5)}
    student = SharedStudent(heads, seed=3)
    for number, norm in enumerate(m for m in student.norms.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.constant_(norm.running_mean, 0.001 * number)  # no task's statistics are another's
    torch.save(student.state_dict(), tmp_path / "model.pt")
    shutil.copytree(ROOT / "bundles" / SHARED / "configs", tmp_path / SHARED / "configs")
    folder = tmp_path / SHARED
    files = {"config_file": f"{folder}/configs/inference.json", "meta_file": f"{folder}/configs/metadata.json"}
    common = {**files, "net_id": "network_def", "bundle_root": str(folder), "ckpt_file": str(tmp_path / "model.pt")}
    image = torch.rand(1, 3, 96, 96)
    for task in heads:
        ckpt_export(filepath=str(tmp_path / f"{task}.ts"), task=task, **common)
        answer = torch.jit.load(tmp_path / f"{task}.ts")(image).detach()
        torch.testing.assert_close(answer, student.for_task(task).eval()(image).detach(), atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"no head for 'busi' \(it has kvasir_seg, aptos2019\)"):
        ckpt_export(filepath=str(tmp_path / "busi.ts"), task="busi", **common)
