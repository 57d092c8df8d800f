"""Heterogeneous foundation teachers, in tiny variants of their own classes, teach one student end to end."""

from __future__ import annotations

import csv
import re
import shutil

import pytest
import torch
from bundle_runs import SHARED, read_json, run, settings
from helpers import ROOT
from teachers.tiny_teachers import OFFICIAL, TINY, official_state, tiny_tasks, write_official

from amkd_monai.data.datasets import TASKS
from amkd_monai.engines.prepare import format_bundle
from amkd_monai.errors import root_cause


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the four official files, found by their names."""
    return write_official(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("bundle", ["busi", "aptos2019", SHARED])  # the shared one has all six data sets
def test_whoever_copies_four_files_is_taught_by_all_four(bundle, tmp_path, weights, cache, monkeypatch):
    """The commands of docs/teachers.md, with tiny networks: each data set gets the options that are right for it."""
    lines = re.search(
        r"## [^\n]*all four foundation.*?```bash\n(.*?)```", (ROOT / "docs" / "teachers.md").read_text(), re.DOTALL
    )[1]
    assert len(lines.splitlines()) <= 10 and all(file in lines for file in OFFICIAL.values())
    headline = "python -m monai.bundle run training --config_file bundles/busi/configs/train.json"
    assert headline in lines.splitlines()
    tiny_tasks(monkeypatch)
    monkeypatch.setenv("AMKD_WEIGHTS", str(weights))
    place = cache if bundle == SHARED else cache / bundle  # where the shared one finds what single ones computed
    values = settings(bundle, tmp_path, place, admission={"mode": "all"}, teachers="auto")
    values |= {"steps_per_epoch": 2} if bundle == SHARED else {}
    run(bundle, ("train",), {**values, "max_epochs": 1})

    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and not record["is_test"]
    for name, facts in record["tasks"].items() if bundle == SHARED else [(bundle, record)]:
        assert facts["teachers"]["asked"] == "auto"
        chosen = {t["name"]: t for t in facts["teachers"]["chosen"]}
        assert {n: t["file"] for n, t in chosen.items()} == OFFICIAL
        recorded = {t["name"]: t for t in facts["distillation"]["teachers"]}
        assert set(recorded) == set(OFFICIAL) and all(t["features_admitted"] for t in recorded.values())
        task = TASKS[name]
        own = set() if task.is_classification else {"biomedparse"}
        assert {n for n, t in recorded.items() if t["answers"] == "its own"} == own
        assert chosen["biomedparse"]["prompts"] == ([] if task.is_classification else list(task.prompts))
        assert chosen["retfound"]["framing"] == ("crop" if name == "aptos2019" else "squash")
        assert chosen["medsam"]["prompt"] == "none"
    if bundle == "busi":
        monkeypatch.setenv("AMKD_WEIGHTS", str(tmp_path / "three"))
        shutil.copytree(weights, tmp_path / "three", ignore=shutil.ignore_patterns("USFM*"))
        with pytest.raises(RuntimeError) as caught:
            run(bundle, ("train",), {**values, "max_epochs": 1, "resume": True})
        assert "teachers" in str(root_cause(caught.value))


def test_a_dry_run_tells_what_each_teacher_does_here(weights, tmp_path, monkeypatch):
    tiny_tasks(monkeypatch)
    table = format_bundle(ROOT / "bundles" / "busi", {"image_size": 64}, str(weights))
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert all(file in rows[teacher] for teacher, file in OFFICIAL.items())
    assert "features and its own answers" in rows["biomedparse"] and TASKS["busi"].prompts[0] in rows["biomedparse"]
    assert all("features and a probe's answers" in rows[teacher] for teacher in ("medsam", "retfound", "usfm"))
    assert "CC BY-NC 4.0" in rows["usfm"] and "possible, without labels" in rows["usfm"]
    for variable in ("AMKD_WEIGHTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    for further in ({"labelled": 12}, {"unlabelled": ["more"]}):
        assert "\ncrew " in format_bundle(ROOT / "bundles" / "busi", {"image_size": 64, **further})
    missing = format_bundle(ROOT / "bundles" / "busi", {"image_size": 64})
    assert "labels alone" in missing
    named = format_bundle(ROOT / "bundles" / "isic2017", {"image_size": 64, "teachers": "imagenet"})
    assert re.search("imagenet_lite1 +packaged +features  ", named), "their answers are not compared"
    assert all(file in missing for file in OFFICIAL.values())


def test_they_distil_into_one_student(tmp_path, weights, cache):
    teachers = [{"name": which, **options} for which, options in TINY.items() if which != "usfm"]
    teachers[0]["prompt"] = "label_box"
    from_file = {k: v for k, v in TINY["usfm"].items() if k != "weights"}
    teachers.append({"name": "usfm", **from_file})
    values = settings("kvasir_seg", tmp_path, cache, teachers=teachers, weights_dir=str(weights))
    values |= {"max_epochs": 3, "admission": {"mode": "all"}}
    run("kvasir_seg", ("train",), values)

    record = read_json(tmp_path / "eval" / "run.json")
    assert record["status"] == "completed" and record["is_test"], "random teachers make it a test"
    recorded = {t["name"]: t for t in record["distillation"]["teachers"]}
    assert set(recorded) == set(TINY)
    assert [name for name, t in recorded.items() if not t["random_weights"]] == ["usfm"]
    assert recorded["usfm"]["weights"]["file"] == "USFM_latest.pth" and len(recorded["usfm"]["weights"]["sha256"]) == 64
    assert {name for name, t in recorded.items() if t["answers"] == "its own"} == {
        "medsam",
        "usfm_upernet",
        "biomedparse",
    }
    assert {t["licence"] for t in recorded.values()} == {
        "Apache-2.0",
        "CC BY-NC 4.0",
        "research use only; see its card",
    }
    history = list(csv.DictReader((tmp_path / "eval" / "history.csv").open()))
    assert float(history[-1]["loss_feature"]) < float(history[0]["loss_feature"])
    for which in TINY:
        assert float(history[-1][f"teacher_feature_{which}"]) > 0
    student = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert not any(which in key for key in student for which in TINY)


def test_a_run_without_random_teachers_is_no_test(tmp_path, weights, cache):
    options = {k: v for k, v in TINY["usfm"].items() if k != "weights"}
    teachers = [{"name": "usfm", **options, "weights": str(weights / "USFM_latest.pth")}]
    values = settings("kvasir_seg", tmp_path, cache, teachers=teachers, admission={"mode": "none"})
    run("kvasir_seg", ("train",), {**values, "max_epochs": 1})
    assert read_json(tmp_path / "eval" / "run.json")["is_test"] is False


def test_missing_weights_end_the_run_in_one_sentence(tmp_path, monkeypatch, cache):
    monkeypatch.delenv("AMKD_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    values = settings("kvasir_seg", tmp_path, cache, teachers=[{"name": "medsam", "kind": "medsam"}])
    with pytest.raises(RuntimeError) as caught:
        run("kvasir_seg", ("train",), {**values, "weights_dir": str(tmp_path)})
    text = str(root_cause(caught.value))
    assert "medsam_vit_b.pth" in text and "python -m amkd_monai fetch medsam" in text and "\n" not in text


def test_answers_of_another_task_are_refused(tmp_path, cache):
    teachers = [{"name": "organs", **TINY["usfm_upernet"], "num_classes": 5}]
    with pytest.raises(RuntimeError) as caught:
        run("kvasir_seg", ("train",), settings("kvasir_seg", tmp_path, cache, teachers=teachers))
    text = str(root_cause(caught.value))
    assert "'organs'" in text and "5 classes" in text and "2 classes" in text


def test_an_answer_about_the_whole_image_is_no_mask(tmp_path, cache):
    """A fine-tuned RETFound in a mask task teaches features, and a probe answers on its grid."""
    state = {k: v for k, v in official_state("retfound").items() if not k.startswith(("norm.", "mask_", "decoder_"))}
    state |= {"fc_norm.weight": torch.ones(48), "fc_norm.bias": torch.zeros(48)}
    state |= {"head.weight": torch.randn(5, 48), "head.bias": torch.zeros(5)}
    torch.save({"model": state}, tmp_path / "checkpoint-best.pth")
    teachers = [{"name": "aptos", **TINY["retfound"], "weights": str(tmp_path / "checkpoint-best.pth")}]
    values = settings("kvasir_seg", tmp_path, cache, teachers=teachers, admission={"mode": "all"})
    run("kvasir_seg", ("train",), {**values, "max_epochs": 1})
    (teacher,) = read_json(tmp_path / "eval" / "run.json")["distillation"]["teachers"]
    assert "probe" in teacher["answers"] and not teacher["random_weights"]
