"""Model repositories of the Hugging Face hub and of Triton: what is in them, and reading them back offline."""

from __future__ import annotations

import shutil

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
from bundle_runs import read_json
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from helpers import ROOT
from PIL import Image
from safetensors.torch import load_file
from test_export import images_of

import amkd_monai
from amkd_monai.__main__ import main
from amkd_monai.export.repositories import front_matter

KINDS = ("kvasir_seg", "aptos2019")
INT32, INT64, STRING, MESSAGE, ENUM = 5, 3, 9, 11, 14


def triton_config(text):
    """Parse by the fields of Triton's ``model_config.proto`` that are used; any other name or type is an error."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(("TYPE_INVALID", "TYPE_FP32")):
        types.value.add(name=name, number=11 * number)
    tensor = [("name", 1, STRING, 0), ("data_type", 2, ENUM, 0), ("dims", 4, INT64, 1)]
    batching = [("preferred_batch_size", 1, INT32, 1), ("max_queue_delay_microseconds", 2, 4, 0)]
    model = [("name", 1, STRING, 0), ("max_batch_size", 4, INT32, 0), ("input", 5, "Tensor", 1)]
    model += [("output", 6, "Tensor", 1), ("dynamic_batching", 11, "Batching", 0), ("backend", 17, STRING, 0)]
    for message, fields in (("Tensor", tensor), ("Batching", batching), ("ModelConfig", model)):
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            is_message = isinstance(kind, str)
            described.field.add(
                **{"name": name, "number": number, "type": MESSAGE if is_message else kind},
                **{"label": 3 if repeated else 1},
                **({"type_name": f".inference.{kind}"} if is_message else {}),
                **({"type_name": ".inference.DataType"} if kind == ENUM else {}),
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return text_format.Parse(
        text, message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    )


@pytest.mark.parametrize("bundle", KINDS)
def test_a_hub_repository_is_complete_and_read_back_without_a_network(bundle, exported, tmp_path, monkeypatch, capsys):
    folder, _ = exported(bundle)
    dist = folder / "dist" / bundle
    state, saved = torch.load(dist / "models" / "model.pt", weights_only=True), load_file(dist / "model.safetensors")
    assert (dist / "model.safetensors").stat().st_mode == (dist / "config.json").stat().st_mode
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    card = huggingface_hub.ModelCard.load(dist / "README.md")
    is_mask = bundle == "kvasir_seg"
    assert card.data.pipeline_tag == ("image-segmentation" if is_mask else "image-classification")
    assert card.data.license == "other" and (dist / card.data.license_link).is_file() and not card.data.eval_results
    assert "knowledge-distillation" not in card.data.tags, "no teacher taught it"
    assert "NOT FOR CLINICAL USE" in card.content and "`docs/data_license.txt`" in card.content
    config = read_json(dist / "config.json")
    classes = read_json(dist / "configs" / "predict.json")["classes"]
    assert list(config["id2label"].values()) == classes and config["network"]["num_classes"] == len(classes)

    cached = tmp_path / "hub" / f"models--someone--{bundle}"  # as a download leaves it
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(dist, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    image = sorted(images_of(bundle, folder).iterdir())[0]
    assert main(["predict", "--model", str(dist), str(image), "--output", str(tmp_path / "out")]) == 0
    for where in (dist, f"someone/{bundle}"):
        answer = amkd_monai.load(where).answer(image)
        if is_mask:
            written = np.asarray(Image.open(tmp_path / "out" / f"{image.stem}_mask.png"))
            np.testing.assert_array_equal(answer * 255, written)
        else:
            row = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1].split(",")
            np.testing.assert_allclose(answer, np.float64(row[2:]), atol=1e-6)
    with pytest.raises(ValueError, match="revision"):
        amkd_monai.load(dist, "v1")
    with pytest.raises(OSError, match="someone/else"):
        amkd_monai.load("someone/else")
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match="dist/other"):
        amkd_monai.load("dist/other")
    assert main(["push", str(dist), f"someone/{bundle}"]) == 1  # HF_HUB_OFFLINE
    assert f"huggingface.co/someone/{bundle}" in capsys.readouterr().err
    assert main(["push", str(folder / "eval"), "someone/x"]) == 1 and "--formats hub" in capsys.readouterr().err


@pytest.mark.parametrize("bundle", KINDS)
def test_tritons_configs_describe_the_networks(bundle, exported):
    folder, _ = exported(bundle)
    repository = folder / "dist" / bundle / "triton"
    assert {model.name for model in repository.iterdir()} == {bundle, f"{bundle}_int8"}
    for model in repository.iterdir():
        config = triton_config((model / "config.pbtxt").read_text())
        assert config.name == model.name and config.backend == "onnxruntime" and config.HasField("dynamic_batching")
        session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        for described, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            (tensor,), (own,) = described, found
            assert tensor.name == own.name and len(own.shape) == 1 + len(tensor.dims)
            assert all(isinstance(n, str) or n == dim for n, dim in zip(own.shape[1:], tensor.dims, strict=True))
            assert tensor.data_type == 11 and own.type == "tensor(float)"
        batch = np.zeros((config.max_batch_size, 3, 32, 64), np.float32)
        (answer,) = session.run([config.output[0].name], {config.input[0].name: batch})
        expected = [n if n > 0 else size for n, size in zip(config.output[0].dims, (0, 32, 64), strict=False)]
        assert list(answer.shape) == [config.max_batch_size, *expected]


def test_scores_are_results_unless_they_are_of_phantoms(tmp_path):
    metadata = read_json(ROOT / "bundles" / "kvasir_seg" / "configs" / "metadata.json")
    metadata["eval_metrics"], predict = {"dice": 0.9}, {"kind": "segmentation", "task": "kvasir_seg"}
    assert "model-index" not in front_matter(metadata, predict, is_phantom=True)
    (result,) = huggingface_hub.ModelCardData(**front_matter(metadata, predict, is_phantom=False)).to_dict()[
        "model-index"
    ]
    assert result["results"][0]["metrics"] == [{"type": "dice", "value": 0.9}]
