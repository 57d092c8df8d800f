import errno
import hashlib
import os

import pytest

from amkd_monai import content
from amkd_monai.storage import content_hashes, file_sha256, fingerprint


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
    real = content.file_sha256

    def spy(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(content, "file_sha256", spy)
    return names


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) * 2 + 3])
def test_hash_is_sha256_of_the_bytes(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "image").write_bytes(data[:size])
    assert file_sha256(tmp_path / "image") == hashlib.sha256(data[:size]).hexdigest()


def test_a_memo_saves_reading(tmp_path, images, read):
    memo = tmp_path / "memo" / "hashes.json"
    first = content_hashes(images, memo)
    assert first == [hashlib.sha256(path.read_bytes()).hexdigest() for path in images] and len(read) == 3
    read.clear()
    assert content_hashes(images[::-1], memo) == first[::-1] and read == []


@pytest.mark.parametrize("data", [b"z" * 100, b"z" * 101], ids=["same size", "other size"])
def test_a_changed_file_is_read_again(tmp_path, images, read, data):
    memo = tmp_path / "hashes.json"
    first = content_hashes(images, memo)
    read.clear()
    images[1].write_bytes(data)
    os.utime(images[1], ns=(1, images[1].stat().st_mtime_ns + (len(data) == 100)))
    assert content_hashes(images, memo) == [first[0], hashlib.sha256(data).hexdigest(), first[2]]
    assert read == ["b.png"]


def test_the_memo_keeps_files_of_other_calls(tmp_path, images, read):
    memo = tmp_path / "hashes.json"
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
    memo = tmp_path / "hashes.json"
    memo.write_bytes(damage)
    expected = content_hashes(images)
    assert content_hashes(images, memo) == expected
    assert "built again" in caplog.text
    read.clear()
    assert content_hashes(images, memo) == expected and read == []


def test_a_memo_that_cannot_be_written_is_announced(tmp_path, images, monkeypatch, caplog):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(os, "replace", full)
    assert len(content_hashes(images, tmp_path / "hashes.json")) == 3
    assert "the disk is full" in caplog.text and not (tmp_path / "hashes.json").exists()


def test_a_missing_file_is_an_error(tmp_path, images):
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        content_hashes([*images, tmp_path / "gone.png"], tmp_path / "hashes.json")


def test_fingerprint_depends_on_values_only():
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1}) != fingerprint({"a": 1})
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint(["ab"]) and len(fingerprint()) == 64
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        fingerprint(object())
