"""What docs/teachers.md shows works as it stands."""

import json
import re

import pytest
import timm
import torch
from bundle_runs import read_json, run, settings
from helpers import ROOT
from monai.networks.nets import DenseNet121

from amkd_monai.teachers.base import build_teacher
from amkd_monai.teachers.catalogue import CATALOGUE
from amkd_monai.teachers.retfound import VARIANTS

PAGE = (ROOT / "docs" / "teachers.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_teachers_of_ones_own_take_few_lines_and_teach(tmp_path, monkeypatch):
    (module,) = blocks("python")
    assert len(module.splitlines()) < 30
    (tmp_path / "my_teachers.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    networks = {"convnext": timm.create_model("convnext_tiny"), "densenet": DenseNet121(2, 3, 2)}
    teachers = [d for d in map(json.loads, blocks("json")) if d.get("name") in networks]
    assert len(teachers) == 2
    for description in teachers:
        description["weights"] = str(tmp_path / f"{description['name']}.pth")
        torch.save(networks[description["name"]].state_dict(), description["weights"])
        description["image_size"] = 64
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", teachers=teachers, admission={"mode": "all"})
    run("kvasir_seg", ("train",), {**values, "max_epochs": 1})
    recorded = read_json(tmp_path / "eval" / "run.json")["distillation"]["teachers"]
    assert [t["name"] for t in recorded] == ["convnext", "densenet"]
    assert all(t["outputs_admitted"] and t["weights"]["sha256"] and not t["random_weights"] for t in recorded)


def test_medical_encoders_of_timm_are_built_as_shown():
    """On the meta device: names, options, and the number of tensors that holders of the official files report."""
    (shown,) = (d["teachers"] for d in map(json.loads, blocks("json")) if "model_args" in str(d))
    files = [file for entry in CATALOGUE if entry.kind == "timm" and not entry.distribution for file in entry.files]
    with torch.device("meta"):
        built = {d["name"]: build_teacher({**d, "weights": "random"}) for d in shown}
    assert sorted(d["weights"].removeprefix("weights/") for d in shown) == sorted(files)
    assert {e.licence for e in CATALOGUE if set(e.files) & set(files)} == {d["licence"] for d in shown}
    assert len(built["panderm"].network.state_dict()) == 186
    assert built["retfound_green"].network.pos_embed.shape == (1, 28 * 28, 384)
    assert built["ultrasam"].image_size == 1024 and built["dinov3"].image_size == 256


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.key], ids=lambda e: e.key)
def test_the_page_names_every_file_and_licence(entry):
    short = entry.files[0].replace("RETFound_mae", "").replace("RETFound_dinov2", "_dinov2").removesuffix(".pth")
    assert entry.files[0].removesuffix(".pth") in PAGE or short in PAGE
    assert entry.licence in PAGE


def test_every_variant_can_be_had():
    assert {f"retfound_{variant}" for variant in VARIANTS} == {e.key for e in CATALOGUE if e.kind == "retfound"}
