"""Atomic files and folders, a lock for one writing process, and hashes.

Everything is written next to its final place under a temporary name, flushed to the disk, and then renamed: a process
killed at any moment leaves the old file or the new one. Hashes of files and settings name what is computed from them.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")

TEMPORARY_MARK = ".tmp-"  # in the name of every temporary file, by which leftovers of killed processes are found
CONTENT_HASHES = "content_hashes.json"
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_REASONS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; free some space and run again"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "the folder is not writable; choose another"),
}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, of its suffix; it becomes ``path`` when the block ends without an error.

    The folder is made if it is missing. After an OSError the old file is untouched.
    """
    target = Path(path)
    temporary = _temporary(target)
    try:
        with _one_sentence(target, temporary, target, target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, target)  # noqa: PTH105 - os.replace is the call whose atomicity is documented
            _flush_to_disk(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically; errors as in :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | os.PathLike[str], obj: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file atomically; NaN and infinity, which JSON lacks, raise a ValueError and nothing is written."""
    atomic_write_bytes(path, (json.dumps(obj, indent=indent, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder next to ``path``; it becomes ``path`` when the block ends without an error.

    ``replace`` is for the holder of a lock on ``path``: it removes what killed runs left next to it and, just before
    the rename, the old folder. Without it a ``path`` that exists is a FileExistsError.
    """
    target = Path(path)
    temporary = _temporary(target)

    def make_room() -> None:
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        elif os.path.lexists(target):
            raise FileExistsError(f"{target} already exists: remove it or give another folder.")

    try:
        with _one_sentence(target, temporary, target.parent):
            if not replace:
                make_room()
            temporary.mkdir(parents=True)
            for entry in target.parent.iterdir() if replace else ():
                if entry.name.startswith(f".{target.stem}{TEMPORARY_MARK}") and entry != temporary:
                    shutil.rmtree(entry, ignore_errors=True)
            yield temporary
            make_room()
            temporary.replace(target)
            _flush_to_disk(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path``, which stays; a TimeoutError if another owner still holds it after ``wait_s``.

    The kernel frees the lock when its process ends, however that ends. On a file system without ``flock`` the file
    itself is the lock: there, delete the file of a killed process by hand.
    """
    lock = Path(path)
    with _one_sentence(lock, lock, lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held: filelock.BaseFileLock = filelock.FileLock(lock)
        try:
            try:
                held.acquire(timeout=wait_s, poll_interval=0.1)
            except (NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_FLOCK:
                    raise
                logger.warning("%s has no flock: delete the file if the process that made it is gone", lock)
                held = filelock.SoftFileLock(lock)
                held.acquire(timeout=wait_s, poll_interval=0.1)
        except filelock.Timeout as error:
            raise TimeoutError(f"{lock} is held by another process: wait for it to end, then run again") from error
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def _one_sentence(target: Path, *paths: Path) -> Iterator[None]:
    """Name ``target`` and a remedy in errors of the disk and in errors about ``paths``; keep others as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FAULTS and not {error.filename, error.filename2} & {str(p) for p in paths}:
            raise
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"cannot write {target}: {reason}; no partial file was left") from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.stem}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # only POSIX can open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some shares cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of settings: JSON-able finite values, the keys of dicts in any order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (64 hexadecimal digits) of a file; of a folder, that of its visible files' own, whatever their names."""
    if Path(path).is_dir():
        return fingerprint(*sorted(map(file_sha256, _files_in(Path(path)))))
    with Path(path).open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def joint_hash(hashes: Sequence[str]) -> str:
    """Return the hash of one file, or one of the hashes of several that belong together, in their order."""
    return hashes[0] if len(hashes) == 1 else fingerprint(*hashes)


def size_and_time(path: str | os.PathLike[str]) -> list[int]:
    """Size in bytes and time of the last change in ns of a file, or of the files of a folder together."""
    found = [file.stat() for file in (_files_in(Path(path)) if Path(path).is_dir() else [Path(path)])]
    return [sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)]


def _files_in(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]


def content_hashes(paths: Sequence[str | os.PathLike[str]], cache_dir: str | Path | None = None) -> list[str]:
    """Hash many files; one whose path, size and time of change are in ``cache_dir``'s memo is not read again."""
    memo = None if cache_dir is None else Path(cache_dir) / CONTENT_HASHES
    known = read_memo(memo, lambda e: isinstance(e, list) and [*map(type, e)] == [int, int, str] and len(e[2]) == 64)
    entries, hashes = dict(known), []
    for path in progress(paths, desc="hash files", delay=1):
        absolute = Path(path).absolute()
        at, name = size_and_time(absolute), str(absolute)  # before the read: what changed meanwhile is read again later
        if known.get(name, [])[:2] != at:
            entries[name] = [*at, file_sha256(absolute)]
        hashes.append(str(entries[name][2]))
    if entries != known:
        write_memo(memo, entries)
    return hashes


def write_memo(memo: Path | None, entries: Mapping[str, Any]) -> None:
    """Write a JSON object that only saves time, unless None; where it cannot be written that is announced."""
    try:
        if memo is not None:
            atomic_write_json(memo, entries, indent=None)
    except OSError as error:
        logger.warning("The next run computes this again: %s", error)


def read_memo(memo: Path | None, is_entry: Callable[[Any], bool]) -> dict[str, Any]:
    """Read a JSON object that only saves time: {} where it is None, missing or, with a warning, damaged."""
    try:
        entries = {} if memo is None else json.loads(memo.read_bytes())
        if not isinstance(entries, dict) or not all(map(is_entry, entries.values())):
            raise ValueError("its content is not what is expected")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s) and is built again", memo, error)
        return {}
    return entries


def read_text(path: Path) -> str:
    """Read a text in UTF-8 or, by its byte order mark, UTF-16; anything else is a ValueError."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16: save it as UTF-8.") from error


def read_json(file: str | Path) -> dict[str, Any]:
    """Read a JSON file, as :func:`read_text` does; a missing one is empty, a damaged one a ValueError."""
    try:
        content: dict[str, Any] = json.loads(read_text(Path(file))) if Path(file).is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): correct or restore it.") from error
    return content


def now() -> str:
    """The time in records: UTC to the second, such as 2031-05-17T09:30:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def jsonable(obj: Any) -> Any:
    """A copy that strict JSON can hold: NaN and infinities become null, numpy values and paths plain ones."""
    if isinstance(obj, np.ndarray | np.generic):
        obj = obj.tolist()
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, Mapping):
        return {str(key): jsonable(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [jsonable(value) for value in obj]
    raise TypeError(f"Cannot write a {type(obj).__name__} as JSON: {obj!r}.")
