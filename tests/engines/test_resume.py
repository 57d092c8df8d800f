"""A run that is killed and resumed ends with the same student as one that is left alone."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from bundle_runs import run, settings
from helpers import ROOT

from amkd_monai.errors import root_cause
from amkd_monai.weights import CheckpointError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def small(folder, cache, **overrides):
    teachers = [{"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}]
    admission = {"mode": "all"}
    return settings("kvasir_seg", folder, cache, max_epochs=4, teachers=teachers, admission=admission, **overrides)


def outcome(folder):
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    resume = torch.load(folder / "models" / "distillation.pt", weights_only=True)
    rows = list(csv.DictReader((folder / "eval" / "history.csv").open()))
    return state, resume, rows


def assert_equal_runs(first, second):
    for a, b in zip(outcome(first), outcome(second), strict=True):
        _assert_equal(a, b)


def _assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("undisturbed")
    run("kvasir_seg", ("train",), small(folder, cache))
    return folder


def command(folder, cache, *extra):
    values = small(folder, cache)
    values.pop("bundle_root")
    arguments = [part for k, v in values.items() for part in (f"--{k}", v if isinstance(v, str) else repr(v))]
    config = "bundles/kvasir_seg/configs/train.json"
    return [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config, *arguments, *extra]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(tmp_path, cache, undisturbed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path, cache), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    history = tmp_path / "eval" / "history.csv"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if history.is_file() and len(history.read_text().splitlines()) >= 3:  # two epochs are done
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(0.3)  # into the third epoch
    process.send_signal(signal.SIGKILL)
    process.wait()
    epochs = torch.load(tmp_path / "models" / "distillation.pt", weights_only=True)["epoch"]
    assert 1 <= epochs < 4
    resumed = subprocess.run(
        command(tmp_path, cache, "--resume", "true"), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"resumed after epoch {epochs}" in resumed.stdout + resumed.stderr
    assert_equal_runs(undisturbed, tmp_path)


def test_a_run_repeats_itself(tmp_path, cache, undisturbed):
    run("kvasir_seg", ("train",), small(tmp_path, cache))
    assert_equal_runs(undisturbed, tmp_path)


def test_another_seed_gives_another_student(tmp_path, cache, undisturbed):
    run("kvasir_seg", ("train",), small(tmp_path, cache, seed=1))
    first, second = outcome(undisturbed)[0], outcome(tmp_path)[0]
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_resuming_another_run_is_refused(undisturbed, cache):
    with pytest.raises(RuntimeError) as caught:
        run("kvasir_seg", ("train",), small(undisturbed, cache, gate="uniform", resume=True))
    cause = root_cause(caught.value)
    assert isinstance(cause, CheckpointError) and "another gate" in str(cause)


def test_resuming_without_a_checkpoint_is_refused(tmp_path, cache):
    with pytest.raises(RuntimeError) as caught:
        run("kvasir_seg", ("train",), small(tmp_path, cache, resume=True))
    assert "nothing to resume" in str(root_cause(caught.value))
