"""The figures of docs/gates.md can be made again."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from helpers import ROOT


@pytest.fixture
def figures(monkeypatch):
    spec = importlib.util.spec_from_file_location("gate_figures", ROOT / "docs" / "tools" / "gate_figures.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gate_figures", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for name, value in {"STEPS": 12, "SEEN": 24, "NEW": 16}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_curves_are_measured_and_drawn(figures, tmp_path):
    run = figures.train(0, "reliability", return_code="learned", losses=figures.PRIORS)
    weights = np.stack(run.teachers)
    assert run.steps == [0, 6, 12] and weights.shape == (3, 2, 4) and run.error > 0
    assert weights[:, 0].argmax(1).tolist() == [0] * 3 and weights[:, 1].argmax(1).tolist() == [1] * 3
    assert set(run.factors) == {"task", *figures.LOSSES} and set(run.factors["task"]) == {1.0}
    figures.draw_teachers({"reliability": run, "again": run}).savefig(tmp_path / "a.svg")
    figures.draw_losses({"fixed": run, "again": run}).savefig(tmp_path / "b.svg")
    figures.draw_errors({"no distillation": [0.3, 0.4], "reliability": [run.error]}).savefig(tmp_path / "c.svg")
    assert all((tmp_path / f"{name}.svg").stat().st_size > 1000 for name in "abc")
