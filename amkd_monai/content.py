"""Hashes of files and of settings, so that nothing computed from other ones is ever used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from amkd_monai.atomic import atomic_write_json
from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of settings: JSON-able values, the keys of dicts in any order.

    Raises:
        TypeError: a part holds something that JSON cannot express.
        ValueError: a part holds NaN or infinity.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (64 hexadecimal digits) of a file, which is not held in memory."""
    with Path(path).open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hashes(paths: Sequence[str | os.PathLike[str]], memo: Path | None = None) -> list[str]:
    """Hash many files; a file whose path, size and time of change are in ``memo`` is not read again.

    The memo, a JSON file, only saves time: a damaged one is rebuilt, one that cannot be written is announced and left
    alone. None reads every file.
    """
    known = {} if memo is None else read_memo(memo, _is_entry)
    entries = dict(known)
    hashes = []
    for path in progress(paths, desc="hash files", delay=1):
        absolute = Path(path).absolute()
        status = absolute.stat()
        entry = known.get(str(absolute))
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            # The status is from before the read: a file changed meanwhile is read again next time.
            entry = [status.st_size, status.st_mtime_ns, file_sha256(absolute)]
        entries[str(absolute)] = entry
        hashes.append(str(entry[2]))
    if memo is not None and entries != known:
        try:
            atomic_write_json(memo, entries, indent=None)
        except OSError as error:
            logger.warning("The hashes of %d images are not kept: %s", len(hashes), error)
    return hashes


def read_memo(memo: Path, is_entry: Callable[[Any], bool]) -> dict[str, Any]:
    """Read a JSON object that only saves time: {} where it is missing or, with a warning, damaged."""
    try:
        entries = json.loads(memo.read_bytes())
        if not isinstance(entries, dict) or not all(map(is_entry, entries.values())):
            raise ValueError("it does not hold hashes of images")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not readable (%s) and is built again", memo, error)
        return {}
    return entries


def _is_entry(entry: object) -> bool:
    """Whether ``entry`` is ``[size in bytes, time of change in ns, sha256]``."""
    return isinstance(entry, list) and [*map(type, entry)] == [int, int, str] and len(entry[2]) == 64
