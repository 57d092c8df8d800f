"""Unpacking of archives from elsewhere: nothing leaves the folder, nothing grows without limit."""

from __future__ import annotations

import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

MOST_BYTES = 60 << 30
MOST_FILES = 100_000
MOST_GROWTH = 200
"""An archive of images hardly shrinks; one that unpacks to 200 times its size is no data set."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str  # "file", "folder", or in words what is refused
    size: int
    open: Callable[[], IO[bytes]]


def extract(archive: Path, folder: Path, most_bytes: int = MOST_BYTES, most_files: int = MOST_FILES) -> list[Path]:
    """Unpack a .zip or .tar into a folder; what is there already is never replaced.

    Files are unpacked beside and renamed at the end, so that a refused archive leaves nothing.

    Args:
        archive: the file.
        folder: where its top-level entries appear.
        most_bytes: total size at most, counted while unpacking, whatever the archive says.
        most_files: number of files at most.

    Returns:
        The top-level entries.

    Raises:
        ValueError: no such archive format, a damaged archive, too large, an absolute path or one that climbs out of the
            folder, links or devices, or one name twice.
        FileExistsError: a top-level entry is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = min(most_bytes, shutil.disk_usage(folder).free, max(1 << 20, archive.stat().st_size * MOST_GROWTH))
    scratch = Path(tempfile.mkdtemp(prefix=".unpack.", dir=folder))
    try:
        written, files = 0, 0
        for member in _members(archive):
            target = scratch / _safe_name(member, archive)
            if member.kind == "folder":
                target.mkdir(parents=True, exist_ok=True)
                continue
            files += 1
            if files > most_files:
                raise ValueError(f"{archive} holds more than {most_files} files: it is not unpacked.")
            if target.exists():
                raise ValueError(f"{archive} holds '{member.name}' twice: it is not unpacked.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("xb") as out:
                while chunk := source.read(_CHUNK_BYTES):
                    written += len(chunk)
                    if written > room:
                        raise ValueError(f"{archive} unpacks to more than {room} bytes: it is not unpacked.")
                    out.write(chunk)
        entries = sorted(scratch.iterdir())
        for entry in entries:
            if (folder / entry.name).exists():
                raise FileExistsError(
                    f"{folder / entry.name} is there already: remove it to unpack {archive.name} again."
                )
        return [entry.rename(folder / entry.name) for entry in entries]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}): fetch it again.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _safe_name(member: _Member, archive: Path) -> PurePosixPath:
    name = PurePosixPath(member.name.replace("\\", "/"))
    outside = name.is_absolute() or ".." in name.parts or ":" in (name.parts[0] if name.parts else "")
    if outside or "\0" in member.name:
        raise ValueError(f"{archive} holds the path '{member.name}', which leaves the folder: it is not unpacked.")
    if member.kind not in ("file", "folder"):
        raise ValueError(f"{archive} holds {member.kind}, '{member.name}': it is not unpacked.")
    return name


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                mode = info.external_attr >> 16
                special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = "a link or device" if special else "folder" if info.is_dir() else "file"
                yield _Member(info.filename, kind, info.file_size, lambda info=info: packed.open(info))  # type: ignore[misc]
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed_tar:
            for entry in packed_tar:
                kind = "file" if entry.isfile() else "folder" if entry.isdir() else "a link or device"
                yield _Member(entry.name, kind, entry.size, lambda entry=entry: packed_tar.extractfile(entry))  # type: ignore
    else:
        raise ValueError(f"{archive} is neither a .zip nor a .tar: fetch it again.")
