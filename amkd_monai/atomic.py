"""Files that appear whole or not at all, and a lock that lets one process write at a time.

Every file is written beside its final place under a temporary name, flushed to the disk, and then renamed
over the target: a process killed at any moment leaves the old file, or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".tmp-"
"""Stands in the name of every temporary file, so that leftovers of a killed process can be found."""

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_POLL_S = 0.1
_UNFINISHED_LOCK_S = 10.0  # a lock file without an owner is being written; older than this, its writer died


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
    name = f".{target.stem}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}{target.suffix}"
    temporary = target.with_name(name)
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
def exclusive_lock(path: str | os.PathLike[str], *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` for the length of the block.

    The file is created with ``O_CREAT | O_EXCL``, so it also works between machines that share a folder. It
    names its owner (process, its start time, host). A lock left behind by a dead process of this machine is
    taken over; one of another machine is never judged and stays until somebody deletes it.

    Args:
        path: lock file; its folder is made if it is missing.
        wait_s: how long to wait for another owner before giving up.

    Raises:
        TimeoutError: another process holds the lock after ``wait_s``.
        OSError: the lock file cannot be made.
    """
    lock = Path(path)
    pid, host = os.getpid(), socket.gethostname()
    owner = {"pid": pid, "started": _start_time(pid), "host": host, "token": secrets.token_hex(8)}
    content = json.dumps(owner).encode()
    deadline = time.monotonic() + wait_s
    while not _create(lock, content):
        if _remove_if_stale(lock):
            continue
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"{lock} is held by {_describe_owner(lock)}: wait for it to end, or delete the file if it has"
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if lock.read_bytes() == content:  # not another's, made after somebody deleted ours by hand
                lock.unlink()


def _create(lock: Path, content: bytes) -> bool:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"cannot write {lock}: {_reason(error)}") from error
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
    except OSError as error:
        _remove(lock)
        raise OSError(error.errno, f"cannot write {lock}: {_reason(error)}") from error
    return True


def _remove_if_stale(lock: Path) -> bool:
    """Delete a dead owner's lock; True when it is worth trying to create it again."""
    if os.name != "posix":  # no signal 0 and no flock: a person has to delete the file
        return False
    import fcntl

    try:
        with lock.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two processes may judge one stale lock at the same moment
            if not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                return True  # the other was first, and this name now stands for a new lock
            if not _is_dead(handle.read(), age_s=time.time() - lock.stat().st_mtime):
                return False
            lock.unlink()
    except FileNotFoundError:
        pass
    return True


def _is_dead(content: bytes, age_s: float) -> bool:
    try:
        owner = json.loads(content)
        pid, started, host = int(owner["pid"]), owner["started"], owner["host"]
    except (ValueError, KeyError, TypeError):
        return age_s > _UNFINISHED_LOCK_S
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and another user's
        return False
    return started is not None and started != _start_time(pid)  # the number was given to a new process


def _start_time(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; None for a zombie and where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name in brackets may itself hold spaces
    return None if state in "ZX" else fields[18]  # field 22 of the line


def _describe_owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_bytes())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _flush_to_disk(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # only POSIX can open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some shares cannot sync a folder
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
