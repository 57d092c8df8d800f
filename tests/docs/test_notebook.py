"""The notebook runs from its first cell to its last, on generated images."""

import json

import matplotlib
import numpy as np
import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow
SHORTER = {
    '"max_epochs": 20': '"max_epochs": 4',
    '"val_interval": 10': '"val_interval": 4',
    '"images": 192': '"images": 48',
}
"""What changes in the notebook's settings: the same cells in a third of the time."""


def test_the_notebook_goes_from_data_to_an_exported_student(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "docs" / "first_student.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs do not belong into the repository"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AMKD_NOTEBOOK", str(tmp_path))
    matplotlib.use("Agg")
    names: dict = {}
    for cell in cells:
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
