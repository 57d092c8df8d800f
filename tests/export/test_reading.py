"""The bundle, its export and the label server give one mask for one image, however its file is stored."""

from __future__ import annotations

import csv
import math

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import run, settings
from helpers import ROOT
from monai.bundle import ConfigWorkflow
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data.decoded import BadSampleError
from amkd_monai.files.pictures import UNDONE, turned
from amkd_monai.label.student import ServedStudent

HEART = {"spacing": [2.5, 5.0, 5.0], "volume_size": [16, 64, 32]}


def by_exported_bundle(dist, images, output):
    workflow = ConfigWorkflow(
        workflow_type="infer",
        config_file=str(dist / "configs" / "inference.json"),
        meta_file=str(dist / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(dist),
        dataset_dir=str(images),
        output_dir=str(output),
    )
    workflow.initialize()
    workflow.run()


def by_bundle(bundle, folder, images, output, **more):
    values = settings(bundle, folder, folder / "cache", dataset_dir=str(images), **more)
    run(bundle, ("inference",), {**values, "output_dir": str(output)})


def reordered(image, axes):
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))


def volumes(image):
    """The same volume in other array orders, units and headers, by name."""
    array, affine = np.asanyarray(image.dataobj), image.affine
    c, s = math.cos(0.2), math.sin(0.2)
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    metres = nib.Nifti1Image(array, np.diag([0.001, 0.001, 0.001, 1]) @ affine)
    metres.header.set_xyzt_units("meter")
    mirrored = affine.copy()
    mirrored[0, 0] *= -1
    differs = nib.Nifti1Image(array, affine)
    differs.set_sform(affine, 1)
    differs.set_qform(mirrored, 1)
    return {
        **{axes: reordered(image, axes) for axes in ("RAS", "LPS", "LAS", "PIR", "ASL", "SPL", "SRA", "IPL")},
        "four_axes": nib.Nifti1Image(array[..., None], affine),
        "oblique": nib.Nifti1Image(array, turn @ affine),
        "metres": metres,
        "differs": differs,
    }


def test_a_volume_has_one_mask_in_every_order_and_everywhere(exported, tmp_path, monkeypatch, caplog):
    folder, _ = exported("msd_heart")
    image = nib.load(sorted((folder / "cache" / "phantoms").rglob("imagesTr/la_*.nii.gz"))[0])
    images = tmp_path / "images"
    images.mkdir()
    for name, volume in volumes(image).items():
        nib.save(volume, images / f"{name}.nii.gz")
    dist = folder / "dist" / "msd_heart"
    assert main(["predict", "--model", str(dist), str(images), "--output", str(tmp_path / "predict")]) == 0
    by_bundle("msd_heart", folder, images, tmp_path / "bundle", **HEART)
    by_exported_bundle(dist, images, tmp_path / "exported")
    served = ServedStudent.__new__(ServedStudent)
    monkeypatch.setattr("amkd_monai.label.student.ConfigParser", _parser_of(folder, **HEART))
    served.__init__(ROOT / "bundles" / "msd_heart")
    served.model = folder / "models" / "model.pt"
    expected = seen = None
    for name in volumes(image):
        source = nib.load(images / f"{name}.nii.gz")
        for where in ("predict", "bundle", "exported"):
            mask = nib.load(tmp_path / where / f"{name}_mask.nii.gz")
            assert mask.shape == source.shape[:3]
            if not (where == "exported" and name == "metres"):  # MONAI writes millimetres
                np.testing.assert_allclose(mask.affine, source.affine, atol=1e-4)
            found = np.asanyarray(nib.as_closest_canonical(mask).dataobj)
            expected = found if expected is None else expected
            np.testing.assert_array_equal(found, expected, err_msg=f"{where} {name}")
        overlay = np.asarray(Image.open(tmp_path / "predict" / f"{name}_overlay.png"))
        seen = overlay if seen is None else seen
        np.testing.assert_array_equal(overlay, seen, err_msg=name)
        answer = nib.Nifti1Image(served.answer(images / f"{name}.nii.gz").numpy(), source.affine)
        np.testing.assert_array_equal(nib.as_closest_canonical(answer).dataobj, expected, err_msg=f"server {name}")
    assert 0 < expected.mean() < 0.9
    wide = nib.Nifti1Image(np.pad(np.asanyarray(image.dataobj), ((40, 40),) * 3, mode="reflect"), image.affine)
    nib.save(wide, tmp_path / "wide.nii.gz")
    nib.save(reordered(image, "RAS").slicer[: 3 * expected.shape[0] // 4], tmp_path / "narrow.nii.gz")
    for source, is_cut in ((tmp_path / "narrow.nii.gz", False), (tmp_path / "wide.nii.gz", True)):
        caplog.clear()
        assert main(["predict", "--model", str(dist), str(source), "--output", str(tmp_path / "cut")]) == 0
        served.answer(source)
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and str(source) in r.getMessage()]
        assert len(said) == 2 * is_cut and all("student sees" in words for words in said)
    (tmp_path / "series").mkdir()
    with pytest.raises((AssertionError, RuntimeError), match="holds no"):
        by_exported_bundle(dist, tmp_path / "series", tmp_path / "none")


def _parser_of(folder, **changes):
    from monai.bundle import ConfigParser

    class Parser(ConfigParser):
        """A parser in which a config has the settings that the student was trained with."""

        def read_config(self, *arguments, **options):
            super().read_config(*arguments, **options)
            for key, value in {**changes, "ckpt_dir": str(folder / "models")}.items():
                self[key] = value

    return Parser


def test_an_evaluation_does_not_depend_on_the_order_of_the_files(exported, tmp_path):
    folder, _ = exported("msd_heart")
    data = next((folder / "cache" / "phantoms").rglob("dataset.json")).parent
    other = tmp_path / "other" / data.name
    orders = iter(["LPS", "PIR", "ASL", "SRA", "IPL", "LAS", "SPL", "RPI"] * 9)
    for file in sorted(data.rglob("*")):
        target = other / file.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name.endswith(".nii.gz") and not file.name.startswith("."):
            nib.save(reordered(nib.load(file), next(orders)), target)  # image and label in different orders
        elif file.is_file():
            target.write_bytes(file.read_bytes())
    for name, root in (("before", data), ("after", other)):
        values = settings("msd_heart", folder, folder / "cache", teachers=[], **HEART)
        values |= {"output_dir": str(tmp_path / name)}
        values |= {"other_data": str(root), "seen": "apart"} if name == "after" else {"dataset_dir": str(root)}
        run("msd_heart", ("train", "evaluate"), values)
    rows = [list(csv.DictReader((tmp_path / name / "per_case.csv").open())) for name in ("before", "after")]
    assert len(rows[0]) == len(rows[1]) > 0
    for before, after in zip(*rows, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            same = value == after[key] or float(value) == pytest.approx(float(after[key]), rel=1e-4)
            assert same, (key, value, after[key])


def pictures(picture):
    """The same picture (H, W, 3) stored in other ways, by file name, and how far its levels may be off."""
    grey = picture.mean(2).astype(np.uint8)
    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[:, :7] = 0
    stored = {
        "plain.png": Image.fromarray(picture),
        "alpha.png": Image.fromarray(np.dstack([picture, alpha])),
        "palette.png": Image.fromarray(picture).quantize(128),
        "grey8.png": Image.fromarray(grey),
        "grey16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "grey12.png": Image.fromarray(grey.astype(np.uint16) * 16),
        "shares.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "levels.tif": Image.fromarray(grey.astype(np.float32)),
    }
    for tag in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        image = Image.fromarray(np.ascontiguousarray(turned(picture, UNDONE[tag])))
        image.info["exif"] = exif.tobytes()
        stored[f"exif{tag}.png"] = image
    return stored


def test_a_picture_has_one_mask_in_every_mode_and_everywhere(exported, tmp_path):
    folder, _ = exported("kvasir_seg")
    source = sorted((folder / "cache" / "phantoms").rglob("images/*.jpg"))[0]
    picture = np.asarray(Image.open(source).convert("RGB"))
    images = tmp_path / "images"
    images.mkdir()
    for name, image in pictures(picture).items():
        image.save(images / name, **({"exif": image.info["exif"]} if "exif" in image.info else {}))
    for name in ("lone_mask.png", "plain_mask_1.png", "a.b.png", "a.b_segmentation.png"):
        Image.fromarray(picture).save(images / name)
    dist = folder / "dist" / "kvasir_seg"
    assert main(["predict", "--model", str(dist), str(images), "--output", str(tmp_path / "predict")]) == 0
    by_bundle("kvasir_seg", folder, images, tmp_path / "bundle")
    by_exported_bundle(dist, images, tmp_path / "exported")
    for where in ("predict", "bundle", "exported"):
        written = {file.name for file in (tmp_path / where).glob("*_mask.png")}
        named = {name.split(".")[0] for name in pictures(picture)} | {"lone_mask", "a.b"}
        assert written == {f"{name}_mask.png" for name in named}, where
    masks = {}
    for name in pictures(picture):
        stem = name.split(".")[0]
        found = [np.asarray(Image.open(tmp_path / w / f"{stem}_mask.png")) for w in ("predict", "bundle", "exported")]
        for other in found[1:]:
            assert other.shape == found[0].shape == picture.shape[:2], name
            assert (other == found[0]).mean() >= 0.999, name
        masks[stem] = found[0]
    for tag in range(2, 9):
        np.testing.assert_array_equal(masks[f"exif{tag}"], masks["plain"])
    for same in ("grey16", "grey12", "shares", "levels"):
        assert (masks[same] == masks["grey8"]).mean() >= 0.999, same
    again = tmp_path / "predict"  # what was written is no image
    assert main(["predict", "--model", str(dist), str(again), "--output", str(tmp_path / "again")]) == 1
    own = tmp_path / "own"  # what was not written by a prediction is kept
    own.mkdir()
    for name in ("x.png", "x_mask.png"):
        Image.fromarray(picture).save(own / name)
    reference = (own / "x_mask.png").read_bytes()
    assert main(["predict", "--model", str(dist), str(own), "--output", str(own)]) == 1
    assert (own / "x_mask.png").read_bytes() == reference


def test_one_odd_file_ends_neither_prediction_nor_inference(exported, tmp_path, capsys):
    folder, _ = exported("msd_heart")
    image = nib.load(sorted((folder / "cache" / "phantoms").rglob("imagesTr/la_*.nii.gz"))[0])
    array, images = np.asanyarray(image.dataobj), tmp_path / "images"
    images.mkdir()
    odd = {
        "a_complex": nib.Nifti1Image(array.astype(np.complex64), image.affine),
        "m_kilometres": nib.Nifti1Image(array, np.diag([1e6, 1e6, 1e6, 1]) @ image.affine),
        "z_constant": nib.Nifti1Image(np.full_like(array, 7), image.affine),
    }
    for name, volume in {**odd, "good": image, "x_good": reordered(image, "LPS")}.items():
        nib.save(volume, images / f"{name}.nii.gz")
    dist = folder / "dist" / "msd_heart"
    assert main(["predict", "--model", str(dist), str(images), "--output", str(tmp_path / "predict")]) == 1
    said = capsys.readouterr()
    assert "2 of 5 predicted" in said.out and all(name in said.err for name in odd)
    with pytest.raises(Exception) as caught:
        by_bundle("msd_heart", folder, images, tmp_path / "stop", **HEART)
    chain = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert any(isinstance(error, BadSampleError) and "3 of 5" in str(error) for error in chain)
    by_bundle("msd_heart", folder, images, tmp_path / "skip", on_bad_sample="skip", **HEART)
    for where in ("predict", "stop", "skip"):
        names = sorted(path.name for path in (tmp_path / where).glob("*_mask.nii.gz"))
        assert names == ["good_mask.nii.gz", "x_good_mask.nii.gz"], where
