"""The notebook runs from its first cell to its last, on generated images."""

import json
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import ROOT

SHORTER = {
    '"max_epochs": 20': '"max_epochs": 4',
    '"val_interval": 10': '"val_interval": 4',
    '"images": 192': '"images": 48',
}
"""What changes in the notebook's settings: the same cells in a third of the time."""


CELLS = json.loads((ROOT / "docs" / "first_student.ipynb").read_text())["cells"]


def test_the_first_cell_finds_a_copy_of_the_repository(tmp_path, monkeypatch):
    first = next("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(FileNotFoundError, match=r"amkd_monai\.zip"):
        exec(first, {})
    copy = tmp_path / "packed" / "amkd_monai-1"
    (copy / "bundles" / "kvasir_seg").mkdir(parents=True)
    (copy / "bundles" / "kvasir_seg" / "LICENSE").touch()
    shutil.make_archive(str(tmp_path / "amkd_monai"), "zip", tmp_path / "packed")
    shutil.rmtree(tmp_path / "packed")
    exec(first, {})
    assert Path.cwd() == tmp_path / "amkd_monai-1" and sys.path[0] == str(Path.cwd())
    monkeypatch.chdir("bundles")
    exec(first, {})
    assert Path.cwd() == tmp_path / "amkd_monai-1", "Jupyter in a folder of the repository"


@pytest.mark.slow
def test_the_notebook_goes_from_data_to_an_exported_student(tmp_path, monkeypatch):
    assert not any(cell.get("outputs") for cell in CELLS), "outputs do not belong into the repository"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMKD_NOTEBOOK", str(tmp_path))
    matplotlib.use("Agg")
    names: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            if '"max_epochs"' in text:
                assert all(text.count(setting) == 1 for setting in SHORTER)
                for setting, short in SHORTER.items():
                    text = text.replace(setting, short)
            exec(compile(text, "first_student.ipynb", "exec"), names)
    assert names["teacher"]["name"] == "crew" and names["metrics"]["summary"]["cases"] == 16
    for image, mask in zip(names["images"], names["predicted"], strict=True):
        assert mask.shape == image.shape[:2] and set(np.unique(mask)) <= {0, 1}
    assert (tmp_path / "student" / "models" / "model.onnx").is_file()
