"""The notebook runs from its first cell to its last, on generated images."""

import json

import matplotlib
import numpy as np
import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


def test_the_notebook_goes_from_data_to_an_exported_student(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "first_student.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs do not belong into the repository"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMKD_NOTEBOOK", str(tmp_path))
    matplotlib.use("Agg")
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "first_student.ipynb", "exec"), names)
    assert names["teacher"]["name"] == "crew" and names["metrics"]["summary"]["cases"] == 16
    for image, mask in zip(names["images"], names["predicted"], strict=True):
        assert mask.shape == image.shape[:2] and set(np.unique(mask)) <= {0, 1}
    assert (tmp_path / "student" / "models" / "model.onnx").is_file()
