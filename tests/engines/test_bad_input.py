"""Bad input ends with one sentence that names the file or key and the remedy, and leaves earlier work intact."""

from __future__ import annotations

import shutil

import pytest
from bundle_runs import read_json, run, settings

from amkd_monai.data.datasets import get_task
from amkd_monai.errors import root_cause


@pytest.fixture(scope="module")
def polyps(tmp_path_factory):
    return get_task("kvasir_seg").write_phantom(tmp_path_factory.mktemp("polyps"), count=10, seed=3)


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    return get_task("msd_heart").write_phantom(tmp_path_factory.mktemp("hearts"), cases=4, seed=3)


def sentence(bundle, folder, data, configs=("train",), **overrides):
    values = settings(bundle, folder, folder / "cache", dataset_dir=str(data), **overrides)
    with pytest.raises(Exception) as caught:
        run(bundle, configs, values)
    text = str(root_cause(caught.value))
    assert "\n" not in text.strip(), text
    return text


def torch_load(file):
    import torch

    return torch.load(file, weights_only=True)


def first_training_id(folder):
    (split,) = (folder / "eval").glob("split_*.json")
    return read_json(split)["train"][0][0]


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def test_missing_folder(tmp_path):
    assert "no folder" in sentence("kvasir_seg", tmp_path, tmp_path / "nowhere")


def test_unpaired_mask(tmp_path, polyps):
    data = shutil.copytree(polyps, tmp_path / "Kvasir-SEG")
    victim = sorted((data / "masks").iterdir())[0]
    victim.unlink()
    assert victim.stem in sentence("kvasir_seg", tmp_path, data)


def test_corrupt_image_leaves_earlier_caches_and_checkpoints_intact(tmp_path, polyps):
    data = shutil.copytree(polyps, tmp_path / "Kvasir-SEG")
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", dataset_dir=str(data), max_epochs=1)
    run("kvasir_seg", ("train",), {**values, "admission": {"mode": "none"}})
    before = snapshot(tmp_path / "cache") | snapshot(tmp_path / "models")
    victim = data / "images" / f"{first_training_id(tmp_path)}.jpg"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    text = sentence("kvasir_seg", tmp_path, data)
    assert victim.name in text and "replace the file" in text
    after = snapshot(tmp_path / "cache") | snapshot(tmp_path / "models")
    kept = {p: s for p, s in before.items() if p.name != "content_hashes.json"}
    assert kept.items() <= after.items()


def test_corrupt_image_can_be_skipped_and_is_listed(tmp_path, polyps):
    data = shutil.copytree(polyps, tmp_path / "Kvasir-SEG")
    values = settings("kvasir_seg", tmp_path, tmp_path / "cache", dataset_dir=str(data), max_epochs=1, teachers=[])
    run("kvasir_seg", ("train",), values)
    name = first_training_id(tmp_path)
    victim = data / "images" / f"{name}.jpg"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    run("kvasir_seg", ("train",), {**values, "on_bad_sample": "skip"})
    assert read_json(tmp_path / "eval" / "run.json")["skipped_samples"]["train"] == [name]


def test_mask_of_another_size(tmp_path, polyps):
    from PIL import Image

    data = shutil.copytree(polyps, tmp_path / "Kvasir-SEG")
    victim = sorted((data / "masks").iterdir())[0]
    Image.new("RGB", (20, 30)).save(victim)
    assert victim.stem in sentence("kvasir_seg", tmp_path, data)


def test_truncated_volume(tmp_path, hearts):
    data = shutil.copytree(hearts, tmp_path / "Task02_Heart")
    victim = sorted((data / "imagesTr").glob("la_*.nii.gz"))[0]
    victim.write_bytes(victim.read_bytes()[:2000])
    assert victim.name in sentence("msd_heart", tmp_path, data)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"name": "x", "kind": "oracle"}, "unknown kind 'oracle'"),
        ({"name": "x", "kind": "timm", "model": "no_such_net"}, "no_such_net"),
        ({"name": "x", "kind": "timm", "model": "tf_efficientnet_lite1", "weights": "absent.pth"}, "absent.pth"),
        ({"name": "x", "kind": "specialist", "path": "absent.ts"}, "absent.ts"),
        ({"kind": "timm", "model": "tf_efficientnet_lite1"}, "no name"),
    ],
)
def test_wrong_teachers(tmp_path, polyps, teacher, words):
    assert words in sentence("kvasir_seg", tmp_path, polyps, teachers=[teacher])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -0.1),
        ("learning_rate", "nan"),
        ("weight_decay", -1),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("min_steps", -1),
        ("labelled_fraction", 2),
        ("learning_rate", "much"),
    ],
)
def test_values_that_no_training_can_have(tmp_path, polyps, name, value):
    text = sentence("kvasir_seg", tmp_path, polyps, **{f"recipe#{name}": value})
    assert f"recipe#{name}" in text and str(value) in text
    assert not (tmp_path / "models" / "model.pt").exists()


def test_a_training_that_diverges_ends_before_anything_is_kept(tmp_path, polyps):
    text = sentence("kvasir_seg", tmp_path, polyps, teachers=[], **{"recipe#learning_rate": 1e30, "max_epochs": 8})
    assert "not finite in step" in text and "learning rate" in text
    models = tmp_path / "models"
    for state in map(torch_load, models.glob("*.pt")):
        assert all(value.isfinite().all() for value in state.get("distiller", state).values())


def test_wrong_and_truncated_checkpoints(tmp_path, polyps):
    import torch

    models = tmp_path / "models"
    models.mkdir()
    configs = ("train", "evaluate")
    assert "run `training` first" in sentence("kvasir_seg", tmp_path, polyps, configs)
    torch.save({"weight": torch.zeros(3)}, models / "model.pt")
    assert "does not fit Student" in sentence("kvasir_seg", tmp_path, polyps, configs)
    (models / "model.pt").write_bytes((models / "model.pt").read_bytes()[:100])
    assert "truncated" in sentence("kvasir_seg", tmp_path, polyps, configs)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gate": "oracle"}, "no teacher gate 'oracle'"),
        ({"losses": {"outputs": 1.0}}, "losses#output"),
        ({"kd_temperature": {"start": 0.5}}, "kd_temperature#start is 0.5"),
        ({"admission": {"mode": "perhaps"}}, "admission options"),
        ({"labelled": 5000}, "5000"),
    ],
)
def test_wrong_settings(tmp_path, polyps, overrides, words):
    overrides = {"admission": {"mode": "none"}, **overrides}
    assert words in sentence("kvasir_seg", tmp_path, polyps, **overrides)
