import errno
import json
import os
import socket
import stat
import threading
import time

import pytest

from amkd_monai import atomic
from amkd_monai.atomic import atomic_path, atomic_write_bytes, atomic_write_json, exclusive_lock


def owner(**changes):
    pid = os.getpid()
    facts = {"pid": pid, "started": atomic._start_time(pid), "host": socket.gethostname(), "token": "x"}
    return json.dumps({**facts, **changes})


def test_bytes_and_json_replace_a_file_and_make_its_folder(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic_write_bytes(path, b"old")
    atomic_write_json(path, {"é": [1, 2.5, None], "surrogate": "\udcff"})
    assert json.loads(path.read_bytes()) == {"é": [1, 2.5, None], "surrogate": "\udcff"}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan")])
def test_what_json_cannot_express_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "run.json"
    atomic_write_json(path, 1)
    with pytest.raises((TypeError, ValueError)):
        atomic_write_json(path, value)
    assert path.read_text() == "1\n" and len(list(tmp_path.iterdir())) == 1


def test_the_temporary_path_keeps_folder_and_suffix(tmp_path):
    with atomic_path(tmp_path / "model.ts.npy") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".npy"
        assert atomic.TEMPORARY_MARK in temporary.name
        temporary.write_text("x")
        assert not (tmp_path / "model.ts.npy").exists()
    assert (tmp_path / "model.ts.npy").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "no", "elsewhere")])
def test_an_error_in_the_block_is_passed_on_and_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot write"), atomic_path(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "not writable"), (errno.EIO, "nothing half-written")],
)
def test_a_failing_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, code, reason):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=f"cannot write {path}: .*{reason}") as caught:
        atomic_write_bytes(path, b"new")
    assert caught.value.errno == code
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_data_is_flushed_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source, target):
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write_bytes(tmp_path / "file", b"x")
    assert calls == ["file", "replace", "folder"]


def test_a_lock_is_held_by_one_and_released_after_an_error(tmp_path):
    path = tmp_path / "new" / "lock"
    with pytest.raises(ZeroDivisionError), exclusive_lock(path):
        with pytest.raises(TimeoutError, match=f"held by process {os.getpid()}"), exclusive_lock(path):
            pass
        raise ZeroDivisionError
    assert not path.exists()


def test_a_lock_is_waited_for(tmp_path):
    path = tmp_path / "lock"
    order = []

    def second():
        with exclusive_lock(path, wait_s=10.0):
            order.append("second")

    with exclusive_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.15)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_one_of_many_takes_over_a_stale_lock_at_a_time(tmp_path):
    path = tmp_path / "lock"
    path.write_text(owner(started="0"))
    inside, most, done = [], [], []

    def enter():
        with exclusive_lock(path, wait_s=20.0):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()
            done.append(1)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8 and max(most) == 1


@pytest.mark.parametrize(
    "content",
    [owner(pid=2**22 + 1), owner(started="0")],
    ids=["process is gone", "its number was given to another"],
)
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content)
    with exclusive_lock(path):
        assert json.loads(path.read_text())["token"] != "x"
    assert not path.exists()


@pytest.mark.parametrize(
    "content", [owner(host="elsewhere", pid=2**22 + 1), owner(), ""], ids=["other host", "alive", "being written"]
)
def test_a_lock_that_may_be_held_is_left(tmp_path, content):
    path = tmp_path / "lock"
    path.write_text(content)
    with pytest.raises(TimeoutError, match="delete the file if it has"), exclusive_lock(path, wait_s=0.1):
        pass
    assert path.read_text() == content


def test_an_unreadable_lock_is_stale_after_a_while(tmp_path):
    path = tmp_path / "lock"
    path.write_text("{")
    os.utime(path, (time.time() - 60,) * 2)
    with exclusive_lock(path):
        pass


def test_a_lock_deleted_by_hand_and_taken_by_another_is_not_released(tmp_path):
    path = tmp_path / "lock"
    with exclusive_lock(path):
        path.write_text(owner())
    assert path.read_text() == owner()
