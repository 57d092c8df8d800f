"""A 3D student in use: each of its formats, slid over volumes, gives the masks of the bundle that trained it."""

from __future__ import annotations

import gzip
import json
from functools import partial

import jsonschema
import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from bundle_runs import read_json, run
from fastapi import UploadFile
from helpers import ROOT, needs, shared_data
from monai.bundle import ConfigParser, verify_net_in_out
from monai.inferers import SlidingWindowInferer
from monai.networks import nets
from own_data import dicom_series
from safetensors.torch import load_file
from test_export import BARE, BLOCKED, python
from test_repositories import triton_config

import amkd_monai
from amkd_monai.__main__ import main
from amkd_monai.data.datasets import get_task
from amkd_monai.export.formats import DEFAULT, FORMATS, chosen_formats, of_volumes, scripted, write
from amkd_monai.export.predict import Predictor, predict
from amkd_monai.export.runners import runner, torch_runner
from amkd_monai.export.serve import application
from amkd_monai.export.source import resolved
from amkd_monai.export.translate import window
from amkd_monai.export.windows import logits_of
from amkd_monai.files.steps import prepare
from amkd_monai.files.volumes import read_volume
from amkd_monai.metrics.summary import read_case_csv
from amkd_monai.networks import VolumeStudent

NAME = "heart_patches"
INFERER = {"_target_": "SlidingWindowInferer", "roi_size": [4, 8, 8]}


@pytest.fixture(scope="module")
def hearts(exported, tmp_path_factory):
    """Volumes of more slices than a patch, of fewer, and in another order of their axes."""
    folder, images = exported(NAME)[0], tmp_path_factory.mktemp("hearts")
    first, second = sorted((folder / "cache" / "phantoms").rglob("imagesTr/la_*.nii.gz"))[:2]
    image = nib.load(first)
    for name, volume in {"whole": image, "short": image.slicer[4:12], "LPS": nib.load(second)}.items():
        if name == "LPS":
            turn = nib.orientations.axcodes2ornt("LPS")
            own = nib.io_orientation(volume.affine)
            volume = volume.as_reoriented(nib.orientations.ornt_transform(own, turn))
        nib.save(volume, images / f"{name}.nii.gz")
    return images


@pytest.fixture(scope="module")
def expected(students, hearts, tmp_path_factory):
    """Masks by the training bundle's own inference, by name."""
    _, values = students(NAME)
    masks = tmp_path_factory.mktemp("masks")
    given = {**values, "dataset_dir": str(hearts), "output_dir": str(masks)}
    run("msd_heart", ("inference", "volumes3d_inference"), given)
    return masks_of(masks)


def masks_of(folder):
    found = {file.name.split("_mask")[0]: nib.load(file) for file in folder.glob("*_mask.nii.gz")}
    return {name: (np.asarray(mask.dataobj), mask.affine) for name, mask in found.items()}


def check_same(found, expected, hearts):
    assert found.keys() == expected.keys() == {"whole", "short", "LPS"}
    for name, (mask, affine) in found.items():
        source = nib.load(hearts / f"{name}.nii.gz")
        assert mask.shape == source.shape
        np.testing.assert_allclose(affine, source.affine, atol=1e-4)
        np.testing.assert_array_equal(mask, expected[name][0], err_msg=name)
        assert 0 < (mask > 0).mean() < 0.9, "masks that say something"


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((4, 8, 8), {}),
        ((9, 8, 19), {"overlap": 0.5, "mode": "gaussian"}),
        ((3, 5, 20), {"overlap": [0.6, 0.0, 0.99], "mode": "gaussian", "sigma_scale": [0.05, 0.125, 0.3]}),
        ((11, 7, 8), {"overlap": 0.7, "mode": "constant", "sw_batch_size": 3}),
    ],
)
def test_windows_are_those_of_monai(size, settings):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(2, 3, 3, padding=1).eval()
    volume = torch.rand(1, 2, *size)
    with torch.inference_mode():
        expected = SlidingWindowInferer(**{"roi_size": [4, 8, 8], **settings})(volume, network)[0].numpy()
    given = window({**INFERER, **settings}, is_3d=True)
    slices = np.moveaxis(volume[0].numpy(), 0, 1)
    found = logits_of(torch_runner(network), slices, 8, given)
    np.testing.assert_allclose(np.moveaxis(found, 1, 0), expected, atol=1e-4)


def test_inferers_that_prediction_cannot_repeat_are_refused():
    for name, value in {"padding_mode": "reflect", "cval": 1.0, "with_coord": True, "roi_size": [-1, 8, 8]}.items():
        with pytest.raises(ValueError, match=name):
            window({**INFERER, name: value}, is_3d=True)
    for inferer, is_3d in (("SimpleInferer", True), ("SlidingWindowInferer", False), ("PatchInferer", True)):
        with pytest.raises(ValueError, match=inferer):
            window({**INFERER, "_target_": inferer}, is_3d)
    assert window({"_target_": "monai.inferers.SliceInferer"}, is_3d=False) is None


def test_predict_without_torch_and_monai_without_this_package_give_the_masks_of_the_bundle(
    exported, hearts, expected, tmp_path
):
    dist = exported(NAME)[0] / "dist" / NAME
    slices = {}
    for name in expected:
        array, grid = read_volume(hearts / f"{name}.nii.gz")
        slices[name] = prepare(array[None], read_json(dist / "configs" / "predict.json")["steps"], grid)[0].shape[1]
    assert slices["short"] < 16 < slices["whole"]
    ended = python(BARE, "predict", "--model", dist, hearts, "--output", tmp_path / "predict")
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_same(masks_of(tmp_path / "predict"), expected, hearts)
    ended = python(BLOCKED, dist, hearts, tmp_path / "monai")
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_same(masks_of(tmp_path / "monai"), expected, hearts)


@pytest.mark.parametrize("form", ["ts", "pt2", "openvino"])
def test_each_format_gives_the_masks_of_the_bundle(form, exported, hearts, expected, tmp_path):
    dist = exported(NAME)[0] / "dist" / NAME
    predictor = Predictor(dist)
    predictor._run = runner(form, dist / "models" / FORMATS[form], 1)
    assert predict(predictor, hearts, tmp_path) == 0
    check_same(masks_of(tmp_path), expected, hearts)


def test_the_bundle_is_whole_and_monais_own_commands_take_it(exported, tmp_path):
    folder, _ = exported(NAME)
    dist = folder / "dist" / NAME
    metadata, predicts = (read_json(dist / "configs" / f"{name}.json") for name in ("metadata", "predict"))
    jsonschema.validate(metadata, read_json(shared_data("..", "reference", "meta_schema_20240725.json")))
    for tensor in (
        metadata["network_data_format"]["inputs"]["image"],
        metadata["network_data_format"]["outputs"]["pred"],
    ):
        assert tensor["spatial_shape"] == [16, 48, 40] and tensor["is_patch_data"]
    summary = read_json(folder / "eval" / "metrics.json")["summary"]["metrics"]
    assert metadata["eval_metrics"]["dice"] == summary["dice"]["mean"]
    facts, inferer = read_json(dist / "docs" / "export.json"), read_json(dist / "configs" / "inference.json")["inferer"]
    assert facts["window"] == predicts["window"] and facts["left_out"] == []
    assert inferer["roi_size"] == predicts["window"]["roi_size"] == [16, 48, 40]
    assert predicts["window"]["overlap"] == [inferer["overlap"]] * 3 and predicts["window"]["mode"] == inferer["mode"]
    rows = {row["name"]: row for row in facts["formats"]}
    assert rows.keys() == {"eager", "ts", "pt2", "onnx", "openvino"}
    assert all(row["difference"] <= 1e-4 for row in rows.values())
    card = (dist / "docs" / "README.md").read_text()
    assert "(B, 1, 16, 48, 40)" in card and f"{summary['dice']['mean']:.4f}" in card and "Calibration: " in card
    places = {"bundle_root": str(dist), "config_file": str(dist / "configs/inference.json")}
    verify_net_in_out(net_id="network_def", device="cpu", meta_file=str(dist / "configs/metadata.json"), **places)
    patch = torch.rand(2, 1, 16, 48, 40)
    network = monai.bundle.load(NAME, bundle_dir=str(dist.parent), workflow_type="inference", device="cpu").eval()
    script, _, _ = monai.bundle.load(NAME, bundle_dir=str(dist.parent), load_ts_module=True, device="cpu")
    torch.testing.assert_close(script(patch), network(patch))
    ours = {"net_id": "network_def", "ckpt_file": str(folder / "models" / "model.pt"), "bundle_root": str(tmp_path)}
    configs = [str(ROOT / "bundles/msd_heart/configs" / f"{n}.json") for n in ("inference", "volumes3d_inference")]
    ours |= {
        "patch_slices": 16,
        "network_def#network#init_filters": 8,
        "meta_file": str(dist / "configs/metadata.json"),
    }
    monai.bundle.ckpt_export(filepath=str(tmp_path / "own.ts"), config_file=configs, **ours)
    torch.testing.assert_close(torch.jit.load(tmp_path / "own.ts")(patch), network(patch))


def test_hub_and_triton_describe_patches(exported, hearts, expected):
    dist = exported(NAME)[0] / "dist" / NAME
    state, saved = torch.load(dist / "models" / "model.pt", weights_only=True), load_file(dist / "model.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    config = read_json(dist / "config.json")
    assert config["network"]["network"]["_target_"] == "SegResNet" and config["window"]["roi_size"] == [16, 48, 40]
    np.testing.assert_array_equal(amkd_monai.load(dist).answer(hearts / "LPS.nii.gz"), expected["LPS"][0])
    (model,) = (dist / "triton").iterdir()
    described = triton_config((model / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    assert list(described.input[0].dims) == session.get_inputs()[0].shape[1:] == [1, 16, 48, 40]
    assert list(described.output[0].dims) == session.get_outputs()[0].shape[1:] == [2, 16, 48, 40]
    batch = np.random.default_rng(0).random((described.max_batch_size, 1, 16, 48, 40), np.float32)
    (answer,) = session.run(["pred"], {"image": batch})
    (alone,) = session.run(["pred"], {"image": batch[2:3]})
    np.testing.assert_allclose(answer[2:3], alone, atol=1e-4)


def test_evaluate_serve_and_dicom_give_the_students_masks(exported, hearts, expected, tmp_path):
    folder, words = exported(NAME)
    dist, other = folder / "dist" / NAME, get_task("msd_heart").write_phantom(tmp_path / "other", seed=11, cases=2)
    places = [word for word in words if word.startswith(("--set=ckpt_dir", "--set=cache_dir"))]
    own = ["evaluate", words[0], "--overlay", "volumes3d", "--data", str(other), *places]
    assert main([*own, "--output", str(tmp_path / "student")]) == 0
    assert main(["evaluate", str(dist), "--data", str(other), "--output", str(tmp_path / "dist")]) == 0
    rows = [read_case_csv(tmp_path / at / "per_case.csv") for at in ("student", "dist")]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]] and len(rows[0]) == 2
    for student, alone in zip(*rows, strict=True):
        assert student["dice"] == pytest.approx(alone["dice"], abs=1e-4) and student["dice"] > 0

    served = application(Predictor(dist, threads=1), 3_000_000, ("*",))
    (asked,) = (route.endpoint for route in served.routes if route.path == "/predict")
    answer = nib.Nifti1Image.from_bytes(gzip.decompress(asked([UploadFile((hearts / "short.nii.gz").open("rb"))]).body))
    np.testing.assert_array_equal(np.asarray(answer.dataobj), expected["short"][0])

    needs("highdicom")
    levels = nib.load(hearts / "whole.nii.gz")
    grid = nib.Nifti1Image(np.asarray(levels.dataobj).round().astype(np.int16), levels.affine)
    nib.save(grid, tmp_path / "levels.nii.gz")
    dicom_series(tmp_path / "study" / "series", tmp_path / "levels.nii.gz")
    output = tmp_path / "out"
    assert main(["predict", "--model", str(dist), str(tmp_path / "levels.nii.gz"), "--output", str(output)]) == 0
    written = main(["predict", "--model", str(dist), str(tmp_path / "study"), "--output", str(output), "--dicom-seg"])
    masks = [nib.as_closest_canonical(nib.load(output / f"{n}_mask.nii.gz")) for n in ("levels", "series")]
    np.testing.assert_array_equal(*(np.asarray(mask.dataobj) for mask in masks))
    assert written == 0 and (output / "series_mask.dcm").stat().st_size > 1000


def test_formats_that_a_3d_student_has_not_are_named(exported, tmp_path, capsys):
    _, words = exported(NAME)
    wrong = ("ort-int8", "openvino-int8", "web")
    assert main(["export", *words, "--to", str(tmp_path / "x"), "--formats", ",".join(["onnx", *wrong])]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and all(f"no {form}" in error for form in wrong)
    for form in wrong:
        with pytest.raises(ValueError, match=f"no {form}"):
            of_volumes(["ts", form], are_chosen=True)
    assert of_volumes(chosen_formats(DEFAULT), are_chosen=False) == ["ts", "pt2", "onnx"]


def test_a_network_that_its_config_only_refers_to_is_named():
    parser = ConfigParser({"net": {"_target_": "UNet", "_mode_": "callable"}, "size": 8})
    parser["network_def"] = {"_target_": "x.VolumeStudent", "network": "@net", "slices": "@size"}
    with pytest.raises(ValueError, match="network_def#network is '@net'"):
        resolved(parser, "network_def", parser.config["network_def"])
    parser["network_def#network"] = {"_target_": "UNet", "_mode_": "callable", "channels": "$(1, @size)"}
    found = resolved(parser, "network_def", parser.config["network_def"])
    assert found["slices"] == 8 and found["network"]["channels"] == [1, 8]


NETWORKS = {
    "DynUNet": {
        **{"kernel_size": [[1, 3, 3], 3, 3], "strides": [1, [1, 2, 2], 2], "upsample_kernel_size": [[1, 2, 2], 2]},
        "filters": [4, 8, 8],
    },
    "UNet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "AttentionUnet": {"channels": (4, 8, 8), "strides": (2, 2)},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_of_monai_are_exported(name, tmp_path):
    torch.manual_seed(0)
    network = partial(getattr(nets, name), spatial_dims=3, in_channels=2, out_channels=3, **NETWORKS[name])
    student, patch = VolumeStudent(network, slices=4, num_classes=3).eval(), torch.rand(3, 2, 4, 24, 16)
    with torch.inference_mode():
        expected = student(patch).numpy()
    for form in ("ts", "pt2", "onnx"):
        path = write(form, student, tmp_path, [], patch=patch.shape[1:])
        np.testing.assert_allclose(runner(form, path, 1)(patch.numpy()), expected, atol=1e-4, err_msg=form)


def test_a_network_that_torch_cannot_script_is_named():
    class Odd(torch.nn.Module):
        def forward(self, image):
            return max([image * n for n in range(2)], key=lambda value: value.sum())

    with pytest.raises(ValueError, match=r"Odd .*torch\.jit\.script"):
        scripted(Odd())


def two_channels(folder, cases=7):
    """Write nnU-Net's layout: one object shows in the first channel, another in the second; three classes."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    for case in range(cases):
        label = np.zeros((40, 44, 20), np.uint8)
        for value in (1, 2):
            start = (rng.integers(2, 12) + (value - 1) * 14, rng.integers(2, 30), rng.integers(1, 8))
            label[tuple(slice(s, s + 11) for s in start)] = value
        kind = "imagesTs" if case == cases - 1 else "imagesTr"
        for channel in range(2):
            values = (rng.integers(0, 90, label.shape) + 120 * (label == channel + 1)).astype(np.uint8)
            volume = nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0]))
            nib.save(volume, folder / kind / f"case{case}_{channel:04d}.nii.gz")
        if kind == "imagesTr":
            nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.0, 3.0, 1.0])), folder / "labelsTr" / f"case{case}.nii.gz")
    about = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1, "two": 2}}
    (folder / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))
    return folder


def add_overlay(configs, channels, classes):
    """Write ``volumes3d`` for a bundle of the user's own, from the heart's."""
    heart = ROOT / "bundles" / "msd_heart" / "configs"
    for end, key in (
        ("", ""),
        ("_evaluate", "validate#preprocessing"),
        ("_inference", "preprocessing"),
        ("_metadata", ""),
    ):
        part = read_json(heart / f"volumes3d{end}.json")
        if "network_def" in part:
            part["network_def"]["num_classes"], part["patch_slices"] = classes, 8
            part["network_def"]["network"] |= {"in_channels": channels, "out_channels": classes, "init_filters": 8}
            part["network_def"]["network"] |= {"blocks_down": [1, 1, 1, 1]}
        if key:
            part[key] = read_json(configs / f"{end[1:]}.json")[key]
            assert "NeighbourSlicesd" in part[key]["transforms"].pop()["_target_"]
        (configs / f"volumes3d{end}.json").write_text(json.dumps(part))


def test_several_channels_and_classes_are_predicted_as_the_bundle_does(tmp_path, monkeypatch):
    data = two_channels(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "two", "--data", str(data)]) == 0
    configs = tmp_path / "bundles" / "two" / "configs"
    add_overlay(configs, 2, 3)
    names = ("train", "volumes3d", "evaluate", "volumes3d_evaluate", "inference", "volumes3d_inference")
    chain = [str(configs / f"{name}.json") for name in names]
    quick = {"teachers": [], "max_epochs": 2}
    monai.bundle.run(run_id="training", config_file=chain[:2], **quick)
    monai.bundle.run(config_file=chain[:4], **quick)
    monai.bundle.run(config_file=chain[4:])
    words = ["export", "bundles/two", "--overlay", "volumes3d", "--to", "out", "--formats", "ts,onnx,triton"]
    assert main(words) == 0
    image = read_json(tmp_path / "out/configs/metadata.json")["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == 2
    predict(Predictor(tmp_path / "out"), data / "imagesTs", tmp_path / "masks")
    plain = {"bundle_root": str(tmp_path / "out"), "output_dir": str(tmp_path / "plain")}
    monai.bundle.run(
        config_file=str(tmp_path / "out/configs/inference.json"), dataset_dir=str(data / "imagesTs"), **plain
    )
    masks = [*(tmp_path / "bundles/two/eval/masks").glob("*.nii.gz"), *(tmp_path / "masks").glob("*.nii.gz")]
    offline, alone, by_monai = (
        np.asarray(nib.load(m).dataobj) for m in (*masks, *(tmp_path / "plain").rglob("*.nii.gz"))
    )
    assert set(np.unique(offline)) == {0, 1, 2} and offline.shape == (40, 44, 20)
    assert (offline != alone).mean() < 1e-3 and (offline != by_monai).mean() < 1e-3
    assert main(["evaluate", "out", "--data", str(data), "--output", "scores", "--seen", "apart"]) == 0
