"""`cache build` computes ahead what a training asks for, whole or in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundle_runs import settings, workflow
from helpers import ROOT

from amkd_monai.__main__ import main
from amkd_monai.cache.store import FeatureStore
from amkd_monai.engines.prepare import build_cache
from amkd_monai.memory import own_peak
from amkd_monai.teachers.timm_encoder import TimmTeacher

TEACHERS = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
BUNDLE = str(ROOT / "bundles" / "kvasir_seg")


@pytest.fixture
def teachers(tmp_path):
    (tmp_path / "teachers.json").write_text(json.dumps({"teachers": TEACHERS}))
    return ["--config", str(tmp_path / "teachers.json")]


def build(capsys, tmp_path, *extra):
    code = main(["cache", "build", BUNDLE, "--set", f"cache_dir={tmp_path}", "--set", "image_size=64", *extra])
    said = capsys.readouterr()
    return code, said.out.split(), said.err


def test_a_training_finds_what_was_built_in_parts(tmp_path, teachers, capsys, monkeypatch):
    for shard in ("1/2", "2/2"):  # 28 and 6 images, one shard each: the second part has nothing to do
        code, folders, log = build(capsys, tmp_path, *teachers, "--shard", shard)
        assert log.splitlines()[-1].startswith("peak memory of this process: ")
        assert code == 0 and [FeatureStore.open(folder).is_complete for folder in folders] == [True, True]
    assert all(FeatureStore.open(folder).origin["teacher"] == TEACHERS[0] for folder in folders)

    def forward(self, image):
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr("amkd_monai.teachers.timm_encoder.TimmTeacher.forward", forward)
    values = settings("kvasir_seg", tmp_path / "run", tmp_path, teachers=TEACHERS, admission={"mode": "all"})
    targets = workflow("kvasir_seg", ("train",), values).parser.get_parsed_content("targets")
    assert str(targets.teachers[0].features.directory) in folders
    assert 0 < targets.record["preparation_peak_rss_mb"] <= own_peak() + 1


def test_the_batch_size_is_an_option_of_building_and_of_training(tmp_path, teachers, capsys, monkeypatch):
    sizes, real = [], TimmTeacher.forward
    monkeypatch.setattr(TimmTeacher, "forward", lambda self, image: sizes.append(len(image)) or real(self, image))
    assert build(capsys, tmp_path / "a", *teachers, "--batch_size", "3")[0] == 0
    assert sum(sizes) == 34 and set(sizes) == {1, 3}, "the first image tells the shapes"
    sizes.clear()
    options = {"teachers": TEACHERS, "admission": {"mode": "none"}, "targets#teacher_batch_size": 5}
    values = settings("kvasir_seg", tmp_path / "run", tmp_path / "b", **options)
    workflow("kvasir_seg", ("train",), values).parser.get_parsed_content("targets")
    assert sum(sizes) == 34 and max(sizes) == 5


def test_torchrun_gives_each_rank_its_part(tmp_path, teachers, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    complete = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        _, folders, _ = build(capsys, tmp_path, *teachers, "--set", "views=2")
        complete.append([(Path(f) / "store.json").is_file() and FeatureStore.open(f).is_complete for f in folders])
    assert complete == [[False, False], [True, True]]  # two views are two shards; validation has one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "9/8"], "'9/8'"),
        (["--set", "vews=2"], "has no setting 'vews'"),
        (["--set", "views=0"], "views"),
        (["--set", "cache_dtype=int4"], "use one of float16, int8"),
        (["--batch_size", "0"], "teacher_batch_size is 0"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(tmp_path, teachers, capsys, arguments, message):
    code, _, error = build(capsys, tmp_path, *teachers, *arguments)
    assert code == 1 and message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, capsys):
    assert main(["cache", "build", str(tmp_path)]) == 1
    assert "training bundle" in capsys.readouterr().err


def test_the_stores_of_a_shared_student_are_built_for_each_task(tmp_path):
    values = settings("multitask", tmp_path, tmp_path / "cache", teachers=TEACHERS, only=["kvasir_seg", "aptos2019"])
    given = {k: v for k, v in values.items() if k not in ("bundle_root", "output_dir", "ckpt_dir", "admission")}
    built = build_cache(ROOT / "bundles" / "multitask", given)
    assert len(built) == 4 and all(FeatureStore.open(folder).is_complete for folder in built)
    assert {folder.parent.name for folder in built} == {"kvasir_seg", "aptos2019"}


def test_a_build_without_image_teachers_says_so(tmp_path, capsys):
    code, said, _ = build(capsys, tmp_path, "--set", "labelled=6")
    assert code == 0 and said[0] == "Nothing"
