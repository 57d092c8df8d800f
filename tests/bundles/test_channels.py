"""Images of several files: what of them is read, learned, shown to teachers, and predicted again after the export."""

from __future__ import annotations

import json

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
from bundle_runs import read_json
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data import datalist
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.export.predict import predict
from amkd_monai.label.student import ServedStudent

QUICK = {"max_epochs": 1, "teachers": [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]}
QUICK["admission"] = {"mode": "all"}


def raw_folder(folder, channels, suffix, write, shape, cases=9):
    """nnU-Net's layout of ``channels`` files a case; the object shows in the last one alone."""
    rng = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    for case in range(cases):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(start, start + 12) for start in rng.integers(2, np.subtract(shape, 13)))] = 1
        kind = "imagesTs" if case == cases - 1 else "imagesTr"
        for channel in range(channels):
            values = rng.integers(0, 90 + 60 * channel, shape) + (100 * label if channel == channels - 1 else 0)
            write(folder / kind / f"case{case}_{channel:04d}{suffix}", values.astype(np.uint8))
        if kind == "imagesTr":
            write(folder / "labelsTr" / f"case{case}{suffix}", label)
    about = {
        "channel_names": {str(n): f"sequence {n}" for n in range(channels)},
        "labels": {"background": 0, "spot": 1},
    }
    (folder / "dataset.json").write_text(json.dumps({**about, "file_ending": suffix}))
    return folder


def write_picture(path, values):
    Image.fromarray(values).save(path)


def write_volume(path, values):
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def train(bundle, **settings):
    train, evaluate, infer = (str(bundle / "configs" / f"{n}.json") for n in ("train", "evaluate", "inference"))
    monai.bundle.run(run_id="training", config_file=train, **QUICK, **settings)
    monai.bundle.run(config_file=[train, evaluate], **QUICK, **settings)
    network_free = {k: v for k, v in settings.items() if "recipe" not in k}
    monai.bundle.run(config_file=infer, **network_free)
    return read_json(bundle / "eval" / "run.json")


def test_pictures_of_two_files_are_learned_and_predicted_with_both(tmp_path, monkeypatch, capsys):
    data = raw_folder(tmp_path / "raw", 2, ".png", write_picture, (48, 64))
    monkeypatch.chdir(tmp_path)
    assert main(["new", "two", "--data", str(data)]) == 0
    assert "channels: sequence 0, sequence 1; teachers see sequence 0" in capsys.readouterr().out
    bundle = tmp_path / "bundles" / "two"
    assert main(["data", "check", "bundles/two"]) == 0
    record = train(bundle)
    assert record["distillation"]["teachers"][0]["channels"] == [0]
    sections = datalist.datalist(bundle / "configs" / "task.json")
    image = sections.test[0]["image"]
    assert [file[-9:] for file in image] == ["_0000.png", "_0001.png"]
    network = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["inputs"]["image"]
    assert network["num_channels"] == 2 and network["channel_def"] == {"0": "sequence 0", "1": "sequence 1"}

    assert main(["export", "bundles/two", "--to", "out", "--formats", "ts,onnx", "--cases", "2"]) == 0
    predict(tmp_path / "out", data / "imagesTs", tmp_path / "masks")
    (mask,) = (tmp_path / "masks").glob("*_mask.png")
    (offline,) = (bundle / "eval" / "masks").glob("*_mask.png")
    answer = np.asarray(Image.open(offline))
    assert (np.asarray(Image.open(mask)) != answer).mean() < 1e-3
    monai.bundle.run(
        config_file=str(tmp_path / "out/configs/inference.json"),
        bundle_root=str(tmp_path / "out"),
        dataset_dir=str(data / "imagesTs"),
        output_dir=str(tmp_path / "plain"),
    )
    (plain,) = (tmp_path / "plain").glob("*.png")
    assert (np.asarray(Image.open(plain)) != answer).mean() < 1e-3, "by MONAI alone"
    assert main(["evaluate", "out", "--data", str(data), "--output", "scores", "--seen", "apart"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    for channel, source in enumerate((1, 0)):
        (other / f"case_{channel:04d}.png").write_bytes((data / "imagesTs" / f"case8_{source:04d}.png").read_bytes())
    predict(tmp_path / "out", other, tmp_path / "swapped")
    assert (np.asarray(Image.open(tmp_path / "swapped" / "case_mask.png")) != answer).any(), "order matters"
    (other / "case_0001.png").unlink()
    with pytest.raises(ValueError, match="case"):
        predict(tmp_path / "out", other, tmp_path / "swapped")
    with pytest.raises(ValueError, match="2 files"):
        ServedStudent(bundle)


def test_volumes_of_two_files_give_slices_of_both(tmp_path, monkeypatch):
    data = raw_folder(tmp_path / "raw", 2, ".nii.gz", write_volume, (40, 44, 20), cases=7)
    monkeypatch.chdir(tmp_path)
    assert main(["new", "mr", "--data", str(data)]) == 0
    bundle = tmp_path / "bundles" / "mr"
    config = read_json(bundle / "configs" / "train.json")
    assert config["network_def"]["in_channels"] == 6
    record = train(bundle, **{"recipe#min_steps": 2, "recipe#batch_size": 4})
    assert record["distillation"]["teachers"][0]["channels"] == [0]
    assert main(["export", "bundles/mr", "--to", "out", "--formats", "onnx", "--cases", "1"]) == 0
    predict(tmp_path / "out", data / "imagesTs", tmp_path / "masks")
    found = np.asarray(nib.load(tmp_path / "masks" / "case6_mask.nii.gz").dataobj)
    (offline,) = (bundle / "eval" / "masks").glob("*_mask.nii.gz")
    answer = np.asarray(nib.load(offline).dataobj)
    assert found.shape == (40, 44, 20) and (found != answer).mean() < 2e-3


def test_samples_hold_every_channel_and_teachers_see_the_chosen_ones(tmp_path):
    rng = np.random.default_rng(1)
    volume = rng.random((2, 4, 8, 8), np.float32)
    item = {"image": str(tmp_path / "v.npy"), "id": "v"}
    np.save(item["image"], volume)

    def load(item):
        return {"image": np.load(item["image"]), "label": np.zeros((1, *volume.shape[1:]))}

    levels = np.round(volume * 255).astype(np.uint8)
    one = DecodedDataset([item], load, tmp_path, teacher_channels=[1])
    expected = np.concatenate([levels[c, [0, 1, 2]] for c in (0, 1)])
    assert np.array_equal(one.image(1), expected) and np.array_equal(one.shown(1), levels[1, [0, 1, 2]])
    assert np.array_equal(
        DecodedDataset([item], load, tmp_path, teacher_channels=[1, 0, 1]).shown(2), levels[[1, 0, 1], 2]
    )
    for wrong in ([], [0, 1], [2]):
        with pytest.raises(ValueError, match="teacher_channels"):
            DecodedDataset([item], load, tmp_path, teacher_channels=wrong)


def test_what_is_wrong_with_channels_is_named_at_once(tmp_path, monkeypatch, capsys):
    data = raw_folder(tmp_path / "raw", 2, ".png", write_picture, (48, 64))
    monkeypatch.chdir(tmp_path)
    assert main(["new", "two", "--data", str(data)]) == 0
    colour = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    write_picture(data / "imagesTr" / "case1_0001.png", colour)
    write_picture(data / "imagesTr" / "case2_0001.png", colour[:40, :, 0])
    (data / "imagesTr" / "case3_0000.png").unlink()
    capsys.readouterr()
    assert main(["data", "check", "bundles/two"]) == 1
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line.startswith("  - ")]
    for name in ("case1_0001.png", "case2_0001.png", "case3_0000"):
        assert sum(name in line for line in lines) == 1, (name, lines)
