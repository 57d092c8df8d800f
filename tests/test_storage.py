import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from amkd_monai import storage
from amkd_monai.storage import (
    CONTENT_HASHES,
    atomic_folder,
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    content_hashes,
    exclusive_lock,
    file_sha256,
    fingerprint,
)

HOLD = """
import sys, time
from amkd_monai.storage import exclusive_lock
with exclusive_lock(sys.argv[1]):
    print("holding", flush=True)
    time.sleep(60)
"""


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
        assert storage.TEMPORARY_MARK in temporary.name
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
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "not writable"), (errno.EIO, "no partial file")],
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


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_appears_whole(tmp_path, replace):
    target = tmp_path / "new" / "bundle"
    if replace:
        for half in (target, target.with_name(f".bundle{storage.TEMPORARY_MARK}1-aa")):
            half.mkdir(parents=True)
            (half / "half").write_text("of a killed run")
    with atomic_folder(target, replace=replace) as folder:
        assert folder.parent == target.parent and storage.TEMPORARY_MARK in folder.name
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("x")
        assert not (target / "inside").exists()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/bundle",
        "new/bundle/inside",
        "new/bundle/inside/file",
    ]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask, "others may read it as they may read any folder"


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(FileExistsError, match=str(target)), atomic_folder(target):
        raise AssertionError("the block must not run")
    with pytest.raises(FileExistsError, match=str(tmp_path / "late")), atomic_folder(tmp_path / "late") as folder:
        (folder / "file").write_text("x")
        (tmp_path / "late").mkdir()  # by another process meanwhile
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "late"]
    assert [path.name for path in target.iterdir()] == ["mine"] and not any((tmp_path / "late").iterdir())


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), FileNotFoundError(2, "no", "elsewhere")])
@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_no_folder(tmp_path, error, replace):
    target = tmp_path / "bundle"
    if replace:
        target.mkdir()
    with pytest.raises(type(error)) as caught, atomic_folder(target, replace=replace) as folder:
        (folder / "file").write_text("half")
        raise error
    assert caught.value is error and list(tmp_path.iterdir()) == [target] * replace


def test_a_full_disk_is_one_sentence_that_names_the_folder(tmp_path):
    sentence = f"cannot write {tmp_path / 'bundle'}: the disk is full"
    with pytest.raises(OSError, match=sentence), atomic_folder(tmp_path / "bundle") as folder:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "file"))
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_and_released_after_an_error(tmp_path):
    path = tmp_path / "new" / "lock"
    with pytest.raises(ZeroDivisionError), exclusive_lock(path):
        with pytest.raises(TimeoutError, match=str(path)), exclusive_lock(path):
            pass
        raise ZeroDivisionError
    with exclusive_lock(path):
        pass


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


def test_a_lock_is_held_by_one_thread_at_a_time(tmp_path):
    inside, most, done = [], [], []

    def enter():
        with exclusive_lock(tmp_path / "lock", wait_s=20.0):
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


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(TimeoutError, match=f"{path} is held by another process"), exclusive_lock(path, wait_s=0.2):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
    # Not reaped yet: the killed process is a zombie, which still has its process id.
    with exclusive_lock(path, wait_s=5.0):
        pass
    process.communicate()


def test_a_lock_file_that_is_left_locks_nothing(tmp_path):
    """Nor does one of an earlier version, which named its owner."""
    path = tmp_path / "lock"
    path.write_text('{"pid": 1, "host": "elsewhere"}')
    with exclusive_lock(path):
        pass


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")], ids=["ENOSYS", "ENOLCK"]
)
def test_without_flock_the_file_is_the_lock_and_that_is_said(tmp_path, monkeypatch, caplog, error):
    def acquire(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    path = tmp_path / "lock"
    with exclusive_lock(path):
        assert path.is_file() and str(path) in caplog.text
        with pytest.raises(TimeoutError, match=str(path)), exclusive_lock(path):
            pass
    with exclusive_lock(path):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path, flags, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    sentence = f"cannot write {tmp_path / 'lock'}: the folder is not writable"
    with pytest.raises(PermissionError, match=sentence), exclusive_lock(tmp_path / "lock"):
        pass


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "ç")]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    return paths


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were really read."""
    names = []
    real = storage.file_sha256

    def spy(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(storage, "file_sha256", spy)
    return names


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) * 2 + 3])
def test_hash_is_sha256_of_the_bytes(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "image").write_bytes(data[:size])
    assert file_sha256(tmp_path / "image") == hashlib.sha256(data[:size]).hexdigest()


def test_a_memo_saves_reading(tmp_path, images, read):
    memo = tmp_path / "memo"
    first = content_hashes(images, memo)
    assert first == [hashlib.sha256(path.read_bytes()).hexdigest() for path in images] and len(read) == 3
    read.clear()
    assert content_hashes(images[::-1], memo) == first[::-1] and read == []


@pytest.mark.parametrize("data", [b"z" * 100, b"z" * 101], ids=["same size", "other size"])
def test_a_changed_file_is_read_again(tmp_path, images, read, data):
    memo = tmp_path
    first = content_hashes(images, memo)
    read.clear()
    images[1].write_bytes(data)
    os.utime(images[1], ns=(1, images[1].stat().st_mtime_ns + (len(data) == 100)))
    assert content_hashes(images, memo) == [first[0], hashlib.sha256(data).hexdigest(), first[2]]
    assert read == ["b.png"]


def test_the_memo_keeps_files_of_other_calls(tmp_path, images, read):
    memo = tmp_path
    content_hashes(images[:2], memo)
    content_hashes(images[2:], memo)
    read.clear()
    content_hashes(images, memo)
    assert read == []


def test_without_a_memo_every_file_is_read(images, read):
    content_hashes(images)
    content_hashes(images)
    assert len(read) == 6


@pytest.mark.parametrize("damage", [b"", b'{"a', b"\xff\xfe", b"[]", b'{"a": [1, 2]}', b'{"a": [1, 2, "short"]}'])
def test_a_damaged_memo_is_announced_and_rebuilt(tmp_path, images, read, caplog, damage):
    (tmp_path / CONTENT_HASHES).write_bytes(damage)
    expected = content_hashes(images)
    assert content_hashes(images, tmp_path) == expected
    assert "built again" in caplog.text
    read.clear()
    assert content_hashes(images, tmp_path) == expected and read == []


def test_a_memo_that_cannot_be_written_is_announced(tmp_path, images, monkeypatch, caplog):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(os, "replace", full)
    assert len(content_hashes(images, tmp_path)) == 3
    assert "the disk is full" in caplog.text and not (tmp_path / CONTENT_HASHES).exists()


def test_a_missing_file_is_an_error(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        content_hashes([*images, tmp_path / "gone.png"], tmp_path)


def test_fingerprint_depends_on_values_only():
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1}) != fingerprint({"a": 1})
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint(["ab"]) and len(fingerprint()) == 64
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint(object())
