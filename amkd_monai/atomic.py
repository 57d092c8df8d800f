"""Files and folders that appear whole or not at all, and a lock that lets one process write at a time.

Every file is written beside its final place under a temporary name, flushed to the disk, and then renamed
over the target: a process killed at any moment leaves the old file, or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

logger = logging.getLogger("amkd_monai")

TEMPORARY_MARK = ".tmp-"
"""Stands in the name of every temporary file, so that leftovers of a killed process can be found."""

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_POLL_S = 0.1


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` when the block ends without an error.

    The folder is made if it is missing. The temporary name keeps the suffix of ``path``, since some writers
    choose the format by it (or append one, like ``numpy.save``). The block writes the file and closes it.

    Args:
        path: final place of the file; an existing file is replaced.

    Yields:
        The path to write to.

    Raises:
        OSError: the file cannot be written (disk full, folder not writable), as one sentence that names
            ``path``, with ``errno`` kept. The temporary file is removed then, and after any other error.

    Example:
        >>> with atomic_path("figures/dice.svg") as temporary:  # doctest: +SKIP
        ...     figure.savefig(temporary)
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, target)  # noqa: PTH105 - os.replace is the call whose atomicity is documented
        _flush_to_disk(target.parent)
    except OSError as error:
        _remove(temporary)
        own = str(temporary), str(target), str(target.parent)
        if error.errno in _DISK_FAULTS or error.filename in own or error.filename2 in own:
            raise OSError(error.errno, f"cannot write {target}: {_reason(error)}") from error
        raise
    except BaseException:
        _remove(temporary)
        raise


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically.

    Args:
        path: file to create or replace.
        data: its whole content.

    Raises:
        OSError: the file cannot be written; the old content is untouched.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | os.PathLike[str], obj: Any, *, indent: int | None = 2) -> None:
    """Write ``obj`` to ``path`` atomically as JSON (ASCII, keys in the order of ``obj``).

    Args:
        path: file to create or replace.
        obj: anything ``json.dumps`` takes; NaN and infinity are refused because they are not JSON.
        indent: spaces per level, ``None`` for one line.

    Raises:
        TypeError: ``obj`` holds something that JSON cannot express; nothing is written.
        ValueError: ``obj`` holds NaN or infinity, or refers to itself; nothing is written.
        OSError: the file cannot be written; the old content is untouched.
    """
    text = json.dumps(obj, indent=indent, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder beside ``path``; it becomes ``path`` when the block ends without an error.

    Args:
        path: final place of the folder; its parent is made if it is missing.
        replace: for the holder of a lock on ``path``: also remove what killed runs left beside it, and, just before the
            rename, what is there.

    Yields:
        The folder to fill; it is removed if the block ends with an error.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced; nothing was written, or it came up meanwhile.
        OSError: the folder cannot be made (disk full, not writable), as one sentence that names ``path``.

    Example:
        >>> with atomic_folder("dist/bundle") as folder:  # doctest: +SKIP
        ...     (folder / "README.md").write_text("...")
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        if not replace:
            _refuse_existing(target)
        temporary.mkdir(parents=True)
        for entry in target.parent.iterdir() if replace else ():
            if entry.name.startswith(f".{target.stem}{TEMPORARY_MARK}") and entry != temporary:
                shutil.rmtree(entry, ignore_errors=True)
        yield temporary
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        else:
            _refuse_existing(target)
        temporary.replace(target)
        _flush_to_disk(target.parent)
    except OSError as error:
        if error.errno in _DISK_FAULTS or error.filename in (str(temporary), str(target.parent)):
            raise OSError(error.errno, f"cannot write {target}: {_reason(error)}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already: remove it or give another folder.")


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` for the length of the block.

    The lock is the kernel's (``filelock.FileLock``): it ends with its process, however that ends, and the file stays.
    On a file system without ``flock`` the existence of the file is the lock, which is announced: there the file of a
    killed process may have to be deleted by hand.

    Args:
        path: lock file; its folder is made if it is missing.
        wait_s: how long to wait for another owner before giving up.

    Raises:
        TimeoutError: another process, or another thread of this one, holds the lock after ``wait_s``.
        OSError: the lock file cannot be made.
    """
    lock = Path(path)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = _acquire(lock, wait_s)
    except filelock.Timeout as error:
        raise TimeoutError(f"{lock} is held by another process: wait for it to end, then run again") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot write {lock}: {_reason(error)}") from error
    try:
        yield
    finally:
        held.release()


def _acquire(lock: Path, wait_s: float) -> filelock.BaseFileLock:
    try:
        held: filelock.BaseFileLock = filelock.FileLock(lock)
        held.acquire(timeout=wait_s, poll_interval=_POLL_S)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FLOCK:
            raise
        logger.warning("%s is on a file system without flock: delete it if the process that made it is gone", lock)
        held = filelock.SoftFileLock(lock)
        held.acquire(timeout=wait_s, poll_interval=_POLL_S)
    return held


def _beside(target: Path) -> Path:
    """A temporary name beside ``target`` with its suffix."""
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


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space and run again, nothing half-written was left"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "the folder is not writable; choose another or change its permissions"
        case _:
            return f"{error.strerror or error}; nothing half-written was left"
