"""Bad input to export and predict is one sentence; the command line itself stays light."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

from amkd_monai.__main__ import main
from amkd_monai.export.bundle import Row, judge
from amkd_monai.export.formats import check_size, chosen_formats
from amkd_monai.export.predict import drawn_overlay
from amkd_monai.export.translate import postprocessing, preprocessing
from amkd_monai.files.pictures import class_colours, contrasting

KVASIR = str(ROOT / "bundles" / "kvasir_seg")


def refused(capsys, *arguments):
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_no_trained_student(tmp_path, capsys):
    error = refused(capsys, "export", KVASIR, "--to", str(tmp_path / "d"), f"--set=ckpt_dir={tmp_path}")
    assert str(tmp_path / "model.pt") in error
    assert not (tmp_path / "d").exists()


def test_unknown_formats_and_settings(tmp_path, capsys):
    to = str(tmp_path / "d")
    assert "'tflite'" in refused(capsys, "export", KVASIR, "--to", to, "--formats", "ts,tflite")
    assert "no setting 'imagesize'" in refused(capsys, "export", KVASIR, "--to", to, "--set", "imagesize=3")
    assert "KEY=VALUE" in refused(capsys, "export", KVASIR, "--to", to, "--set", "image_size")


def test_a_format_whose_package_is_not_installed(monkeypatch):
    assert chosen_formats("openvino") == ["ts", "openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino-int8 needs openvino.*amkd_monai\[openvino\]"):
        chosen_formats("ts,openvino-int8")


def test_sizes_that_only_torchscript_takes():
    check_size(["ts"], (48, 32))
    check_size(["ts", "onnx"], (64, 32))
    with pytest.raises(ValueError, match="48 x 32"):
        check_size(["ts", "onnx"], (48, 32))


def test_not_a_bundle(tmp_path, capsys):
    assert "not a training bundle" in refused(capsys, "export", str(tmp_path), "--to", str(tmp_path / "d"))
    assert "no overlay 'tiles', it lacks configs/tiles.json" in refused(
        capsys, "export", KVASIR, "--to", str(tmp_path / "d"), "--overlay", "tiles"
    )
    assert "already exists" in refused(capsys, "export", KVASIR, "--to", str(tmp_path))
    shared = refused(capsys, "export", str(ROOT / "bundles" / "multitask"), "--to", str(tmp_path / "d"))
    assert "several data sets" in shared and "--init_from" in shared
    predict = ("predict", "--model", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "out"))
    assert "not an exported bundle" in refused(capsys, *predict)


def test_transforms_without_counterpart():
    with pytest.raises(ValueError, match="Rotate90d"):
        preprocessing("Rotate90d", {"keys": "image"})
    with pytest.raises(ValueError, match="mode 'nearest'"):
        preprocessing("Resized", {"keys": "image", "spatial_size": (4, 4), "mode": "nearest"})
    unit = {"b_min": 0.0, "b_max": 1.0, "clip": True}
    for name, settings, wrong in (
        ("ScaleIntensityRangePercentilesd", {"lower": 1, "upper": 99, **unit}, {"relative": True}),
        ("Orientationd", {"axcodes": "RAS", "labels": None}, {"as_closest_canonical": True}),
        ("Resized", {"spatial_size": [4, 4], "mode": "bilinear"}, {"size_mode": "longest"}),
        ("Spacingd", {"pixdim": [1, 1, 1], "mode": "bilinear"}, {"scale_extent": True}),
        ("SpatialPadd", {"spatial_size": [4, 4]}, {"method": "end"}),
        ("amkd_monai.data.transforms.load_rgb", {}, {"_disabled_": True}),
    ):
        assert preprocessing(name, {"keys": "image", **settings})[0]
        with pytest.raises(ValueError, match=next(iter(wrong))):
            preprocessing(name, {"keys": "image", **settings, **wrong})


ANSWERS = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "nearest_interp": False},
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    {"_target_": "amkd_monai.data.transforms.SaveMaskd", "keys": "pred", "output_dir": "@output_dir", "classes": 3},
]


@pytest.mark.parametrize(
    ("place", "number", "transform"),
    [
        (3, 0, {"_target_": "RemoveSmallObjectsd", "keys": "pred", "min_size": 9}),
        (3, 0, {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "num_components": 2}),
        (3, 0, {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": "@labels"}),
        (1, 0, {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1]}),
        (2, 1, {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.9}),
        (0, 1, {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}),
        (2, 1, {**ANSWERS[2], "_disabled_": True}),
    ],
)
def test_what_is_done_to_answers_is_done_by_prediction_or_refused(place, number, transform):
    assert postprocessing(ANSWERS, is_mask=True, dimensions=3) and postprocessing(ANSWERS[:1], False, 2)
    with pytest.raises(ValueError, match=transform["_target_"]):
        postprocessing([*ANSWERS[:place], transform, *ANSWERS[place + number :]], is_mask=True, dimensions=3)
    for answers, is_mask in ((ANSWERS[:1], True), (ANSWERS, False)):
        with pytest.raises(ValueError, match="AsDiscreted"):
            postprocessing(answers, is_mask, dimensions=2)


def test_masks_of_more_than_two_classes_are_saved_as_indices():
    assert "scale" not in postprocessing(ANSWERS, is_mask=True, dimensions=2)[-1]
    of_two = [*ANSWERS[:-1], {**ANSWERS[-1], "classes": 2}]
    assert postprocessing(of_two, is_mask=True, dimensions=2)[-1]["scale"] == 255


def test_an_overlay_shows_each_class_in_its_colour_and_names_several():
    image, mask = np.full((40, 64, 3), 100, np.uint8), np.zeros((40, 64), np.uint8)
    mask[5:20, 5:20], mask[25:35, 20:40] = 1, 2
    for classes in (("background", "lesion"), ("background", "lesion", "rim")):
        shown = np.where(mask < len(classes), mask, 0)
        drawn = drawn_overlay(image, shown, classes)
        for label in range(1, len(classes)):
            colour = class_colours(label) if len(classes) > 2 else contrasting(image)[0]
            core = (100 * 0.65 + colour * 0.35).round()
            inside = {tuple(rgb) for rgb in drawn[:40][shown == label].tolist()}
            assert inside == {tuple(colour.tolist()), tuple(core.tolist())}
        beside = drawn[:40][shown == 0]
        assert {tuple(rgb) for rgb in beside.tolist()} == {(0, 0, 0), (100, 100, 100)}, "a black rim around the lines"
        if len(classes) == 2:
            assert drawn.shape == image.shape
        else:
            lines = np.split(drawn[40:], 2)
            assert all((lines[i] == class_colours(i + 1)).all(-1).any() for i in (0, 1))


@pytest.mark.parametrize("tissue", [(190, 80, 60), (235, 130, 110), (90, 90, 90), (20, 60, 20), (250, 250, 250)])
def test_an_outline_differs_from_the_image_under_it(tissue):
    rng = np.random.default_rng(0)
    image = (np.array(tissue) + rng.normal(0, 12, (64, 64, 3))).clip(0, 255).astype(np.uint8)
    for colour in contrasting(image, 2).astype(int):
        assert np.percentile(np.abs(image.astype(int) - colour).sum(-1), 5) > 100


def test_what_a_format_may_cost():
    student = Row("eager", 1.0, 1.0, 1.0, 1.0, 0.0, 0.9)
    with pytest.raises(ValueError, match="differs from the PyTorch student"):
        judge(Row("onnx", 1.0, 1.0, 1.0, 1.0, 2e-4, 0.9), student, accept_loss=True)
    with pytest.raises(ValueError, match="differs from the PyTorch student"):
        judge(Row("openvino", 1.0, 1.0, 1.0, 1.0, math.nan, 0.9), student, accept_loss=True)
    with pytest.raises(ValueError, match="differs from the PyTorch student"):
        judge(Row("ort-int8", 1.0, 1.0, 1.0, 1.0, math.nan, 0.9), student, accept_loss=True)
    assert judge(Row("ort-int8", 1.0, 1.0, 1.0, 1.0, 0.1, 0.896), student, accept_loss=False) == ""
    worse = Row("ort-int8", 1.0, 1.0, 1.0, 1.0, 0.1, 0.89)
    with pytest.raises(ValueError, match="--accept-loss"):
        judge(worse, student, accept_loss=False)
    assert "loses 0.0100 of 0.9000" in judge(worse, student, accept_loss=True)
    assert "openvino-int8 cannot be judged" in judge(
        Row("openvino-int8", 1.0, 1.0, 1.0, 1.0, 0.1, None), student, accept_loss=True
    )


def test_help_imports_neither_torch_nor_monai():
    code = (
        "import sys\nfrom amkd_monai.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'monai', 'onnxruntime', 'numpy'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "export" in ended.stdout and "predict" in ended.stdout
