"""Images of several files: what of them is read, learned, shown to teachers, and predicted again after the export."""

from __future__ import annotations

import gzip
import json
import shutil

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
from bundle_runs import read_json
from fastapi import HTTPException, UploadFile
from helpers import shared_data
from monai.bundle import ConfigParser
from own_data import dicom_series
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data import datalist
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.export.predict import Predictor, predict
from amkd_monai.export.serve import application
from amkd_monai.files.cases import read_case
from amkd_monai.label.student import ServedStudent

STEPS = (slice(None, None, 3), slice(None, None, 3), slice(None, None, 4))
QUICK = {
    "max_epochs": 1,
    "recipe#min_steps": 1,
    "teachers": [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}],
}
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
    monai.bundle.run(run_id="training", config_file=train, **{**QUICK, **settings})
    monai.bundle.run(config_file=[train, evaluate], **{**QUICK, **settings})
    network_free = {k: v for k, v in settings.items() if "recipe" not in k and k != "unlabelled"}
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
    predict(Predictor(tmp_path / "out"), data / "imagesTs", tmp_path / "masks")
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
    predict(Predictor(tmp_path / "out"), other, tmp_path / "swapped")
    assert (np.asarray(Image.open(tmp_path / "swapped" / "case_mask.png")) != answer).any(), "order matters"
    (other / "case_0001.png").unlink()
    with pytest.raises(ValueError, match="case"):
        predict(Predictor(tmp_path / "out"), other, tmp_path / "swapped")
    with pytest.raises(ValueError, match="2 files"):
        ServedStudent(bundle)


def test_volumes_of_four_axes_give_slices_of_each_channel(tmp_path, monkeypatch, capsys):
    """The decathlon's layout; the same cases as two files each are the same to the student."""
    files = raw_folder(tmp_path / "raw", 2, ".nii.gz", write_volume, (40, 44, 20), cases=7)
    data = tmp_path / "Task99"
    for kind in ("imagesTr", "imagesTs"):
        (data / kind).mkdir(parents=True)
        for first in sorted((files / kind).glob("*_0000.nii.gz")):
            pair = [nib.load(file).get_fdata() for file in (first, str(first).replace("_0000", "_0001"))]
            write_volume(data / kind / first.name.replace("_0000", ""), np.stack(pair, -1).astype(np.uint8))
    (data / "labelsTr").symlink_to(files / "labelsTr")
    entries = [{"image": f"./imagesTr/case{n}.nii.gz", "label": f"./labelsTr/case{n}.nii.gz"} for n in range(6)]
    about = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "spot"}, "training": entries}
    (data / "dataset.json").write_text(json.dumps({**about, "test": ["./imagesTs/case6.nii.gz"]}))
    monkeypatch.chdir(tmp_path)
    assert main(["new", "mr", "--data", str(data)]) == 0
    assert "channels: T2, ADC; teachers see T2" in capsys.readouterr().out
    assert main(["data", "check", "bundles/mr"]) == 0
    bundle = tmp_path / "bundles" / "mr"
    config = read_json(bundle / "configs" / "train.json")
    assert config["network_def"]["in_channels"] == 6
    record = train(bundle, unlabelled=[str(data / "imagesTs")], **{"recipe#min_steps": 2, "recipe#batch_size": 4})
    assert record["distillation"]["teachers"][0]["channels"] == [0] and record["unlabelled"]["images"] == 1
    assert main(["export", "bundles/mr", "--to", "out", "--formats", "ts,onnx", "--cases", "1"]) == 0
    (offline,) = (bundle / "eval" / "masks").glob("*_mask.nii.gz")
    answer = np.asarray(nib.load(offline).dataobj)
    (turned := tmp_path / "turned").mkdir()
    for file in (files / "imagesTs").iterdir():
        image = nib.load(file)
        axes = nib.orientations.axcodes2ornt(("A", "I", "R"))
        nib.save(
            image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), axes)),
            turned / file.name,
        )
    for number, images in enumerate((files / "imagesTs", data / "imagesTs", turned)):
        predict(Predictor(tmp_path / "out"), images, tmp_path / f"masks{number}")
        plain = {"bundle_root": str(tmp_path / "out"), "output_dir": str(tmp_path / f"plain{number}")}
        monai.bundle.run(config_file=str(tmp_path / "out/configs/inference.json"), dataset_dir=str(images), **plain)
        for masks in (f"masks{number}", f"plain{number}"):
            (mask,) = (tmp_path / masks).rglob("*_mask.nii.gz")
            found = np.asarray(nib.as_closest_canonical(nib.load(mask)).dataobj)
            assert found.shape == (40, 44, 20) and (found != answer).mean() < 2e-3, mask
    assert main(["evaluate", "out", "--data", str(data), "--output", "scores", "--seen", "apart"]) == 0

    served = application(Predictor(tmp_path / "out", threads=1), 3_000_000, ("*",))
    (asked,) = (route.endpoint for route in served.routes if route.path == "/predict")
    response = asked([UploadFile((data / "imagesTs" / "case6.nii.gz").open("rb"))])
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(response.body))
    assert (np.asarray(mask.dataobj) != answer).mean() < 2e-3
    with pytest.raises(HTTPException, match="1 channel"):
        asked([UploadFile((files / "imagesTs" / "case6_0000.nii.gz").open("rb"))])

    three = np.zeros((40, 44, 20, 3), np.uint8)
    write_volume(data / "imagesTr" / "case2.nii.gz", three)
    write_volume(tmp_path / "three.nii.gz", three)
    capsys.readouterr()
    assert main(["data", "check", "bundles/mr"]) == 1
    assert "case2.nii.gz gives 3 channel(s), not 2" in capsys.readouterr().out
    assert predict(Predictor(tmp_path / "out"), tmp_path / "three.nii.gz", tmp_path / "refused") == 1
    with pytest.raises(ValueError, match="3 channel"):
        read_case([tmp_path / "three.nii.gz"], 2)
    with pytest.raises(ValueError, match="3 axes"):
        read_case([tmp_path / "three.nii.gz", data / "imagesTr" / "case1.nii.gz"])


def test_series_of_dicom_are_trained_on_like_the_volumes_they_are(tmp_path, monkeypatch, capsys):
    source = shared_data("MSD-Heart", "Task02_Heart_half")
    names, folders = sorted(p.name for p in (source / "labelsTr").glob("la_*.gz"))[:6], {}
    for kind in ("dicom", "nifti"):
        folders[kind] = tmp_path / kind
        (folders[kind] / "masks").mkdir(parents=True)
        (folders[kind] / "images").mkdir()
        for number, name in enumerate(names):
            case, image = f"1.2.{number}", tmp_path / f"{number}.nii.gz"
            nib.save(nib.load(source / "labelsTr" / name).slicer[STEPS], folders[kind] / "masks" / f"{case}.nii.gz")
            nib.save(nib.load(source / "imagesTr" / name).slicer[STEPS], image)
            if kind == "nifti":
                image.rename(folders[kind] / "images" / f"{case}.nii.gz")
            else:
                dicom_series(folders[kind] / "images" / case, image)
    monkeypatch.chdir(tmp_path)
    decoded = {}
    for kind, folder in folders.items():
        assert main(["new", kind, "--data", str(folder)]) == 0
        parser = ConfigParser()
        parser.read_config(str(tmp_path / "bundles" / kind / "configs" / "train.json"))
        parser["bundle_root"] = str(tmp_path / "bundles" / kind)
        decoded[kind] = parser.get_parsed_content("train#dataset")
    assert decoded["dicom"].ids == decoded["nifti"].ids and decoded["dicom"].cases[0].startswith("1.2.")
    assert np.array_equal(decoded["dicom"].labels, decoded["nifti"].labels) and decoded["dicom"].labels.any()
    assert np.abs(decoded["dicom"].images.astype(int) - decoded["nifti"].images).max() <= 1
    assert main(["data", "check", "bundles/dicom"]) == 0
    bundle, quick = tmp_path / "bundles" / "dicom", {"max_epochs": 1, "teachers": [], "recipe#min_steps": 1}
    train, evaluate, infer = (str(bundle / "configs" / f"{n}.json") for n in ("train", "evaluate", "inference"))
    monai.bundle.run(run_id="training", config_file=train, **quick)
    monai.bundle.run(config_file=[train, evaluate], **quick)
    assert read_json(bundle / "eval" / "metrics.json")["summary"]["cases"] == 1
    monai.bundle.run(config_file=infer, dataset_dir=str(folders["dicom"] / "images"))
    for case in ("1.2.0", "1.2.5"):
        mask, image = nib.load(bundle / "eval" / "masks" / f"{case}_mask.nii.gz"), folders["nifti"] / "images" / case
        axes = nib.aff2axcodes(nib.load(f"{image}.nii.gz").affine)
        turned = mask.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(mask.affine), nib.orientations.axcodes2ornt(axes))
        )
        assert np.allclose(turned.affine, nib.load(f"{image}.nii.gz").affine, atol=1e-3)

    images = folders["dicom"] / "images"
    next((images / "1.2.1").iterdir()).unlink()
    for file in (images / "1.2.3").iterdir():
        shutil.copy(file, images / "1.2.2" / f"other_{file.name}")
    other = nib.load(folders["nifti"] / "masks" / "1.2.4.nii.gz")
    nib.save(other.slicer[:, :, :-1], folders["dicom"] / "masks" / "1.2.4.nii.gz")
    (images / "1.2.9").mkdir()
    shutil.copy(next((images / "1.2.3").iterdir()), images / "1.2.9" / "a.dcm")
    capsys.readouterr()
    assert main(["data", "check", "bundles/dicom"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
    for case in ("1.2.1", "1.2.2", "1.2.4", "1.2.9"):
        assert sum(case in line for line in said) == 1, (case, said)
    assert main(["new", "again", "--data", str(folders["dicom"])]) == 0
    assert "4 of them cannot be used" in capsys.readouterr().out


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
