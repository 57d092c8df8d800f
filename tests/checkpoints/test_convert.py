"""Conversion to safetensors: the same tensors, whole or not at all."""

import argparse
import resource

import pytest
import torch
from safetensors.torch import load_file
from teachers.tiny_teachers import TINY, official_state

from amkd_monai.__main__ import main
from amkd_monai.teachers.registry import build_teacher
from amkd_monai.weights import file_sha256, load_state_dict, state_hash


def wrapped(folder):
    path = folder / "USFM_latest.pth"
    state = official_state("usfm")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(x=1)}, path)
    return path, state


def test_the_converted_file_is_the_same_teacher(tmp_path, capsys):
    path, state = wrapped(tmp_path)
    target = tmp_path / "folder" / "USFM_latest.safetensors"
    assert main(["convert", str(path), str(target)]) == 0
    said = capsys.readouterr().out
    assert file_sha256(target) in said and str(len(state)) in said
    assert state_hash(load_file(target)) == state_hash(state)
    options = {"name": "u", **TINY["usfm"]}
    first, second = (build_teacher({**options, "weights": str(p)}) for p in (path, target))
    assert first.fingerprint == second.fingerprint and first.weights_file != second.weights_file


def test_tensors_that_share_memory_and_strides_are_written(tmp_path):
    matrix = torch.arange(6.0).view(2, 3)
    torch.save({"a": matrix, "b": matrix, "c": matrix.t(), "n": torch.tensor(3)}, tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors")]) == 0
    assert state_hash(load_file(tmp_path / "x.safetensors")) == state_hash(load_state_dict(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("source", "target", "word"),
    [("absent.pth", "out.safetensors", "absent.pth"), ("in.pth", "out.pth", ".safetensors"), ("page.pth",) * 2 + ("",)],
)
def test_what_cannot_be_converted_is_one_sentence_and_leaves_nothing(source, target, word, tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "in.pth")
    (tmp_path / "page.pth").write_text("<html>")
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and word in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_not_converted_onto_itself(tmp_path, capsys):
    path, _ = wrapped(tmp_path)
    same = tmp_path / "same.safetensors"
    assert main(["convert", str(path), str(same)]) == 0
    content = same.read_bytes()
    assert main(["convert", str(same), str(same)]) == 1
    assert "name another output" in capsys.readouterr().err and same.read_bytes() == content


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_old_file_or_none(existing, tmp_path, capsys):
    torch.save({"a": torch.randn(100_000)}, tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    if existing:
        target.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the operating system refuses to let a file grow, as it does when the disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        code = main(["convert", str(tmp_path / "in.pth"), str(target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert code == 1 and str(target) in error and error.count("\n") == 1, error
    assert "nothing half-written" in error
    assert sorted(tmp_path.iterdir()) == before and (not existing or target.read_bytes() == b"old")
