"""Downloads that resume and are verified."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from amkd_monai.atomic import atomic_write_json
from amkd_monai.terminal import progress

logger = logging.getLogger("amkd_monai")

TIMEOUT_S = 60
ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def download(url: str, target: Path, checksum: str | None = None, pause_s: float = 2.0) -> str:
    """Fetch a file; what an interrupted call has got is kept beside the target and continued.

    Args:
        url: HTTPS address; plain HTTP is accepted from this machine only.
        target: file to write; it appears when it is complete and verified.
        checksum: ``sha256:<digits>`` or ``md5:<digits>`` of the file; None accepts what comes.
        pause_s: wait between attempts when the connection breaks, seconds.

    Returns:
        The SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        ValueError: the address is not HTTPS, or the file is not the one with this checksum.
        OSError: the server cannot be reached, refuses, or breaks off too often.
    """
    _check_address(url)
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        logger.info("%s is there already.", target)
        return _verify(target, checksum, url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code >= 500 and attempt < ATTEMPTS:
                time.sleep(pause_s)
                continue
            raise OSError(f"{url} answers {error.code} {error.reason}: get the file by hand.") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS:
                raise OSError(
                    f"{url} broke off {ATTEMPTS} times ({error}): run the command again, it goes on from "
                    f"{part.stat().st_size if part.is_file() else 0} bytes."
                ) from error
            logger.warning("%s broke off (%s), trying again", url, error)
            time.sleep(pause_s)
    try:
        digest = _verify(part, checksum, url)
    except ValueError:
        _forget(part)
        raise
    part.replace(target)
    _forget(part)
    return digest


def _continue(url: str, part: Path) -> None:
    """Get what is missing of a file; raise ConnectionError if it ends too early."""
    notes = part.with_name(part.name + ".json")
    known = json.loads(notes.read_text()) if notes.is_file() and part.is_file() else {}
    start = part.stat().st_size if known.get("url") == url and known.get("version") else 0
    if start and start == known["bytes"]:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "amkd_monai", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", known["version"])
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        _check_address(response.url)
        length = response.headers.get("Content-Length")
        if response.status != 206:
            start = 0
        elif not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            _forget(part)
            raise ConnectionError("the server sent another part than asked for")
        total = None if length is None else start + int(length)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        weak = str(version).startswith("W/")  # a weak tag does not promise equal bytes
        atomic_write_json(notes, {"url": url, "version": None if weak else version, "bytes": total})
        bar = progress(desc=part.name, total=total, initial=start, unit="B", unit_scale=True)
        with part.open("ab" if start else "wb") as file, bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes came")


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url} is not an https address: nothing is fetched from it.")


def _verify(file: Path, checksum: str | None, url: str) -> str:
    """Return the SHA-256 after comparing what is known."""
    algorithm, _, expected = (checksum or "").partition(":")
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", algorithm or "sha256"}}
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
    if checksum and digests[algorithm].hexdigest() != expected:
        raise ValueError(
            f"{file} from {url} has the {algorithm} {digests[algorithm].hexdigest()}, expected {expected}: it is "
            "damaged or was changed by its owner; nothing was unpacked."
        )
    return digests["sha256"].hexdigest()


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
