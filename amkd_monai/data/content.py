"""Hashes of image files and of settings, so that nothing computed from other ones is ever used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amkd_monai.atomic import atomic_write_json
from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")


def fingerprint(*parts: Any) -> str:
    """Hash settings: JSON-able values, in which the order of a dict's keys does not matter.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        TypeError: a part holds something that JSON cannot express.
        ValueError: a part holds NaN or infinity.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(path: str | os.PathLike[str]) -> str:
    """Hash the bytes of a file without holding it in memory.

    Args:
        path: the file.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    with Path(path).open("rb", buffering=0) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_hashes(paths: Sequence[str | os.PathLike[str]], memo: Path | None = None) -> list[str]:
    """Hash many files; a file whose path, size and time of change are in ``memo`` is not read again.

    Args:
        paths: the files.
        memo: JSON file that keeps the hashes between runs. It only saves time: a damaged one is rebuilt, one
            that cannot be written is announced and left alone. ``None`` reads every file.

    Returns:
        One SHA-256 per path, in the order of ``paths``.

    Raises:
        OSError: a file of ``paths`` is missing or cannot be read.
    """
    known = _read_memo(memo) if memo is not None else {}
    entries = dict(known)
    hashes = []
    for path in progress(paths, desc="hash files", delay=1):
        absolute = Path(path).absolute()
        status = absolute.stat()
        entry = known.get(str(absolute))
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            # The status is from before the read: a file changed meanwhile is read again next time.
            entry = [status.st_size, status.st_mtime_ns, content_hash(absolute)]
        entries[str(absolute)] = entry
        hashes.append(str(entry[2]))
    if memo is not None and entries != known:
        try:
            atomic_write_json(memo, entries, indent=None)
        except OSError as error:
            logger.warning("The hashes of %d images are not kept: %s", len(hashes), error)
    return hashes


def _read_memo(memo: Path) -> dict[str, list[int | str]]:
    try:
        entries = json.loads(memo.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is not readable (%s) and is built again", memo, error)
        return {}
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        logger.warning("%s does not hold hashes of images and is built again", memo)
        return {}
    return entries


def _is_entry(entry: object) -> bool:
    """Whether ``entry`` is ``[size in bytes, time of change in ns, sha256]``."""
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [int, int, str]
        and len(entry[2]) == hashlib.sha256().digest_size * 2
    )
