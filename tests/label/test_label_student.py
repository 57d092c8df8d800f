"""Every bundle can be opened for serving and answers on the grid of its input; needs no MONAI Label."""

from __future__ import annotations

import math
import shutil

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES
from helpers import ROOT
from monai.bundle import ConfigParser
from own_data import dicom_series
from PIL import Image

from amkd_monai.label.student import ServedStudent, class_uncertainty, mask_uncertainty, series_as_nifti, write_mask
from amkd_monai.weights import CheckpointError


def bundle_with_student(name, folder, seed=0):
    """A copy of a bundle with an untrained student."""
    bundle = folder / name
    shutil.copytree(ROOT / "bundles" / name / "configs", bundle / "configs", dirs_exist_ok=True)
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["network_def#seed"] = seed
    (bundle / "models").mkdir(exist_ok=True)
    torch.save(parser.get_parsed_content("network_def").state_dict(), bundle / "models" / "model.pt")
    return bundle


def picture(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 92, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


def volume(folder):
    voxels = np.random.default_rng(0).random((20, 50, 40), dtype=np.float32)
    affine = np.array([[0, 1.5, 0, 3], [-2.0, 0, 0, 4], [0, 0, 1.2, 5], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / "volume.nii.gz")
    return folder / "volume.nii.gz"


@pytest.mark.parametrize("name", BUNDLES)
def test_every_bundle_answers_on_the_grid_of_its_input(name, tmp_path):
    student = ServedStudent(bundle_with_student(name, tmp_path))
    image = picture(tmp_path) if student.task.dimensions == 2 else volume(tmp_path)
    answer = student.answer(image)
    if student.task.is_classification:
        assert answer.shape == (len(student.task.classes),) and float(answer.sum()) == pytest.approx(1)
    else:
        assert answer.dtype == torch.uint8 and answer.max() < len(student.task.classes)
        assert tuple(answer.shape) == ((60, 92) if student.task.dimensions == 2 else (20, 50, 40))
    assert 0 <= student.uncertainty(image) <= 1


def test_a_series_becomes_a_volume_as_predict_reads_it_or_is_refused(tmp_path, caplog):
    source = nibabel.Nifti1Image(np.random.default_rng(0).integers(0, 900, (7, 9, 5)).astype(np.int16), np.eye(4))
    nibabel.save(source, tmp_path / "v.nii.gz")
    folder = tmp_path / "series"
    dicom_series(folder, tmp_path / "v.nii.gz")
    found = nibabel.as_closest_canonical(nibabel.load(series_as_nifti(str(folder))))
    np.testing.assert_array_equal(found.dataobj, source.dataobj)
    np.testing.assert_allclose(found.affine, source.affine, atol=1e-3)
    shutil.copytree(folder, tmp_path / "gap")
    folder = tmp_path / "gap"
    sorted(folder.iterdir())[2].unlink()
    with pytest.raises(ValueError, match=r"4 slices"):
        series_as_nifti(str(folder))

    class Server:
        """What MONAI Label's datastore of a DICOMweb server does with a downloaded series."""

        def get_image_uri(self, image):
            return series_as_nifti(str(tmp_path / image))

    student = ServedStudent(bundle_with_student("msd_heart", tmp_path))
    assert list(student.suitable(Server(), ["gap", "series"])) == ["series"] and "gap is left out" in caplog.text


def test_masks_are_written_with_the_affine_and_size_of_their_image(tmp_path):
    source, mask = volume(tmp_path), np.zeros((20, 50, 40), np.uint8)
    mask[3, 4, 5] = 1
    written = write_mask(mask, source)
    loaded = nibabel.load(written)
    assert np.array_equal(loaded.get_fdata(), mask) and np.array_equal(loaded.affine, nibabel.load(source).affine)
    assert loaded.get_data_dtype() == np.uint8
    flat = write_mask(mask[3], picture(tmp_path))
    assert np.array_equal(np.asarray(Image.open(flat)), mask[3])
    for file in (written, flat):
        file.unlink()


def test_new_weights_are_used_without_a_restart_and_wrong_ones_refused(tmp_path):
    student, image = ServedStudent(bundle_with_student("isic2017", tmp_path)), picture(tmp_path)
    first, identity = student.answer(image), student.identity()
    bundle_with_student("isic2017", tmp_path, seed=1)
    assert student.identity() != identity and not torch.equal(student.answer(image), first)
    shutil.copy(bundle_with_student("busi", tmp_path) / "models" / "model.pt", student.model)
    with pytest.raises(CheckpointError, match="does not fit"):
        student.answer(image)


def test_a_sure_mask_has_none_and_an_empty_one_has_most():
    sure = torch.zeros(2, 4, 5)
    sure[1, :2], sure[0, 2:] = 1, 1
    assert mask_uncertainty(sure) == pytest.approx(0)
    assert mask_uncertainty(torch.stack([torch.ones(4, 5), torch.zeros(4, 5)])) == pytest.approx(1)
    assert mask_uncertainty(torch.cat([sure, torch.zeros(1, 4, 5)])) == pytest.approx(0)  # a class that is not there


@pytest.mark.parametrize("shape", [(3, 6, 7), (2, 3, 6, 7)])
def test_the_mean_over_classes_equals_a_loop_over_pixels(shape):
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0)).softmax(0)
    flat = probabilities.flatten(1).T.tolist()
    values = []
    for index in range(1, shape[0]):
        own = [p[index] for p in flat]
        mask = [float(p.index(max(p)) == index) for p in flat]
        values.append(1 - 2 * sum(a * b for a, b in zip(own, mask, strict=True)) / (sum(own) + sum(mask)))
    assert mask_uncertainty(probabilities) == pytest.approx(sum(values) / len(values))


def test_doubt_at_the_edge_counts():
    steep, soft = (torch.linspace(-4, 4, 20).mul(s).sigmoid().expand(5, 20) for s in (4, 1))
    assert mask_uncertainty(torch.stack([1 - steep, steep])) < mask_uncertainty(torch.stack([1 - soft, soft]))


def test_entropy_of_classes_is_a_part_of_the_largest():
    assert class_uncertainty(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert class_uncertainty(torch.full((4,), 0.25)) == pytest.approx(1)
    p = [0.5, 0.3, 0.2]
    both = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    assert class_uncertainty(both) == pytest.approx(0.5), "the mean of two findings"
    assert class_uncertainty(torch.tensor(p)) == pytest.approx(-sum(v * math.log(v) for v in p) / math.log(3))
