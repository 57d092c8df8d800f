import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_store
from toy_store import SHARDS, N, build, features, open_store

from amkd_monai import atomic
from amkd_monai.cache.store import LOCK, ArraySpec, FeatureStore, StoreError

ROOT = Path(__file__).resolve().parents[2]


def start(directory, part="1/1", *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, toy_store.__file__, str(directory), part, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip_byte(path, at=-7):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def edit_manifest(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "wanted"), [(["1/1"], 12), (["1/2", "2/2"], 24)])
def test_a_store_killed_many_times_equals_an_undisturbed_one(tmp_path, caplog, parts, wanted):
    """One builder of everything, and two that build their parts side by side."""
    expected = files_of(build(open_store(tmp_path / "calm")).directory)
    rng = random.Random(len(parts))
    kills = interrupted = 0
    directory = tmp_path / "killed-0"
    while kills < wanted:
        reached = len(list(directory.glob("grid.*"))) + rng.randint(0, 6)  # by progress, not by time
        processes = [start(directory, part) for part in parts]
        while len(list(directory.glob("grid.*"))) < reached and any(p.poll() is None for p in processes):
            time.sleep(0.0005)
        for process in processes:
            time.sleep(rng.uniform(0.0, 0.002))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        store = open_store(directory)  # reads every hash
        interrupted += 0 < len(store.missing()) < SHARDS
        if store.is_complete:
            assert {**files_of(directory), LOCK: b""} == {**expected, LOCK: b""}  # the lock may be left
            directory = tmp_path / f"killed-{kills}"
    assert files_of(build(open_store(directory)).directory) == expected
    assert interrupted >= 6  # kills did hit the middle of the work
    assert "computed again" not in caplog.text  # and never made a damaged shard look complete


@pytest.mark.parametrize("name", ["grid.v1.s00002.npy", "codes.scale.v1.s00002.npy"])
@pytest.mark.parametrize("at", [-7, 60])
def test_a_flipped_byte_is_found_and_only_that_shard_is_computed_again(tmp_path, caplog, name, at):
    store = build(open_store(tmp_path))
    before = files_of(tmp_path)
    flip_byte(tmp_path / name, at)
    assert store.verify() == {(1, 2): f"{name} does not have the recorded hash"}
    assert open_store(tmp_path, check="size").is_complete
    again = open_store(tmp_path)
    assert again.missing() == [(1, 2)] and f"{name} does not have the recorded hash" in caplog.text
    build(again)
    assert files_of(tmp_path) == before and again.verify() == {}


def test_building_forgets_damaged_shards_for_good(tmp_path):
    build(open_store(tmp_path))
    flip_byte(tmp_path / "grid.v0.s00001.npy")
    (tmp_path / "codes.v1.s00000.npy").unlink()
    store = open_store(tmp_path)
    with store.building():
        assert store.missing() == [(0, 1), (1, 0)]
    assert open_store(tmp_path, check="size").missing() == [(0, 1), (1, 0)]
    with pytest.raises(StoreError, match="not computed yet"):
        store.read("grid", [5])
    build(store)
    np.testing.assert_array_equal(store.read("grid", [5]), features(0, [5])["grid"].astype(np.float16))


def test_a_damaged_shard_stays_damaged_when_another_process_adds_one(tmp_path):
    store = open_store(tmp_path)
    with store.building():
        store.write_shard(0, 0, features(0, range(4)))
    flip_byte(tmp_path / "grid.v0.s00000.npy")
    blind, careful = open_store(tmp_path, check="size"), open_store(tmp_path)
    assert (0, 0) in careful.missing()
    with blind.building():
        blind.write_shard(0, 1, features(0, range(4, 8)))
    careful.refresh()
    assert (0, 0) in careful.missing() and (0, 1) not in careful.missing()


def test_a_missing_or_short_file_is_found_without_reading(tmp_path, caplog):
    build(open_store(tmp_path))
    (tmp_path / "grid.v0.s00000.npy").unlink()
    os.truncate(tmp_path / "grid.v0.s00001.npy", 200)
    assert open_store(tmp_path, check="size").missing() == [(0, 0), (0, 1)]
    assert "cannot be read (No such file" in caplog.text and "has 200 bytes instead of" in caplog.text


def test_a_file_damaged_after_opening_is_a_clear_error(tmp_path):
    store = build(open_store(tmp_path))
    flip_byte(tmp_path / "grid.v0.s00000.npy", at=0)
    np.save(tmp_path / "grid.v0.s00001.npy", np.zeros((4, 3), np.float16))
    with pytest.raises(StoreError, match=r"grid.v0.s00000.npy cannot be read.*run again"):
        store.read("grid", [0])
    with pytest.raises(StoreError, match=r"s00001.npy holds float16 \(4, 3\), not float16 \(4, 3, 4, 4\)"):
        store.read("grid", [4])


def test_a_deleted_manifest_starts_afresh(tmp_path, caplog):
    build(open_store(tmp_path))
    before = files_of(tmp_path)
    (tmp_path / "manifest.json").unlink()
    store = open_store(tmp_path)
    assert len(store.missing()) == SHARDS and "all of them are computed again" in caplog.text
    build(store)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_manifest_is_refused(tmp_path, share):
    build(open_store(tmp_path))
    path = tmp_path / "manifest.json"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(StoreError, match=r"manifest.json is damaged .*; delete its folder"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "committed", [[], {"0": {}}, {"0/0": []}, {"0/0": {"grid.v0.s00000.npy": {"bytes": None, "sha256": ""}}}]
)
def test_a_manifest_of_the_wrong_structure_is_refused(tmp_path, committed):
    build(open_store(tmp_path))
    edit_manifest(tmp_path, committed=committed)
    with pytest.raises(StoreError, match=r"manifest.json is damaged"):
        open_store(tmp_path)


def test_a_manifest_that_names_other_files_does_not_mislead(tmp_path):
    build(open_store(tmp_path))
    committed = json.loads((tmp_path / "manifest.json").read_text())["committed"]
    edit_manifest(tmp_path, committed={**committed, "0/0": committed["0/1"]})
    assert open_store(tmp_path, check="size").missing() == [(0, 0)]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"format": 2}, "has format 2 where 1 is needed"),
        ({"byte_order": "big" if sys.byteorder == "little" else "little"}, "has byte_order '(big|little)' where"),
        ({"shard_size": 5}, "was built with shard_size 5, not 4"),
        ({"views": 3}, "was built with views 3, not 2"),
        ({"key": {"teacher": "other", "size": 8}}, "was computed with another teacher;"),
        ({"arrays": {"grid": {"shape": [3, 4, 4], "dtype": "float32"}}}, "was built with arrays"),
        ({"sample_ids": ["a", "b"]}, r"another list of samples \(2 stored, 50 asked for\)"),
        ({"content_hashes": ["a"]}, "is damaged"),
        ({"content_hashes": None}, "is damaged"),
    ],
)
def test_a_store_of_something_else_is_refused(tmp_path, stored, message):
    build(open_store(tmp_path))
    edit_manifest(tmp_path, **stored)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(tmp_path)
    assert str(tmp_path) in str(caught.value) and "delete its folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry", [{"arrays": 5}, {"arrays": {"grid": {"shape": [0]}}}, {"views": "2"}, {"sample_ids": ["a"]}, {"key": None}]
)
def test_a_manifest_of_the_wrong_structure_cannot_be_opened(tmp_path, entry):
    build(open_store(tmp_path))
    edit_manifest(tmp_path, **entry)
    with pytest.raises(StoreError, match=r"is damaged .*; delete its folder") as caught:
        FeatureStore.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_changed_image_is_refused_by_name(tmp_path):
    build(open_store(tmp_path))
    hashes = [f"hash of {i}" for i in range(N)]
    hashes[7] = "new"
    with pytest.raises(StoreError, match="is stale: image 'case_7' changed since"):
        open_store(tmp_path, content_hashes=hashes)
    hashes[9] = "new"
    with pytest.raises(StoreError, match="image 'case_7' and 1 more changed"):
        open_store(tmp_path, content_hashes=hashes)


def test_a_second_builder_is_told_who_builds_and_a_dead_one_is_taken_over(tmp_path):
    process = start(tmp_path, "1/1", "hold")
    try:
        assert process.stdout.readline() == "holding\n"
        store = open_store(tmp_path)
        with pytest.raises(TimeoutError, match=f"held by process {process.pid} on {socket.gethostname()}"):
            build(store)
    finally:
        process.kill()
    # Not reaped yet: the killed builder is a zombie, which still has its process id.
    assert build(store, wait_s=5.0).is_complete
    process.communicate()
    assert not (tmp_path / LOCK).exists()


def test_a_builder_that_waits_does_not_repeat_the_work(tmp_path):
    store = open_store(tmp_path)
    with store.building():
        process = start(tmp_path)
        for view, shard in store.missing():
            store.write_shard(view, shard, features(view, store.samples_of(shard)))
        written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    assert process.wait(timeout=20) == 0
    process.communicate()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")} == written


def test_building_sees_what_another_made_of_the_folder(tmp_path):
    early = open_store(tmp_path)
    build(open_store(tmp_path))
    with early.building():
        assert early.missing() == []
    late = FeatureStore.create_or_open(tmp_path / "x", {"a": 1}, ["s"], ["h"], {"grid": ArraySpec((1,))})
    build(open_store(tmp_path / "x"))
    with pytest.raises(StoreError, match="was computed with another"), late.building():
        pass
    assert not (tmp_path / "x" / LOCK).exists()


def test_leftovers_of_a_killed_builder_are_removed(tmp_path):
    leftover = tmp_path / f".grid.v0.s00000{atomic.TEMPORARY_MARK}1-aa.npy"
    leftover.write_bytes(b"half")
    build(open_store(tmp_path))
    assert not leftover.exists()


def test_a_read_only_folder_is_read_and_a_write_is_one_sentence(tmp_path, monkeypatch):
    build(open_store(tmp_path))
    flip_byte(tmp_path / "grid.v0.s00000.npy")
    real_open = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    store = open_store(tmp_path)
    assert store.read("grid", [N - 1]).shape == (1, 3, 4, 4) and store.missing() == [(0, 0)]
    with pytest.raises(PermissionError, match=r"cannot write .*building.lock: the folder is not writable"):
        build(store)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch, failing):
    """Each of the four files of a write in turn: grid, codes, scale, manifest."""
    store = open_store(tmp_path)
    real_replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real_replace(source, target)

    with store.building():
        before = files_of(tmp_path)
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"cannot write .*: the disk is full; free some space") as caught:
            store.write_shard(0, 0, features(0, range(4)))
        assert caught.value.errno == errno.ENOSPC
        assert files_of(tmp_path) == before and (0, 0) in store.missing()
        store.write_shard(0, 0, features(0, range(4)))
    assert (0, 0) not in open_store(tmp_path).missing()


def test_a_write_cut_short_by_the_system_leaves_no_part_of_a_shard(tmp_path):
    """A real short write, by the limit on file size: the manifest fits below it, the shard does not."""
    arrays = {"grid": ArraySpec((64, 64))}
    store = open_store(tmp_path, n=8, arrays=arrays, views=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.building():
        before = files_of(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        try:
            with pytest.raises(OSError, match="cannot write") as caught:
                store.write_shard(0, 0, {"grid": np.zeros((4, 64, 64))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert files_of(tmp_path) == before
