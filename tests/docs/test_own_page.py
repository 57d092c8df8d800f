"""What docs/own.md tells to write works: a data set and a student of one's own, in a bundle's training."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from bundle_runs import read_json, run, settings
from doc_blocks import blocks
from helpers import ROOT
from PIL import Image

from amkd_monai.data import datalist
from amkd_monai.data.datasets import TASKS

PAGE = ROOT / "docs" / "own.md"


def module(name, text):
    made = ModuleType(name)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Pictures of bright squares, three of each patient, and the page's task in its place."""
    monkeypatch.setitem(sys.modules, "cells", ModuleType("cells"))  # dataclasses look their module up
    monkeypatch.setitem(TASKS, "cells", module("cells", blocks(PAGE, "python")[0]).task)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for patient in range(8):
        for number in range(3):
            mask = np.zeros((48, 64), np.uint8)
            top, left = rng.integers(0, 24, 2)
            mask[top : top + 20, left : left + 20] = 255
            noise = rng.integers(0, 90, (48, 64, 3))
            name = f"p{patient}_{number}.png"
            Image.fromarray((noise + 0.6 * mask[..., None]).astype(np.uint8)).save(tmp_path / "data" / "images" / name)
            Image.fromarray(mask).save(tmp_path / "data" / "masks" / name)
    return tmp_path / "data"


def test_a_patient_of_the_seventh_data_set_stays_in_one_section(cells):
    found = datalist.datalist("cells", cells)
    sections = [{item["id"].split("_")[0] for item in s} for s in (found.train, found.validation, found.test)]
    assert all(sections) and sum(map(len, sections)) == 8


def test_the_seventh_data_set_teaches_a_student_of_ones_own(cells, tmp_path, monkeypatch):
    student = module("my_student", blocks(PAGE, "python")[1])
    monkeypatch.setitem(sys.modules, "my_student", student)
    (overrides,) = map(json.loads, blocks(PAGE, "json"))
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", task="cells", dataset_dir=str(cells), **overrides)
    values |= {"max_epochs": 3, "admission": {"mode": "all"}}
    ended = run("kvasir_seg", ("train",), values)
    assert type(ended.parser.get_parsed_content("network")).__name__ == "MyStudent"
    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and record["data"]["task"] == "cells" and not record["data"]["phantom"]
    assert len(record["distillation"]["teachers"]) == 2
    metrics = run("kvasir_seg", ("train", "evaluate"), values) and read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["summary"]["metrics"]["dice"]["mean"] > 0.3
