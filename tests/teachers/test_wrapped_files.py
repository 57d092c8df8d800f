"""Checkpoints as public training scripts wrap them: the right network, or one sentence; never a part of it."""

import argparse
import codecs
import gzip
import json
import logging
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from amkd_monai.weights import CheckpointError, load_state_dict, load_strict, state_hash


class Net(nn.Module):
    """A convolution with batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


class Holder(nn.Module):
    """All of its keys begin with ``model.``."""

    def __init__(self):
        super().__init__()
        self.model = Net()


def state(seed=0):
    torch.manual_seed(seed)
    return Net().state_dict()


def other():
    return state(seed=1)


def prefixed(prefix, tensors=None):
    return {prefix + key: value for key, value in (tensors or state()).items()}


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        load_strict(Net(), load_state_dict(path), path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and text.endswith("."), text
    assert all(str(word) in text for word in words), text
    return text


RESUME = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}

WRAPPED = {
    "a tensor beside a container": lambda: {
        **RESUME,
        "arch": "resnet18",
        "state_dict": prefixed("module."),
        "best_acc1": torch.tensor(76.1),
    },
    "a metric as tensor": lambda: {"model": state(), "max_dice": torch.tensor(0.9), "ema_decay": torch.tensor([0.9])},
    "options": lambda: {"model": state(), **RESUME, "args": argparse.Namespace(lr=0.1)},
    "containers in containers": lambda: {"state_dict": {"model": {"module": prefixed("module.")}}, **RESUME},
    "Lightning": lambda: {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.1"},
    "Lightning, net": lambda: {"state_dict": prefixed("net.")},
    "encoder": lambda: prefixed("encoder."),
    "an entry encoder": lambda: {"encoder": state(), "decoder": {"weight": torch.ones(2)}},
    "torch.compile": lambda: prefixed("_orig_mod."),
    "DDP of torch.compile": lambda: prefixed("module._orig_mod."),
    "torch.compile in Lightning": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "nnU-Net": lambda: {"network_weights": prefixed("_orig_mod."), "optimizer_state": RESUME["optimizer"]},
    "timm's averaged weights": lambda: {"state_dict": other(), "state_dict_ema": state(), **RESUME},
    "DeiT's averaged weights": lambda: {"model": other(), "model_ema": prefixed("module."), **RESUME},
    "averaged weights alone": lambda: {"state_dict_ema": state()},
    "DINO": lambda: {"student": prefixed("module.backbone.", other()), "teacher": prefixed("backbone.")},
    "a container without tensors": lambda: {"model": {"name": "resnet18"}, "state_dict": state()},
    "model_state_dict": lambda: {"model_state_dict": state(), "optimizer_state_dict": RESUME["optimizer"]},
    "resume state beside flat weights": lambda: {**state(), **RESUME},
    "NumPy numbers": lambda: {
        "model": state(),
        "best": np.float64(0.9),
        "history": [np.float32(0.5), np.int64(3), np.bool_(True)],
    },
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_wrapped_network_is_loaded_whole(wrapping, tmp_path):
    torch.save(WRAPPED[wrapping](), tmp_path / "weights.ckpt")
    network = Net()
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(7)
    load_strict(network, load_state_dict(tmp_path / "weights.ckpt"), "weights.ckpt")
    assert state_hash(network.state_dict()) == state_hash(state())


@pytest.mark.parametrize("content", [lambda: state(), lambda: prefixed("model."), lambda: prefixed("module.model.")])
def test_a_network_that_has_a_wrappers_prefix_itself(content, tmp_path):
    torch.save(content(), tmp_path / "weights.pth")
    network = Holder()
    load_strict(network, load_state_dict(tmp_path / "weights.pth"), "weights.pth")
    assert state_hash(network.model.state_dict()) == state_hash(state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_values(dtype, tmp_path):
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    save_file(half, tmp_path / "weights.safetensors")
    network = Net()
    load_strict(network, load_state_dict(tmp_path / "weights.safetensors"), "weights")
    assert all(torch.equal(v.to(dtype), half[k]) for k, v in network.state_dict().items() if v.is_floating_point())


@pytest.mark.parametrize("name", ["weights.SAFETENSORS", "weights.pth", "weights.bin", "weights"])
def test_safetensors_under_any_name(name, tmp_path):
    save_file(state(), tmp_path / name)
    assert state_hash(load_state_dict(tmp_path / name)) == state_hash(state())


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorchs_format_under_the_name_of_safetensors(zipped, tmp_path):
    torch.save(state(), tmp_path / "weights.safetensors", _use_new_zipfile_serialization=zipped)
    assert state_hash(load_state_dict(tmp_path / "weights.safetensors")) == state_hash(state())


def test_of_several_networks_the_one_taken_is_named(tmp_path, caplog):
    torch.save({"model": other(), "model_ema": state()}, tmp_path / "weights.pth")
    with caplog.at_level(logging.WARNING, logger="amkd_monai"):
        load_state_dict(tmp_path / "weights.pth")
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'model_ema'" in message and "not from model" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"model": state(), "config": Path("/x")}, ["pathlib.PosixPath", "state_dict()"]),
        (lambda: Net(), ["test_wrapped_files.Net", "state_dict()"]),
        (lambda: {"generator": state(), "discriminator": other()}, ["generator, discriminator"]),
        (lambda: {"model": {"epoch": 3}, "best": torch.tensor(0.9)}, ["missing"]),
        (lambda: [state()], ["list"]),
        (lambda: {"state_dict": {**prefixed("model."), "loss.weight": torch.ones(2)}}, ["'model.'"]),
        (lambda: {"state_dict": prefixed("model.") | prefixed("model_ema.", other())}, ["'model.'"]),
        (lambda: {k: v for k, v in state().items() if not k.startswith("head")}, ["2 missing", "head.weight"]),
        (lambda: state() | {"head.weight": torch.ones(2, 4, dtype=torch.int8)}, ["another type", "head.weight"]),
    ],
)
def test_what_is_not_the_network_is_refused_with_the_true_reason(content, words, tmp_path):
    torch.save(content(), tmp_path / "weights.pth")
    assert "weights_only" not in refused(tmp_path / "weights.pth", *words)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["stem.0.weight", "stem.1.running_var"])
def test_nan_and_infinity_are_refused_by_the_name_of_the_tensor(value, dtype, name, tmp_path):
    bad = state()
    bad[name] = bad[name].clone()
    bad[name].view(-1)[-1] = value
    bad[name] = bad[name].to(dtype)
    torch.save({"model": bad}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", f"'{name}'", "NaN or infinity")


def _zip(path, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _half(path):
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-100])


PAGE = b"<html><title>Google Drive - Virus scan warning</title></html>"

KINDS = {
    "a page": (lambda p: p.write_bytes(PAGE), "web page"),
    "a page after a byte order mark": (lambda p: p.write_bytes(codecs.BOM_UTF8 + b"\r\n" + PAGE), "web page"),
    "a page in UTF-16": (lambda p: p.write_bytes(PAGE.decode().encode("utf-16")), "web page"),
    "a page after a comment": (lambda p: p.write_bytes(b"<!-- saved from -->\n" + PAGE), "web page"),
    "a page after an XML declaration": (lambda p: p.write_bytes(b'<?xml version="1.0"?>' + PAGE), "web page"),
    "an XML error": (lambda p: p.write_bytes(b"<Error><Code>AccessDenied</Code></Error>"), "web page"),
    "a Git LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git lfs pull",
    ),
    "JSON": (lambda p: p.write_text(json.dumps({"weight_map": {"a": "b"}}, indent=1)), "JSON"),
    "JSON after a byte order mark": (lambda p: p.write_bytes(codecs.BOM_UTF8 + b'{"message": "Not Found"}'), "JSON"),
    "text": (lambda p: p.write_text("Entry not found\n"), "text file"),
    "an empty file": (lambda p: p.write_bytes(b""), "empty"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), "zeros"),
    "half a zip": (_half, "cut off"),
    "another zip": (lambda p: _zip(p, **{"readme.txt": "no weights"}), "not a checkpoint"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"weights")), "compressed"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)), "HDF5"),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), ""),
    "TorchScript": (lambda p: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(p)), "TorchScript"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(kind, suffix, tmp_path):
    write, word = KINDS[kind]
    write(tmp_path / f"weights{suffix}")
    refused(tmp_path / f"weights{suffix}", word)
