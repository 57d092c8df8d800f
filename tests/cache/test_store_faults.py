import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_store
from toy_store import SHARDS, N, build, features, open_store

from amkd_monai import storage
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
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != LOCK}


def flip_byte(path, at=-7):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def edit_description(directory, **changes):
    path = directory / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "wanted"), [(["1/1"], 12), (["1/2", "2/2"], 24)])
def test_a_store_killed_many_times_equals_an_undisturbed_one(tmp_path, parts, wanted):
    """One builder of everything, and two that build their parts side by side."""
    expected = files_of(build(open_store(tmp_path / "calm")).directory)
    rng = random.Random(len(parts))
    kills = interrupted = 0
    directory = tmp_path / "killed-0"
    while kills < wanted:
        reached = len(list(directory.glob("v*"))) + rng.randint(0, 6)  # by progress, not by time
        processes = [start(directory, part) for part in parts]
        while len(list(directory.glob("v*"))) < reached and any(p.poll() is None for p in processes):
            time.sleep(0.0005)
        for process in processes:
            time.sleep(rng.uniform(0.0, 0.002))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        store = open_store(directory)
        interrupted += 0 < len(store.missing()) < SHARDS
        if directory.is_dir():
            assert store.verify() == {}  # no kill made a damaged shard look complete
        if store.is_complete:
            assert files_of(build(store).directory) == expected
            directory = tmp_path / f"killed-{kills}"
    assert files_of(build(open_store(directory)).directory) == expected
    assert interrupted >= 6  # kills did hit the middle of the work


@pytest.mark.slow
def test_two_builders_of_the_same_shards_do_no_harm(tmp_path):
    """Without any lock, and while each clears away what it takes for leftovers of the other."""
    expected = files_of(build(open_store(tmp_path / "calm")).directory)
    for turn in range(3):
        directory = tmp_path / f"both-{turn}"
        processes = [start(directory, "1/1", "unlocked") for _ in range(2)]
        for process in processes:
            process.communicate(timeout=300)
        assert [process.returncode for process in processes] == [0, 0]
        assert open_store(directory).verify() == {} and files_of(directory) == expected


@pytest.mark.parametrize("at", [-7, 3, 20, 60, 120, 300])
def test_a_flipped_byte_is_found_and_only_that_shard_is_computed_again(tmp_path, at):
    """In the data, the length of the header, its hash, its identity, its shapes."""
    store = build(open_store(tmp_path))
    before, path = files_of(tmp_path), store.path(1, 2)
    flip_byte(path, at)
    (fault,) = store.verify().values()
    assert store.verify().keys() == {(1, 2)} and str(path) in fault
    again = open_store(tmp_path)
    assert again.is_complete, "nothing is read at opening"
    np.testing.assert_array_equal(again.read("grid", [5]), features(0, [5])["grid"].astype(np.float16))
    with pytest.raises(StoreError, match=f"{path}.*run again") as caught:
        again.read("codes", [9], 1)
    assert "\n" not in str(caught.value)
    assert again.missing() == [(1, 2)]
    assert files_of(build(again).directory) == before and again.verify() == {}
    np.testing.assert_array_equal(again.read("grid", [9], 1), features(1, [9])["grid"].astype(np.float16))


def test_the_hash_of_a_shard_is_read_once_per_process(tmp_path, monkeypatch):
    store, hashed = build(open_store(tmp_path)), []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, *args: hashed.append(file.name) or real(file, *args))
    store = open_store(tmp_path)
    for array in ("grid", "codes", "grid"):
        store.read(array, [0, 1, 5])
    assert hashed == [str(store.path(0, 0)), str(store.path(0, 1))]


def test_a_missing_file_is_computed_and_a_short_one_is_refused_when_it_is_read(tmp_path):
    store = build(open_store(tmp_path))
    before = files_of(tmp_path)
    store.path(0, 0).unlink()
    os.truncate(store.path(0, 1), 200)
    again = open_store(tmp_path)
    assert again.missing() == [(0, 0)] and again.verify().keys() == {(0, 1)}
    with pytest.raises(StoreError, match="not computed yet"):
        again.read("grid", [0])
    with pytest.raises(StoreError, match=f"{store.path(0, 1)} has 200 bytes"):
        again.read("grid", [5])
    assert again.missing() == [(0, 0), (0, 1)]
    assert files_of(build(again).directory) == before


@pytest.mark.parametrize("other", ["shard", "view", "store", "images"])
def test_a_good_shard_of_something_else_is_refused(tmp_path, other):
    """Its size and its hash are right."""
    store = build(open_store(tmp_path / "a"))
    changes = {"key": {"teacher": "other"}} if other == "store" else {"content_hashes": [f"new {i}" for i in range(N)]}
    elsewhere = build(open_store(tmp_path / "b", **changes))
    source = {"shard": store.path(0, 2), "view": store.path(1, 1)}.get(other, elsewhere.path(0, 1))
    shutil.copyfile(source, store.path(0, 1))
    with pytest.raises(StoreError, match=f"{store.path(0, 1)} does not have the header of this shard"):
        open_store(tmp_path / "a").read("grid", [5])


def test_a_deleted_description_is_written_again_and_the_shards_stay(tmp_path):
    build(open_store(tmp_path))
    before = files_of(tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("v*")}
    (tmp_path / "store.json").unlink()
    store = open_store(tmp_path)
    assert store.is_complete
    assert files_of(build(store).directory) == before
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("v*")} == written


def test_a_store_that_is_removed_while_a_part_is_built_is_made_again(tmp_path):
    store = open_store(tmp_path / "a")
    store.write_shard(0, 0, features(0, range(4)))
    shutil.rmtree(tmp_path / "a")
    store.write_shard(0, 1, features(0, range(4, 8)))
    assert FeatureStore.open(tmp_path / "a").written() == {(0, 1)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_description_is_refused(tmp_path, share):
    build(open_store(tmp_path))
    path = tmp_path / "store.json"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(StoreError, match=r"store.json is damaged .*; delete its folder"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"format": 3}, "has format 3, not 2"),
        ({"origin": None}, "is damaged"),
        ({"shard_size": 5}, "another `shard_size`"),
        ({"views": 3, "view_parameters": [None] * 3}, "another `views`"),
        ({"key": {"teacher": "other", "size": 8}}, "another `key`"),
        ({"arrays": {"grid": {"shape": [3, 4, 4], "dtype": "float32"}}}, "another `arrays`"),
        ({"sample_ids": ["a", "b"], "content_hashes": ["c", "d"]}, "another `sample_ids`"),
        ({"content_hashes": [f"new {i}" for i in range(N)]}, "another `content_hashes`"),
        ({"content_hashes": ["a"]}, "is damaged"),
        ({"content_hashes": None}, "is damaged"),
    ],
)
def test_a_store_of_something_else_is_refused(tmp_path, stored, message):
    build(open_store(tmp_path))
    edit_description(tmp_path, **stored)
    with pytest.raises(StoreError, match=message) as caught:
        open_store(tmp_path)
    assert str(tmp_path) in str(caught.value) and "delete its folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry", [{"arrays": 5}, {"arrays": {"grid": {"shape": [0]}}}, {"views": "2"}, {"sample_ids": ["a"]}, {"key": None}]
)
def test_a_description_of_the_wrong_structure_cannot_be_opened(tmp_path, entry):
    build(open_store(tmp_path))
    edit_description(tmp_path, **entry)
    with pytest.raises(StoreError, match=r"is damaged .*; delete its folder") as caught:
        FeatureStore.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_second_builder_waits_and_a_killed_one_holds_nothing(tmp_path):
    process = start(tmp_path, "1/1", "hold")
    try:
        assert process.stdout.readline() == "holding\n"
        store = open_store(tmp_path)
        with pytest.raises(TimeoutError, match=f"{tmp_path / LOCK} is held by another process"):
            build(store)
    finally:
        process.kill()
    # Not reaped yet: the killed builder is a zombie, which still has its process id.
    assert build(store, wait_s=5.0).is_complete
    process.communicate()


def test_a_builder_that_waits_does_not_repeat_the_work(tmp_path):
    store = open_store(tmp_path)
    with store.building():
        process = start(tmp_path)
        for view, shard in store.missing():
            store.write_shard(view, shard, features(view, store.samples_of(shard)))
        written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("v*")}
    assert process.wait(timeout=300) == 0
    process.communicate()
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("v*")} == written


def test_building_sees_what_another_made_of_the_folder(tmp_path):
    early = open_store(tmp_path)
    build(open_store(tmp_path))
    with early.building():
        assert early.missing() == []
    late = FeatureStore.create_or_open(tmp_path / "x", {"a": 1}, ["s"], ["h"], {"grid": ArraySpec((1,))})
    build(open_store(tmp_path / "x"))
    with pytest.raises(StoreError, match="another `key`"), late.building():
        pass
    with pytest.raises(StoreError, match="another `key`"):
        late.create()
    build(open_store(tmp_path / "x"))  # the lock is free


def test_leftovers_of_a_killed_builder_are_removed(tmp_path):
    """Not those that may have a living writer: of a shard that is not there yet, and young."""
    store = open_store(tmp_path)
    store.write_shard(0, 0, features(0, range(4)))
    done, young, old, description = (
        tmp_path / f".{stem}{storage.TEMPORARY_MARK}1-aa.{suffix}"
        for stem, suffix in (("v0.s00000", "safetensors"), *[("v0.s00001", "safetensors")] * 2, ("store", "json"))
    )
    old = old.with_name(old.name.replace("aa", "bb"))
    for leftover in (done, young, old, description):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.create()
    assert [path.exists() for path in (done, young, old, description)] == [False, True, False, False]
    build(store)
    assert not young.exists()


def test_a_read_only_folder_is_read_and_a_write_is_one_sentence(tmp_path, monkeypatch):
    store = build(open_store(tmp_path))
    flip_byte(store.path(0, 0))
    store.path(0, 1).unlink()
    real_open = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *args, **kwargs)

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "unlink", refuse)
    store = open_store(tmp_path)
    assert store.read("grid", [N - 1]).shape == (1, 3, 4, 4) and store.missing() == [(0, 1)]
    with pytest.raises(StoreError, match=f"{store.path(0, 0)} .*: delete it, run again"):
        store.read("grid", [0])
    with pytest.raises(PermissionError, match=r"cannot write .*building.lock: the folder is not writable"):
        build(store)


@pytest.mark.parametrize("failing", ["store.json", "v0.s00000.safetensors"])
def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path, monkeypatch, failing):
    store, real_replace = open_store(tmp_path), os.replace

    def full(source, target):
        if target.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=f"cannot write {tmp_path / failing}: the disk is full; free some space"
    ) as caught:
        store.write_shard(0, 0, features(0, range(4)))
    assert caught.value.errno == errno.ENOSPC
    assert files_of(tmp_path).keys() <= {"store.json"} and (0, 0) in store.missing()
    monkeypatch.undo()
    store.write_shard(0, 0, features(0, range(4)))
    assert (0, 0) not in open_store(tmp_path).missing()


def test_a_write_cut_short_by_the_system_leaves_no_part_of_a_shard(tmp_path):
    """A real short write, by the limit on file size: the description fits below it, the shard does not."""
    arrays = {"grid": ArraySpec((64, 64))}
    store = open_store(tmp_path, n=8, arrays=arrays, views=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store.create()
    before = files_of(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises(OSError, match="cannot write") as caught:
            store.write_shard(0, 0, {"grid": np.zeros((4, 64, 64))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert files_of(tmp_path) == before
