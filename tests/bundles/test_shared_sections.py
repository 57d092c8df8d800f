"""What bundles share stays equal: all of them where the kind of answer plays no part, else all of one kind."""

from __future__ import annotations

import json

import pytest
from helpers import ROOT

from amkd_monai.tasks import TASKS

BUNDLES = sorted(name for p in ROOT.glob("bundles/*/configs/train.json") if (name := p.parent.parent.name) in TASKS)
KINDS = ("segmentation", "classification")
EVERYWHERE = (
    "imports",
    "output_dir",
    "ckpt_dir",
    "cache_dir",
    "device",
    "teachers",
    "gate",
    "gate_options",
    "losses",
    "init_from",
    "init_parts",
    "loss_gate",
    "loss_gate_options",
    "return_code",
    "code_channels",
    "standardisation",
    "contrastive",
    "method",
    "kd_temperature",
    "targets",
    "admission",
    "distiller",
    "optimizer",
    "lr_scheduler",
    "facts",
    "best_student",
    "run_record",
    "initialize",
    "training",
    "run",
)
OF_ONE_KIND = ("distiller_def",)
TRAIN = ("dataloader", "handlers", "trainer")
VALIDATE = ("dataset", "dataloader", "evaluator")
BY_KIND = {"segmentation": ("batch_dice",), "classification": ("class_weights",)}


def config(bundle, name):
    return json.loads((ROOT / "bundles" / bundle / "configs" / f"{name}.json").read_text())


def without(section, *keys):
    return {key: value for key, value in section.items() if key not in keys}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_sections_that_know_nothing_of_the_answer_are_equal_in_all_bundles(bundle):
    first, other = config(BUNDLES[0], "train"), config(bundle, "train")
    for key in EVERYWHERE:
        assert other[key] == first[key], key
    for section in TRAIN:
        assert other["train"][section] == first["train"][section], section
    for section in VALIDATE:
        assert other["validate"][section] == first["validate"][section], section
    assert without(other["train"]["dataset"], "num_classes") == without(first["train"]["dataset"], "num_classes")
    own = [key for keys in BY_KIND.values() for key in keys]
    assert without(other["distiller_def"], *own) == without(first["distiller_def"], *own)
    for name in ("mlflow", "mlflow_evaluate", "multi_gpu_train", "paper"):
        assert config(bundle, name) == config(BUNDLES[0], name)


def test_the_bundle_of_several_tasks_has_the_same_method_settings_and_opens_all_bundles():
    shared, first = config("multitask", "train"), config(BUNDLES[0], "train")
    assert list(shared["tasks"]) and set(shared["tasks"]) == set(BUNDLES)
    for key in set(EVERYWHERE) - {"imports", "cache_dir", "method", "targets", "facts"}:
        assert shared[key] == first[key], key
    assert set(shared["settings"]) <= set(first), "what is set for all tasks is a setting of each"
    assert {**config("multitask", "multi_gpu_train"), "distiller": 0} == {
        **config(BUNDLES[0], "multi_gpu_train"),
        "distiller": 0,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_sections_that_hang_on_the_answer_are_equal_in_bundles_of_one_kind(kind):
    first, *others = (config(b, "train") for b in BUNDLES if TASKS[b].kind == kind)
    for other in others:
        assert other["distiller_def"] == first["distiller_def"]
        for part in ("train", "validate"):
            assert other[part]["postprocessing"] == first[part]["postprocessing"]
            assert list(other[part]["key_metric"].values()) == list(first[part]["key_metric"].values())
        assert other["validate"]["handlers"] == first["validate"]["handlers"]
    assert set(BY_KIND[kind]) <= set(first["distiller_def"])


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if TASKS[b].kind == "classification"])
def test_a_class_bundle_prepares_images_alike_in_every_config(bundle):
    train, inference = config(bundle, "train"), config(bundle, "inference")
    assert train["train"]["preprocessing"] == train["validate"]["preprocessing"] == inference["preprocessing"]
    assert "validate#preprocessing" not in config(bundle, "evaluate"), "the test section is prepared as validation is"
    assert train["image_size"] == inference["image_size"] == _input_size(bundle)
    assert train["network_def"]["num_classes"] == len(TASKS[bundle].classes) == inference["network_def"]["num_classes"]


def _input_size(bundle):
    (side, other) = config(bundle, "metadata")["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert side == other
    return side
