"""The bundles are what `bundles/source` says, and what one source cannot keep equal fits together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bundle_runs import BUNDLES, SHARED, read_json
from helpers import ROOT

from amkd_monai.bundles import merge as build
from amkd_monai.data.datasets import TASKS


def config(bundle, name):
    return read_json(ROOT / "bundles" / bundle / "configs" / f"{name}.json")


def test_the_bundles_are_as_their_source_says_and_an_edited_one_is_named(tmp_path):
    for name in (*BUNDLES, SHARED):
        own = read_json(ROOT / "bundles" / "source" / f"{name}.json")
        for path, text in build.bundle_files(name, own, ROOT / "bundles" / "source").items():
            assert (ROOT / "bundles" / name / path).read_text() == text, f"{name}/{path}: run `make bundles`"
    (tmp_path / "LICENSE").write_text("free")
    source = tmp_path / "bundles" / "source"
    source.mkdir(parents=True)
    for name, text in {
        "build.py": (ROOT / "bundles" / "source" / "build.py").read_text(),
        "common.json": '{"train": {"a": 1}}',
        "own.json": '{"parts": ["common"], "train": {"b": 2}}',
    }.items():
        (source / name).write_text(text)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def built(*options):
        return subprocess.run(
            [sys.executable, source / "build.py", *options], capture_output=True, text=True, env=environment
        )

    assert built("--check").returncode == 1 and built().returncode == 0 and built("--check").returncode == 0
    train = tmp_path / "bundles" / "own" / "configs" / "train.json"
    assert read_json(train) == {"a": 1, "b": 2}
    train.write_text("{}")
    (train.parent / "stray.json").write_text("{}")
    ended = built("--check")
    assert ended.returncode == 1 and "own/configs/train.json" in ended.stderr and "stray.json" in ended.stderr


def test_objects_merge_by_key_lists_replace_and_new_keys_stand_where_they_are_put():
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}
    merged = build.merge(base, {"a": {"y": 4, "_target_": "T"}, "b": [5], "c": "<absent>", "d": 6})
    assert build.resolved(merged, {}) == {"a": {"_target_": "T", "x": 1, "y": 4}, "b": [5], "d": 6}
    assert next(iter(merged["a"])) == "_target_"
    assert list(build.merge(base, {"a": "<same>", "new": 0})) == ["a", "new", "b", "c"]
    with pytest.raises(ValueError, match=r"part/a/z"):
        build.merge(base, {"a": {"z": "<same>"}}, "part")


def test_values_fill_texts_keys_and_lists():
    values = {"one": [1, "<two>"], "two": [2], "name": "dice", "none": []}
    parts = {"a": ["<one>", 3, "<none>"], "val_<name>": "<one>", "b": "mean <name>"}
    assert build.resolved(parts, values) == {"a": [1, 2, 3], "val_dice": [1, 2], "b": "mean dice"}
    with pytest.raises(ValueError, match="<three>"):
        build.resolved({"a": "<three>"}, values)


def test_the_bundle_of_several_tasks_opens_all_bundles_and_sets_only_what_they_have():
    shared = config(SHARED, "train")
    assert set(shared["tasks"]) == set(BUNDLES)
    for bundle in BUNDLES:
        assert set(shared["settings"]) <= set(config(bundle, "train"))


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if TASKS[b].kind == "classification"])
def test_a_class_bundle_has_the_classes_of_its_task_and_prepares_images_alike_in_every_config(bundle):
    train, inference = config(bundle, "train"), config(bundle, "inference")
    side = train["image_size"]
    assert inference["image_size"] == side
    assert config(bundle, "metadata")["network_data_format"]["inputs"]["image"]["spatial_shape"] == [side, side]
    assert train["network_def"]["num_classes"] == len(TASKS[bundle].classes) == inference["network_def"]["num_classes"]
    assert "validate#preprocessing" not in config(bundle, "evaluate"), "the test section is prepared as validation is"
