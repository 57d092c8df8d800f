"""A run that is killed and resumed ends with the same student as one that is left alone."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import time

import pytest
import torch
from bundle_runs import run, settings

from amkd_monai.engines.handlers import RunRecord
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


@contextlib.contextmanager
def training(folder, cache, **options):
    """A training in a process of its own, forked so that MONAI is imported once; killed at the end of the block."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run("kvasir_seg", ("train",), small(folder, cache, **options))
            code = 0
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def has_ended(child):
    """Whether a process has ended, left for ``waitpid``."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_the_record_of_a_resumed_run_holds_the_time_of_all_its_processes(tmp_path, cache, undisturbed):
    file, checkpoint = tmp_path / "eval" / "run.json", tmp_path / "models" / "distillation.pt"
    with training(tmp_path, cache) as child:
        while not (checkpoint.is_file() or has_ended(child)):
            time.sleep(0.01)
    spent = {"cpu_seconds": 1000.0, "seconds": 5000.0, "peak_rss_mb": 10**6}
    file.write_text(json.dumps(json.loads(file.read_text()) | spent))
    counted = RunRecord.counted
    run("kvasir_seg", ("train",), small(tmp_path, cache, resume=True))
    record = json.loads(file.read_text())
    assert record["status"] == "completed" and record["seconds"] > 5000 and record["peak_rss_mb"] == 10**6
    assert counted > 0  # of the undisturbed run, in this process
    assert 1000 < record["cpu_seconds"] <= 1000 + time.process_time() - counted + 0.1  # it is rounded


@pytest.mark.slow
def test_a_run_killed_many_times_resumes_to_the_same_result(tmp_path, cache, undisturbed):
    """SIGKILL at random moments: while it starts, trains, validates and writes."""
    rng, kills, resumed, finished, folder = random.Random(0), 0, set(), 0, tmp_path / "0"
    while (more := kills < 10 or (len(resumed - {0}) < 2 and kills < 40)) or not finished:
        checkpoint = folder / "models" / "distillation.pt"
        before = torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.is_file() else 0
        resumed.add(before)
        with training(folder, cache, resume=before > 0) as child:
            deadline = time.monotonic() + 120
            stamp = checkpoint.stat().st_mtime_ns if before else 0
            while not has_ended(child) and time.monotonic() < deadline and more:
                if checkpoint.is_file() and checkpoint.stat().st_mtime_ns != stamp:  # another epoch is done
                    time.sleep(rng.uniform(0, 0.5))
                    break
                if rng.random() < 0.002:
                    break
                time.sleep(0.01)
            while not more and not has_ended(child) and time.monotonic() < deadline:
                time.sleep(0.01)
            ended = has_ended(child)
        kills += not ended
        if ended:
            assert_equal_runs(undisturbed, folder)
            finished, folder = finished + 1, tmp_path / str(finished + 1)
    assert len(resumed - {0}) >= 2


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
    assert isinstance(cause, CheckpointError) and "another gate:" in str(cause)


def test_resuming_without_a_checkpoint_is_refused(tmp_path, cache):
    with pytest.raises(RuntimeError) as caught:
        run("kvasir_seg", ("train",), small(tmp_path, cache, resume=True))
    assert "nothing to resume" in str(root_cause(caught.value))
