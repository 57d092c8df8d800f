"""What was trained is what is scored, predicted with and exported, or the command refuses: see docs/runs.md."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bundle_runs import ALL_BUNDLES, SHARED, read_json, run, settings, workflow
from helpers import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.bundle import run as monai_run
from PIL import Image

from amkd_monai.__main__ import main
from amkd_monai.data.datalist import datalist
from amkd_monai.data.datasets import get_task
from amkd_monai.engines import runs
from amkd_monai.errors import root_cause
from amkd_monai.metrics.summary import read_case_csv
from amkd_monai.weights import CheckpointError

SIZE = 96
"""Another size than the bundle's default and than that of small runs."""
POLYPS = {
    "image_size": SIZE,
    "max_epochs": 1,
    "teachers": [],
    "split_seed": 3,
    "recipe#batch_size": 4,
    "recipe#min_steps": 1,
}


def files(bundle, *names):
    return [str(ROOT / "bundles" / bundle / "configs" / f"{name}.json") for name in names]


def built(bundle, names, **values):
    """A workflow as a command builds it: only what is given is set."""
    made = ConfigWorkflow(files(bundle, *names), logging_file=False, **values)
    made.initialize()
    return made


def commanded(bundle, names, **values):
    """The same by ``monai.bundle run``'s own function, which knows what was given."""
    return create_workflow(config_file=files(bundle, *names), logging_file=False, **values)


def refusal(call, *arguments, kind=ValueError, **values):
    with pytest.raises(Exception) as caught:
        made = call(*arguments, **values)
        made.run()
    cause = root_cause(caught.value)
    assert isinstance(cause, kind), cause
    assert "\n" not in str(cause)
    return str(cause)


def command(*arguments, cwd=ROOT):
    """``python -m monai.bundle run`` in a process of its own."""
    line = [sys.executable, "-m", "monai.bundle", "run", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def polyps(tmp_path_factory):
    """Real files in the official layout, so no phantoms by their mark."""
    folder = get_task("kvasir_seg").write_phantom(tmp_path_factory.mktemp("polyps"), count=12, seed=3)
    for mark in folder.glob("PHANTOM*"):
        mark.unlink()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, polyps):
    """A student at another size, on given data, by another split, evaluated; with the places that it left."""
    folder = tmp_path_factory.mktemp("trained")
    values = settings("kvasir_seg", folder, folder / "cache", dataset_dir=str(polyps), **POLYPS)
    run("kvasir_seg", ("train",), values)
    run("kvasir_seg", ("train", "evaluate"), {"ckpt_dir": str(folder / "models"), "cache_dir": values["cache_dir"]})
    return folder


def places(folder, **more):
    return {"ckpt_dir": str(folder / "models"), "cache_dir": str(folder / "cache"), **more}


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != runs.LOCK}


def test_a_network_of_another_number_of_classes_is_refused_before_anything_is_trained(polyps, tmp_path):
    options = {"network_def#num_classes": 3, "dataset_dir": str(polyps), "output_dir": str(tmp_path / "eval")}
    said = refusal(built, "kvasir_seg", ("train",), **places(tmp_path), **options)
    assert "network_def#num_classes" in said and "background, polyp" in said
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------------ options


OVERLAYS = [
    *[(bundle, names) for bundle in ALL_BUNDLES for names in (("train",), ("train", "evaluate"), ("inference",))],
    *[(bundle, ("train", "multi_gpu_train")) for bundle in ALL_BUNDLES],
    ("covid", ("train", "volumes")),
    ("covid", ("train", "volumes", "evaluate", "volumes_evaluate")),
    ("covid", ("inference", "volumes_inference")),
]


KINDS = ("kvasir_seg", "msd_heart", "aptos2019", SHARED)
"""One bundle of each kind: the configs of all are generated from the same parts."""
BUILDS = [(built, *one) for one in OVERLAYS if one[0] in KINDS or one in OVERLAYS[-3:]]
BUILDS += [(commanded, *one) for one in OVERLAYS if one[0] == SHARED or one in OVERLAYS[-3:]]


@pytest.mark.parametrize(("build", "bundle", "names"), BUILDS)
def test_a_misspelled_option_is_refused_with_the_nearest_name(build, bundle, names, tmp_path):
    meant = {"ckpt_dirs": "ckpt_dir", "num_worker": "num_workers"}
    if names[0] == "train":
        meant |= {"max_epoch": "max_epochs", "init_part": "init_parts", "train#traner": "train#trainer"}
        meant |= {"recipe#learning_rat": "recipe#learning_rate", "losses#outptu": "losses#output"}
        meant |= {"learning_rate": "recipe#learning_rate"}
        meant |= {"contrastive#temperatur": "contrastive#temperature", "admission#fold": "admission#folds"}
        meant |= {"kd_temperature#strt": "kd_temperature#start", "loss_strength#warmupp": "loss_strength#warmup"}
        if bundle != SHARED:
            meant |= {"label": "labelled"}
    for wrong, right in meant.items():
        text = refusal(build, bundle, names, ckpt_dir=str(tmp_path), **{wrong: 1})
        assert f"--{wrong} " in text and f"--{right}?" in text


def test_options_that_exist_are_accepted_where_the_configs_do_not_list_them():
    for make in (built, commanded):
        make("kvasir_seg", ("train",), **{"losses#reconstruction": 0.1, "recipe#class_balance": 0.5})
        make("kvasir_seg", ("train",), **{"recipe#augmentation#colour": 0.1, "train#handlers#0#epoch_level": True})


def test_a_null_that_monai_leaves_out_is_refused_unless_it_is_the_default():
    for name in ("image_size", "losses#feature", "max_epoch"):
        assert f"--{name} '$None'" in refusal(commanded, "kvasir_seg", ("train",), **{name: None})
    made = commanded("kvasir_seg", ("train",), labelled=None, fold="$None")
    assert made.parser.get_parsed_content("fold") is None


def test_a_config_on_top_with_a_misspelled_option_is_refused(tmp_path):
    mine = tmp_path / "mine.json"
    configs = [*files("kvasir_seg", "train"), str(mine)]
    for key, value, meant in [
        ("max_epoch", 1, "max_epochs"),
        ("+teacher", [], "teachers"),
        ("recipe#learning_rat", 0.1, "recipe#learning_rate"),
        ("losses", {"outptu": 1}, "losses#output"),
    ]:
        mine.write_text(json.dumps({key: value}))
        assert f"--{meant}?" in refusal(create_workflow, config_file=configs, logging_file=False)
    mine.write_text(json.dumps({"rate": 0.1, "recipe#learning_rate": "@rate", "teachers": []}))
    assert (
        create_workflow(config_file=configs, logging_file=False).parser.get_parsed_content("recipe#learning_rate")
        == 0.1
    )


def test_the_bundles_own_configs_on_top_are_accepted():
    for bundle, names in OVERLAYS:
        if "multi_gpu_train" not in names:  # that starts a process group
            commanded(bundle, names)


@pytest.mark.parametrize("tracking", ["mlflow", files("kvasir_seg", "mlflow")[0]])
def test_options_of_tracking_are_known_and_misspelled_ones_are_not(tracking, tmp_path):
    given = {"tracking": tracking, "output_dir": str(tmp_path)}
    commanded("kvasir_seg", ("train",), run_name="x", **given)
    assert "--run_name?" in refusal(commanded, "kvasir_seg", ("train",), run_nam="x", **given)


def test_the_command_line_refuses_in_one_sentence(tmp_path):
    ended = command("--config_file", files("busi", "train")[0], "--label", "4", "--output_dir", tmp_path)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: ")
    assert "--labelled?" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr
    with pytest.raises(Exception, match="traner"):  # MONAI itself refuses what has no parent
        commanded("busi", ("train",), **{"train#traner#x": 1})
    (tmp_path / "arguments.json").write_text(json.dumps({"config_file": files("busi", "train")[0], "max_epoch": 1}))
    with pytest.raises(RuntimeError) as caught:
        monai_run(args_file=str(tmp_path / "arguments.json"))
    assert "--max_epochs?" in str(root_cause(caught.value))


def test_an_option_that_needs_another_is_refused_alone(tmp_path):
    values = settings("kvasir_seg", tmp_path, tmp_path, init_parts="encoder", teachers=[])
    assert "init_from" in refusal(workflow, "kvasir_seg", ("train",), values)


@pytest.mark.parametrize("bundle", KINDS)
def test_home_is_expanded_in_every_place(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for names in (("train",), ("train", "evaluate"), ("inference",)):
        made = built(bundle, names, output_dir="~/out", ckpt_dir="~/models", cache_dir="~/cache")
        for key in ("output_dir", "ckpt_dir", "cache_dir"):
            assert made.parser.get_parsed_content(key).startswith(str(tmp_path))
    made = built(bundle, ("train",), dataset_dir="~/data", weights_dir="~/w", init_from="~/i", resume_dir="~/r")
    assert [made.parser.get_parsed_content(k) for k in ("dataset_dir", "weights_dir", "init_from", "resume_dir")] == [
        str(tmp_path / name) for name in ("data", "w", "i", "r")
    ]


# ------------------------------------------------------------------------------------------------------ the record


@pytest.mark.parametrize("build", [built, commanded])
def test_evaluation_takes_everything_from_the_record(trained, build):
    made = build("kvasir_seg", ("train", "evaluate"), **places(trained))
    record = read_json(trained / "models" / "student.json")
    get = made.parser.get_parsed_content
    assert (get("image_size"), get("split_seed")) == (SIZE, 3)
    assert get("datalist").hash == record["data"]["split_hash"] and str(get("datalist").root) == record["data"]["root"]
    assert Path(get("output_dir")) == trained / "eval"
    metrics = read_json(trained / "eval" / "metrics.json")
    before = metrics["summary"]["metrics"]["dice"]["mean"]
    made.run()
    again = read_json(trained / "eval" / "metrics.json")
    assert again["summary"]["metrics"]["dice"]["mean"] == before
    assert again["run"] == record["run"] == read_json(trained / "eval" / "run.json")["run"]


WRONG = [
    ({"image_size": 160}, (str(SIZE), "160")),
    ({"image_size": 256}, (str(SIZE), "256")),
    ({"split_seed": 0}, ("split_seed", "3")),
    ({"labelled": 4}, ("labelled", "null")),
    ({"split_fractions": [0.5, 0.25, 0.25]}, ("split_fractions", "0.7")),
    ({"encoder": "tf_efficientnet_lite1"}, ("lite0", "lite1")),
    ({"network_def#stride": 2}, ("stride", "4")),
    ({"split_hash": "0" * 64}, ("split_hash", "0" * 64)),
]


@pytest.mark.parametrize(
    ("given", "words"), WRONG, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_setting_that_differs_from_the_students_is_refused(trained, given, words):
    before = snapshot(trained / "eval")
    text = refusal(commanded, "kvasir_seg", ("train", "evaluate"), **places(trained), **given)
    assert all(word in text for word in words)
    for key in given.keys() & {"image_size", "encoder", "network_def#stride"}:
        more = {key: given[key], "output_dir": str(trained / "masks")}
        assert refusal(commanded, "kvasir_seg", ("inference",), **places(trained), **more)
    assert snapshot(trained / "eval") == before


def test_another_fold_is_refused(tmp_path):
    folder = tmp_path / "run"
    values = settings("busi", folder, tmp_path / "cache", teachers=[], max_epochs=1)
    run("busi", ("train",), values)
    for given in ({"fold": 1}, {"folds": 4}, {"data_options": {"normals": False}}):
        text = refusal(commanded, "busi", ("train", "evaluate"), **places(folder), **given)
        assert next(iter(given)) in text


@pytest.mark.parametrize("change", ["setting", "transform", "config"])
def test_another_preprocessing_is_refused(trained, change, tmp_path):
    for names, place in ((("train", "evaluate"), "validate#preprocessing"), (("inference",), "preprocessing")):
        steps = built("kvasir_seg", names, **places(trained)).parser.get(f"{place}#transforms")
        at = next(i for i, step in enumerate(steps) if step["_target_"] == "ScaleIntensityRanged")
        given = {f"{place}#transforms#{at}#b_max": 0.5}
        if change == "transform":
            given = {f"{place}#transforms": [step for i, step in enumerate(steps) if i != at]}
        configs = files("kvasir_seg", *names)
        if change == "config":
            (tmp_path / "over.json").write_text(json.dumps(given))
            configs, given = [*configs, str(tmp_path / "over.json")], {}
        more = {"output_dir": str(tmp_path / "out")} if names == ("inference",) else {}

        def start(configs=configs, given=given, more=more):
            return create_workflow(config_file=configs, logging_file=False, **places(trained), **given, **more)

        text = refusal(start)
        assert place in text and "ScaleIntensityRanged" in text
        more.clear()


def test_a_student_of_ones_own_class_is_rebuilt_from_its_record(tmp_path):
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", teachers=[], max_epochs=1)
    own = {"_target_": "own_student.own_student", "num_classes": 2, "neck_channels": 16}
    run("kvasir_seg", ("train",), {**values, "network_def": own})
    for names in (("train", "evaluate"), ("inference",)):
        made = commanded("kvasir_seg", names, ckpt_dir=values["ckpt_dir"], output_dir=str(tmp_path / "eval"))
        assert made.parser.get_parsed_content("network_def").neck.lateral[0].out_channels == 16
        made.run()


def test_another_bundle_or_task_is_refused(trained, tmp_path):
    for bundle, names in (("busi", ("train", "evaluate")), ("busi", ("inference",)), (SHARED, ("train", "evaluate"))):
        text = refusal(built, bundle, names, **places(trained))
        assert "kvasir_seg" in text and str(trained / "models" / "model.pt") in text
    text = refusal(built, "busi", ("train",), **settings("busi", tmp_path, tmp_path, ckpt_dir=str(trained / "models")))
    assert "kvasir_seg" in text and (trained / "models" / "model.pt").is_file()
    values = settings("busi", tmp_path, tmp_path, output_dir=str(trained / "eval"), ckpt_dir=str(tmp_path / "models"))
    text = refusal(built, "busi", ("train",), **values)
    assert str(trained / "eval") in text and (trained / "eval" / "metrics.json").is_file()


def test_a_foreign_model_beside_a_record_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    state = torch.load(copy / "models" / "model.pt", weights_only=True)
    first = next(iter(state))
    torch.save({**state, first: state[first] + 1}, copy / "models" / "model.pt")
    before = snapshot(copy)
    for names in (("train", "evaluate"), ("inference",)):
        assert str(copy / "models" / "model.pt") in refusal(built, "kvasir_seg", names, **places(copy))
    assert snapshot(copy) == before


def test_a_student_without_a_record_does_not_write_over_a_recorded_run(trained, tmp_path):
    (tmp_path / "models").mkdir()
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    first = next(iter(state))
    torch.save({**state, first: state[first] + 1}, tmp_path / "models" / "model.pt")
    before = snapshot(trained / "eval")
    given = {"output_dir": str(trained / "eval"), "image_size": SIZE, "split_seed": 3}
    text = refusal(built, "kvasir_seg", ("train", "evaluate"), **places(tmp_path, **given))
    assert str(trained / "eval") in text and snapshot(trained / "eval") == before


def test_a_copied_run_is_evaluated_in_its_own_folder(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = snapshot(trained / "eval")
    made = built("kvasir_seg", ("train", "evaluate"), **places(copy, output_dir=str(copy / "eval")))
    assert made.parser.get_parsed_content("output_dir") == str(copy / "eval")
    made.run()
    assert snapshot(trained / "eval") == before


@pytest.mark.parametrize("name", ["output_dir", "ckpt_dir", "dataset_dir"])
def test_an_empty_place_is_refused(name, tmp_path):
    assert name in refusal(built, "kvasir_seg", ("train",), **{"ckpt_dir": str(tmp_path), name: ""})


BAD = [("max_epochs", 0), ("max_epochs", "many"), ("max_epochs", 1.5), ("val_interval", 99)]
BAD += [("seed", "x"), ("seed", -1), ("num_workers", -1), ("amp", "perhaps"), ("resume", "no"), ("keep", "first")]


@pytest.mark.parametrize("bundle", ["kvasir_seg", SHARED])
def test_bad_values_are_refused_by_name(bundle, tmp_path):
    for name, value in BAD:
        text = refusal(built, bundle, ("train",), ckpt_dir=str(tmp_path), **{name: value})
        assert name in text and str(value) in text and not list(tmp_path.iterdir())
    for wrong in ({"val_interval": 3, "max_epochs": 40},):
        text = refusal(built, bundle, ("train",), ckpt_dir=str(tmp_path), keep="last", **wrong)
        assert "'last'" in text and next(iter(wrong)) in text


def test_values_that_would_be_read_wrongly_are_refused_by_name(tmp_path):
    (tmp_path / "model.pt").touch()
    file = {name: str(tmp_path / "model.pt") for name in ("output_dir", "ckpt_dir")}
    values = {
        "image_size": 0,
        "mask_codes": "treshold",
        "device": "cuda:99",
        "teachers": "medsan",
        "losses#output": -1,
        **file,
    }
    for name, value in values.items():
        given = {"output_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "cache_dir": str(tmp_path), name: value}
        text = refusal(commanded, "kvasir_seg", ("train",), **given)
        assert name.split("#")[-1] in text and str(value) in text
        assert not [path for path in tmp_path.rglob("*") if "decoded" in path.name], "nothing is prepared before"
    for name, value in [("volume_size", 64), ("volume_size", [64, 64]), ("spacing", [1, "x", 1]), ("fold", "x")]:
        text = refusal(commanded, "msd_heart", ("train",), ckpt_dir=str(tmp_path), **{name: value})
        assert name in text and str(value) in text


def test_words_of_a_switch_are_understood():
    for word, meaning in (("false", False), ("True", True)):
        assert commanded("kvasir_seg", ("train",), amp=word).parser.get_parsed_content("amp") is meaning


def test_the_purpose_of_a_config_is_no_option(trained):
    assert "purpose" in refusal(commanded, "kvasir_seg", ("train", "evaluate"), **places(trained, purpose="training"))


def test_real_data_are_never_replaced_by_phantoms_nor_the_other_way_round(trained, polyps, tmp_path, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "trained")
    record = read_json(copy / "models" / "student.json")
    record["data"]["root"] = str(tmp_path / "gone")
    (copy / "models" / "student.json").write_text(json.dumps(record))
    for names in (("train", "evaluate"), ("inference",)):
        assert str(tmp_path / "gone") in refusal(built, "kvasir_seg", names, **places(copy))
    moved = places(copy, dataset_dir=str(polyps), output_dir=str(tmp_path / "out"))
    assert built("kvasir_seg", ("train", "evaluate"), **moved).parser.get_parsed_content("datalist").hash

    phantom = tmp_path / "phantom"
    values = settings("kvasir_seg", phantom, tmp_path / "cache", teachers=[], max_epochs=1)
    run("kvasir_seg", ("train",), values)
    shutil.copytree(polyps, tmp_path / "root" / "Kvasir-SEG")
    monkeypatch.setenv("AMKD_DATA_ROOT", str(tmp_path / "root"))
    run("kvasir_seg", ("train", "evaluate"), {"ckpt_dir": str(phantom / "models")})
    assert read_json(phantom / "eval" / "metrics.json")["data"]["phantom"] is True
    text = refusal(built, "kvasir_seg", ("train", "evaluate"), **places(phantom, dataset_dir=str(polyps)))
    assert read_json(phantom / "eval" / "run.json")["data"]["split_hash"][:12] in text


def test_other_data_are_evaluated_on_request_in_a_folder_of_their_own(trained, polyps, tmp_path):
    other = get_task("kvasir_seg").write_phantom(tmp_path / "other", count=10, seed=8)
    names, before = ("train", "evaluate"), snapshot(trained / "eval")
    assert "dataset_dir" in refusal(built, "kvasir_seg", names, **places(trained, dataset_dir=str(other)))
    asked = places(trained, other_data=str(other))
    both = {**asked, "dataset_dir": str(other), "output_dir": str(tmp_path / "scores")}
    assert "other_data alone" in refusal(commanded, "kvasir_seg", names, **both)
    assert "output_dir" in refusal(commanded, "kvasir_seg", names, **asked)
    assert "another run" in refusal(commanded, "kvasir_seg", names, **asked, output_dir=str(trained / "eval"))
    assert "seen is" in refusal(commanded, "kvasir_seg", names, **asked, seen="no", output_dir=str(tmp_path / "scores"))
    made = commanded("kvasir_seg", names, **asked, output_dir=str(tmp_path / "scores"))
    assert made.parser.get_parsed_content("image_size") == SIZE
    made.run()
    scored = read_json(tmp_path / "scores" / "metrics.json")
    assert scored["data"]["root"] == str(other) and scored["run"] == read_json(trained / "eval" / "run.json")["run"]
    assert scored["summary"]["cases"] == 10 and scored["seen"] == {} and scored["seen_is_known"]
    third = get_task("kvasir_seg").write_phantom(tmp_path / "third", count=8, seed=9)
    again = {**asked, "other_data": str(third), "output_dir": str(tmp_path / "scores")}
    assert "other data" in refusal(commanded, "kvasir_seg", names, **again)
    assert snapshot(trained / "eval") == before


def test_images_of_the_training_are_refused_or_reported_apart(trained, polyps, tmp_path):
    (split,) = (trained / "eval").glob("split_*.json")
    sections = {name: [case for case, _ in read_json(split)[name]] for name in ("train", "validation", "test")}
    copy = shutil.copytree(polyps, tmp_path / "copy")
    for file in (copy / "images").iterdir():  # other bytes, the same picture
        Image.open(file).save(file, quality=70)
    asked, names = places(trained, other_data=str(copy), output_dir=str(tmp_path / "scores")), ("train", "evaluate")
    text = refusal(commanded, "kvasir_seg", names, **asked)
    assert "looks like" in text and "seen" in text and not (tmp_path / "scores" / "metrics.json").exists()
    commanded("kvasir_seg", names, **asked, seen="apart").run()
    scored, known = (read_json(folder / "metrics.json") for folder in (tmp_path / "scores", trained / "eval"))
    assert set(scored["seen"]["cases"]) == {*sections["train"], *sections["validation"]}
    rows = {name: read_case_csv(tmp_path / "scores" / f"{name}.csv") for name in ("per_case", "per_case_seen")}
    assert {row["id"] for row in rows["per_case"]} == set(sections["test"])
    assert {row["id"] for row in rows["per_case_seen"]} == set(scored["seen"]["cases"])
    dice = [s["summary"]["metrics"]["dice"]["mean"] for s in (scored, known)]
    assert dice[0] == pytest.approx(dice[1], abs=0.05)  # the test section, in JPEG of another quality


OTHERWISE = [
    ("validate#dataset#data", "$@datalist.validation"),
    ("validate#inferer", {"_target_": "SlidingWindowInferer", "roi_size": [SIZE, SIZE]}),
    ("validate#postprocessing#transforms#2#argmax", False),
    ("validate#key_metric", {"val_dice": {"_target_": "MeanDice"}}),
    ("datalist", "$datalists.datalist(@task, @dataset_dir, seed=@split_seed)"),
]


@pytest.mark.parametrize("build", [built, commanded])
def test_an_evaluation_that_scores_otherwise_needs_a_folder_of_its_own(trained, tmp_path, build):
    names, before = ("train", "evaluate"), snapshot(trained / "eval")
    for key, value in OTHERWISE:
        text = refusal(build, "kvasir_seg", names, **places(trained), **{key: value})
        assert "#".join(key.split("#")[:2]) in text and "output_dir" in text
    own = places(trained, output_dir=str(tmp_path / "scores"))
    made = build("kvasir_seg", names, **own, **dict(OTHERWISE[:1]))
    made.run()
    scored = read_json(tmp_path / "scores" / "metrics.json")
    assert scored["overridden"] == {"validate#dataset#data": "$@datalist.validation"}
    assert scored["summary"]["cases"] == len(made.parser.get_parsed_content("datalist").validation)
    assert "other data or options" in refusal(build, "kvasir_seg", names, **own)
    into = places(trained, output_dir=str(trained / "eval"))
    assert "output_dir" in refusal(build, "kvasir_seg", names, **into, **dict(OTHERWISE[:1]))
    assert snapshot(trained / "eval") == before


def test_a_config_on_top_that_scores_otherwise_needs_a_folder_of_its_own(trained, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(dict(OTHERWISE[:1])))
    configs = [*files("kvasir_seg", "train", "evaluate"), str(tmp_path / "mine.json")]
    text = refusal(create_workflow, config_file=configs, logging_file=False, **places(trained))
    assert "validate#dataset#data" in text


def test_places_in_a_config_count_as_given(trained, polyps, tmp_path):
    other = shutil.copytree(polyps, tmp_path / "new")
    places_of = {"dataset_dir": str(other), "output_dir": str(tmp_path / "results")}
    (tmp_path / "mine.json").write_text(json.dumps(places_of))
    for names in (("train", "evaluate"), ("inference",)):
        configs = [*files("kvasir_seg", *names), str(tmp_path / "mine.json")]
        made = create_workflow(config_file=configs, logging_file=False, ckpt_dir=str(trained / "models"))
        assert {key: made.parser[key] for key in places_of} == places_of


def test_changed_files_of_the_test_section_are_refused_by_name(trained, polyps, tmp_path):
    copy = shutil.copytree(polyps, tmp_path / "Kvasir-SEG")
    (split,) = (trained / "eval").glob("split_*.json")
    name = read_json(split)["test"][0][0]
    given = places(trained, dataset_dir=str(copy), output_dir=str(tmp_path / "scores"))
    run("kvasir_seg", ("train", "evaluate"), given)
    for folder in ("images", "masks"):
        (file,) = (copy / folder).glob(f"{name}.*")
        content = file.read_bytes()
        file.write_bytes(content + b"\0")
        assert name in refusal(built, "kvasir_seg", ("train", "evaluate"), **given)
        file.write_bytes(content)
    run("kvasir_seg", ("train", "evaluate"), given)


def test_figures_of_another_run_are_not_overwritten(trained, tmp_path):
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", teachers=[], max_epochs=1)
    run("kvasir_seg", ("train",), values)
    before = snapshot(trained / "eval")
    given = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(trained / "eval")}
    assert "another run" in refusal(built, "kvasir_seg", ("train", "evaluate"), **given)
    assert snapshot(trained / "eval") == before


def test_inference_takes_the_students_settings(trained, tmp_path):
    made = built("kvasir_seg", ("inference",), **places(trained, output_dir=str(tmp_path)))
    assert made.parser.get_parsed_content("image_size") == SIZE
    volume = settings("covid", tmp_path, tmp_path / "cache", teachers=[], max_epochs=1)
    volume |= {"spacing": [8.0, 8.0, 8.0], "volume_size": [-1, 48, 48]}
    run("covid", ("train", "volumes"), volume)
    asked = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "masks")}
    made = built("covid", ("inference", "volumes_inference"), **asked)
    assert made.parser.get_parsed_content("volume_size") == [-1, 48, 48]
    assert "covid_volumes" in refusal(built, "covid", ("inference",), **asked), "the overlay was forgotten"


def test_a_shared_student_is_evaluated_and_predicts_by_its_record(tmp_path):
    tasks = {
        "kvasir_seg": {"bundle": "kvasir_seg", "image_size": 48, "split_seed": 2, "recipe#batch_size": 4},
        "aptos2019": {"bundle": "aptos2019", "image_size": 32, "recipe#batch_size": 4},
    }
    more = {"teachers": [], "steps_per_epoch": 2, "tasks_per_step": 2, "neck_channels": 16, "max_epochs": 1}
    run(SHARED, ("train",), settings(SHARED, tmp_path, tmp_path / "cache", **{**more, "tasks": tasks}))
    record = read_json(tmp_path / "models" / "student.json")
    assert list(record["tasks"]) == list(tasks)
    ckpt = {"ckpt_dir": str(tmp_path / "models")}
    for make in (built, commanded):
        made = make(SHARED, ("train", "evaluate"), **ckpt)
        opened = made.parser.get_parsed_content("task_set")
        assert {name: data.hash for name, data in opened.all("datalist").items()} == {
            name: of_task["data"]["split_hash"] for name, of_task in record["tasks"].items()
        }
        assert opened.all("image_size") == {"kvasir_seg": 48, "aptos2019": 32}
    made.run()
    scored = read_json(tmp_path / "eval" / "kvasir_seg" / "metrics.json")
    assert scored["run"] == record["run"] == read_json(tmp_path / "eval" / "run.json")["run"]
    for task, size in (("kvasir_seg", 48), ("aptos2019", 32)):
        made = built(SHARED, ("inference",), **ckpt, task=task, output_dir=str(tmp_path / task))
        assert made.parser.get_parsed_content("opened").get("image_size") == size
        made.run()
    assert "busi" in refusal(built, SHARED, ("inference",), **ckpt, task="busi")
    given = {**tasks, "kvasir_seg": {**tasks["kvasir_seg"], "split_seed": 0}}
    for wrong in ({"tasks": given}, {"neck_channels": 32}):
        assert next(iter(wrong)) in refusal(commanded, SHARED, ("train", "evaluate"), **ckpt, **wrong)


def test_a_damaged_record_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    for content in ('{"version": 1', "[]", '{"version": 2, "run": "x"}'):
        (copy / "models" / "student.json").write_text(content)
        assert "student.json" in refusal(built, "kvasir_seg", ("inference",), kind=CheckpointError, **places(copy))


# ------------------------------------------------------------------------------------------------------ export


def exported(folder, to, *options):
    arguments = [f"--set={k}={v}" for k, v in places(folder).items()]
    asked = ["export", str(ROOT / "bundles" / "kvasir_seg"), "--to", str(to), "--formats", "ts", *arguments]
    return main([*asked, "--cases", "2", *options])


def test_export_takes_the_settings_and_quotes_the_figures_of_this_student(trained, tmp_path, capsys):
    assert exported(trained, tmp_path / "d") == 0
    card = (tmp_path / "d" / "docs" / "README.md").read_text()
    metadata = read_json(tmp_path / "d" / "configs" / "metadata.json")
    assert f"resized to {SIZE} x {SIZE}" in card and "256 x 256" not in card + json.dumps(metadata)
    dice = read_json(trained / "eval" / "metrics.json")["summary"]["metrics"]["dice"]["mean"]
    assert f"{dice:.4f}" in card and metadata["eval_metrics"]["dice"] == dice
    capsys.readouterr()
    assert exported(trained, tmp_path / "e", "--set=image_size=160") == 1
    error = capsys.readouterr().err
    assert "160" in error and str(SIZE) in error and not (tmp_path / "e").exists()
    assert exported(trained, tmp_path / "e", f"--set=dataset_dir={tmp_path}") == 1
    error = capsys.readouterr().err.strip()
    assert str(tmp_path) in error and "\n" not in error.split("error: ")[1]


def test_figures_of_other_data_or_options_are_not_quoted(trained, tmp_path):
    from amkd_monai.export.source import Source

    for number, change in enumerate(({}, {"overridden": {"validate#inferer": None}}, {"data": {"split_hash": "x"}})):
        output = shutil.copytree(trained / "eval", tmp_path / str(number))
        report = read_json(output / "metrics.json")
        (output / "metrics.json").write_text(json.dumps(report | change))
        source = Source(ROOT / "bundles" / "kvasir_seg", places(trained, output_dir=str(output)))
        assert bool(source.metrics) != bool(change) and bool(source.unscored) == bool(change)


def test_figures_of_another_student_are_not_quoted(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    record = read_json(copy / "models" / "student.json")
    record["output_dir"] = str(copy / "eval")
    del record["weights"]  # as an earlier version wrote it
    (copy / "models" / "student.json").write_text(json.dumps(record))
    state = torch.load(copy / "models" / "model.pt", weights_only=True)
    torch.save(
        {key: value + 0.001 if value.is_floating_point() else value for key, value in state.items()},
        copy / "models" / "model.pt",
    )
    assert exported(copy, tmp_path / "d") == 0
    card = (tmp_path / "d" / "docs" / "README.md").read_text()
    assert "Not evaluated" in card and "another student" in card
    assert read_json(tmp_path / "d" / "configs" / "metadata.json")["eval_metrics"] == {}


# ------------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("names", [("train",), ("inference",)])
@pytest.mark.parametrize("bundle", KINDS)
def test_the_root_is_that_of_the_config_from_any_folder(bundle, names, tmp_path, monkeypatch):
    for where in (tmp_path, ROOT, ROOT / "bundles" / "busi"):
        monkeypatch.chdir(where)
        assert Path(built(bundle, names).parser.get_parsed_content("bundle_root")) == ROOT / "bundles" / bundle
        relative = [os.path.relpath(file) for file in files(bundle, *names)]
        made = create_workflow(config_file=relative, logging_file=False)
        root = made.parser.get_parsed_content("bundle_root")
        assert Path(root).resolve() == ROOT / "bundles" / bundle
        assert made.parser.get_parsed_content("ckpt_dir") == f"{root}/models"
    copy = shutil.copytree(ROOT / "bundles" / bundle / "configs", tmp_path / "renamed" / "configs")
    made = create_workflow(config_file=str(copy / f"{names[0]}.json"), logging_file=False)
    assert Path(made.parser.get_parsed_content("bundle_root")) == tmp_path / "renamed"


def test_a_command_in_another_bundles_folder_leaves_that_bundles_student_alone(tmp_path, monkeypatch):
    for bundle in ("busi", "kvasir_seg"):
        shutil.copytree(ROOT / "bundles" / bundle / "configs", tmp_path / bundle / "configs")
    values = settings("kvasir_seg", tmp_path, tmp_path, teachers=[], max_epochs=1)
    monkeypatch.chdir(tmp_path / "busi")
    given = {key: values[key] for key in ("image_size", "teachers", "max_epochs")}
    monai_run(config_file=str(tmp_path / "kvasir_seg" / "configs" / "train.json"), **given)
    assert not (tmp_path / "busi" / "models").exists() and (tmp_path / "kvasir_seg" / "models" / "model.pt").is_file()


# ------------------------------------------------------------------------------------------------------ two runs


def small(folder, cache, channels):
    """A run that the shapes of its student's tensors name."""
    more = {"image_size": 32, "max_epochs": 2, "teachers": [], "recipe#batch_size": 4, "recipe#min_steps": 1}
    return settings("kvasir_seg", folder, cache, **more, **{"network_def#neck_channels": channels})


@contextlib.contextmanager
def training(values, errors=None):
    """A training in a forked process, killed at the end of the block."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run("kvasir_seg", ("train",), values)
            code = 0
        except Exception as error:
            if errors is not None:
                errors.write_text(f"{type(root_cause(error)).__name__}: {root_cause(error)}")
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_one_run(folder):
    """Every file there is of one run."""
    names, channels = set(), set()
    for file in (folder / "models" / "student.json", folder / "eval" / "run.json"):
        if file.is_file():
            names.add(read_json(file)["run"])
    record = folder / "models" / "student.json"
    if record.is_file():
        channels.add(read_json(record)["network"]["neck_channels"])
    for file, inside in (("model.pt", ""), ("distillation.pt", "student.")):
        if (folder / "models" / file).is_file():
            assert record.is_file(), "a student has its record"
            state = torch.load(folder / "models" / file, weights_only=True)
            channels.add(len(state.get("distiller", state)[f"{inside}neck.lateral.0.bias"]))
    assert len(names) <= 1 and len(channels) <= 1, (names, channels)
    return names


def test_two_runs_at_once_in_the_same_folders(tmp_path):
    run("kvasir_seg", ("train",), {**small(tmp_path / "warm", tmp_path / "cache", 16), "max_epochs": 1})
    folder, said = tmp_path / "run", [tmp_path / "0.txt", tmp_path / "1.txt"]
    long = {"max_epochs": 200}
    first, second = ({**small(folder, tmp_path / "cache", c), **long} for c in (16, 32))
    with training(first, said[0]) as one, training(second, said[1]) as two:
        until(lambda: ended(one) or ended(two))
        (refused,) = [path for path in said if path.is_file()]
        assert refused.read_text().startswith("TimeoutError") and str(folder) in refused.read_text()
        until(lambda: (folder / "models" / "distillation.pt").is_file())
        assert not (ended(one) and ended(two)), "the first goes on"
        evaluation = {"ckpt_dir": str(folder / "models")}
        for more in ({}, {"output_dir": str(tmp_path / "scores")}):
            text = refusal(built, "kvasir_seg", ("train", "evaluate"), kind=TimeoutError, **evaluation, **more)
            assert "Another run" in text
    check_one_run(folder)
    apart = {**small(folder, tmp_path / "cache", 16), "ckpt_dir": str(tmp_path / "other"), "max_epochs": 1}
    run("kvasir_seg", ("train",), apart)  # the kernel has freed the lock of what was killed


@pytest.mark.slow
def test_twenty_kills_leave_files_of_one_run(tmp_path):
    rng, folder, seen, kills = random.Random(0), tmp_path / "run", set(), 0
    for name in ("decodes", "whole"):  # most are killed later than the first of them, which decodes
        start = time.monotonic()
        run("kvasir_seg", ("train",), small(tmp_path / name, tmp_path / "other", 16))
    length = time.monotonic() - start  # a busy machine takes longer until there are files
    while kills < 20 or len(seen) < 6:
        assert kills < 200, "runs are killed before they leave files"
        with training(small(folder, tmp_path / "cache", rng.choice((16, 32))), tmp_path / "e.txt") as child:
            end = time.monotonic() + rng.uniform(0, 1.2 * length)
            while not ended(child) and time.monotonic() < end:
                time.sleep(0.01)
            kills += not ended(child)
        assert not (tmp_path / "e.txt").is_file(), (tmp_path / "e.txt").read_text()
        seen |= check_one_run(folder)
    for old in (folder / "models" / "previous").iterdir():
        record = read_json(old / "student.json")
        assert record["run"].startswith(old.name.split("-")[0])
        if (old / "model.pt").is_file():
            bias = torch.load(old / "model.pt", weights_only=True)["neck.lateral.0.bias"]
            assert len(bias) == record["network"]["neck_channels"]


def test_an_earlier_run_is_set_aside_whole(trained, tmp_path, polyps):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = snapshot(copy / "models")
    name = read_json(copy / "models" / "student.json")["run"][:12]
    values = settings("kvasir_seg", copy, copy / "cache", dataset_dir=str(polyps), **{**POLYPS, "split_seed": 4})
    run("kvasir_seg", ("train",), values)
    for file in ("student.json", "model.pt", "distillation.pt"):
        assert (copy / "models" / "previous" / name / file).read_bytes() == before[copy / "models" / file]
    assert read_json(copy / "models" / "student.json")["split"]["split_seed"] == 4
    assert not (copy / "eval" / "metrics.json").exists(), "figures of the earlier student"
    assert (copy / "eval" / "previous" / name / "metrics.json").is_file()


def test_a_run_that_goes_on_from_the_student_in_its_folder_keeps_it(trained, tmp_path, polyps):
    """As fine-tuning in the label server does: the student is validated first, as the value to beat."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    data = datalist("kvasir_seg", polyps, seed=5)
    more = {
        "teachers": [],
        "max_epochs": 1,
        "keep": "best",
        "resume_dir": str(tmp_path),
        "output_dir": str(tmp_path / "eval"),
    }
    made = built("kvasir_seg", ("train",), **places(copy), purpose="serving", datalist=data, **more)
    assert made.parser.get_parsed_content("image_size") == SIZE
    student = torch.load(copy / "models" / "model.pt", weights_only=True)
    made.parser.get_parsed_content("network").load_state_dict(student)
    made.parser.get_parsed_content("validate#evaluator").run()
    made.run()
    assert not (copy / "models" / "previous").exists() and (copy / "models" / "model.pt").is_file()
    assert read_json(copy / "models" / "student.json")["data"]["split_hash"] == data.hash


def test_a_run_that_is_refused_on_resuming_changes_nothing(trained, tmp_path, polyps):
    copy = shutil.copytree(trained, tmp_path / "copy")
    before = snapshot(copy)
    values = settings("kvasir_seg", copy, copy / "cache", dataset_dir=str(polyps), **{**POLYPS, "resume": True})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "run.json").write_text('{"run": "of another"}')
    elsewhere = {**values, "output_dir": str(tmp_path / "eval")}
    assert str(tmp_path / "eval") in refusal(workflow, "kvasir_seg", ("train",), elsewhere)
    others = [{"split_seed": 4}, {"image_size": 64}, {"seed": 7}, {"amp": True}, {"keep": "best"}]
    for given in (*others, {"warped_features": "exact"}, {"encoder_weights": "random"}):
        text = refusal(workflow, "kvasir_seg", ("train",), {**values, **given}, kind=CheckpointError)
        assert "another" in text and next(iter(given)) in text
        changed = {p for p, content in snapshot(copy).items() if before.get(p) != content}
        assert not {p for p in changed if copy / "cache" not in p.parents and "tfevents" not in p.name}


# ------------------------------------------------------------------------------------------------------ preparation


@pytest.mark.parametrize("bundle", ALL_BUNDLES)
def test_opening_a_bundle_starts_no_teacher(bundle, tmp_path, monkeypatch):
    """Nothing that is not a training runs teachers, cross-fits or even makes a network or data."""
    monkeypatch.chdir(tmp_path)
    touched = []
    for place in ("prepare.prepare_teachers", "prepare.known_teacher", "crossfit.cross_fit"):
        module, name = place.split(".")
        monkeypatch.setattr(f"amkd_monai.engines.{module}.{name}", lambda *_, place=place, **__: touched.append(place))
    given = {"cache_dir": str(tmp_path / "cache"), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "o")}
    for names in (("train",), ("train", "evaluate"), ("inference",)):
        for make in (built, commanded):
            made = make(bundle, names, **given)
            if names != ("train",):
                made.parser.get_parsed_content("preprocessing" if "preprocessing" in made.parser else "output_dir")
    assert not touched and not list(tmp_path.iterdir())
    from amkd_monai.export.source import Source

    if bundle != SHARED:
        with pytest.raises(CheckpointError):
            Source(ROOT / "bundles" / bundle, {"ckpt_dir": str(tmp_path)})
    assert not touched


def test_several_processes_start_no_teacher_when_they_are_initialised():
    for bundle in ALL_BUNDLES:
        steps = ConfigParser.load_config_file(files(bundle, "multi_gpu_train")[0])["initialize"]
        assert not any(name in step for step in steps for name in ("@train", "@targets", "@distiller", "@validate"))


def test_evaluation_and_export_start_no_teacher(trained, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a teacher was built")

    monkeypatch.setattr("amkd_monai.engines.prepare.known_teacher", never)
    monkeypatch.setattr("amkd_monai.engines.prepare.prepare_teachers", never)
    teachers = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
    made = built("kvasir_seg", ("train", "evaluate"), **places(trained), teachers=teachers)
    made.run()
    assert exported(trained, tmp_path / "d") == 0


def test_the_checks_take_less_than_50_ms(trained, monkeypatch):
    """Processor time of the checks in a start, the best of five: most is reading the config files once more."""
    original, spent = runs.check, []

    def timed(purpose):
        start = time.process_time()
        original(purpose)
        spent.append(time.process_time() - start)

    monkeypatch.setattr(runs, "check", timed)
    for names, values in (
        (("train",), {}),
        (("train", "evaluate"), places(trained)),
        (("inference",), places(trained)),
    ):
        for make in (built, commanded):
            spent.clear()
            for _ in range(5):
                make("kvasir_seg", names, **values)
            print(f"{'+'.join(names)}, {make.__name__}: {1000 * min(spent):.1f} ms")
            assert min(spent) < 0.05
    spent.clear()
    for _ in range(5):
        start = time.process_time()
        runs.hold(trained / "eval", trained / "models", trained / "cache")
        runs.end(trained / "eval", trained / "models", trained / "cache")
        spent.append(time.process_time() - start)
    print(f"locks: {1000 * min(spent):.1f} ms")
    assert min(spent) < 0.01
