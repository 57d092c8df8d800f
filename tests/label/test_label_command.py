"""Wrong arguments of `label` are told in one sentence, before anything is imported or written."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
from helpers import ROOT
from own_data import dicom_picture, dicom_series

from amkd_monai.__main__ import main


@pytest.fixture
def bundle(tmp_path):
    """A bundle that looks trained."""
    folder = tmp_path / "busi"
    shutil.copytree(ROOT / "bundles" / "busi" / "configs", folder / "configs")
    (folder / "models").mkdir()
    (folder / "models" / "model.pt").write_bytes(b"weights")
    return folder


def refusal(capsys, *arguments):
    assert main(["label", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_unknown_bundles_and_untrained_ones_are_named(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    error = refusal(capsys, "--bundles", "liver", "--studies", tmp_path)
    assert "'liver'" in error and "kvasir_seg" in error
    (bundle / "models" / "model.pt").unlink()
    assert "models/model.pt" in refusal(capsys, "--bundles", bundle, "--studies", tmp_path)
    (bundle / "configs" / "train.json").unlink()
    assert "lacks configs/train.json" in refusal(capsys, "--bundles", bundle, "--studies", tmp_path)


def test_missing_studies_and_repeated_names_are_named(bundle, tmp_path, capsys):
    assert "nowhere" in refusal(capsys, "--bundles", bundle, "--studies", tmp_path / "nowhere")
    assert "Two bundles" in refusal(capsys, "--bundles", bundle, bundle, "--studies", tmp_path)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4)), tmp_path / "volume.nii.gz")
    dicom_series(tmp_path / "studies" / "series", tmp_path / "volume.nii.gz")
    for studies in (tmp_path / "studies", tmp_path / "studies" / "series"):
        assert "DICOMweb" in refusal(capsys, "--bundles", bundle, "--studies", studies)
    (tmp_path / "pictures").mkdir()
    picture = dicom_picture(tmp_path / "pictures" / "a.dcm", np.zeros((8, 8), np.uint8))
    picture.rename(tmp_path / "pictures" / "a")
    assert "pictures/a is DICOM" in refusal(capsys, "--bundles", bundle, "--studies", tmp_path / "pictures")


def test_without_monai_label_the_remedy_is_named_and_nothing_is_written(bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    work = tmp_path / "work"
    assert "make label-env" in refusal(capsys, "--bundles", bundle, "--studies", tmp_path, "--work", work)
    assert not work.exists()


def test_a_working_copy_keeps_what_was_trained_in_it(bundle, tmp_path, caplog):
    from amkd_monai.label.server import find_bundles, prepare

    work = tmp_path / "work"
    prepare(find_bundles([str(bundle)]), work)
    copy = work / "model" / "busi" / "models" / "model.pt"
    assert copy.read_bytes() == b"weights"
    copy.write_bytes(b"fine-tuned")
    prepare(find_bundles([str(bundle)]), work)
    assert copy.read_bytes() == b"fine-tuned" and not caplog.records
    (bundle / "models" / "model.pt").write_bytes(b"other weights")
    prepare(find_bundles([str(bundle)]), work)
    assert copy.read_bytes() == b"fine-tuned" and "new student" in caplog.text
