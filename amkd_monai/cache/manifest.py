"""Manifest of a feature store: what it holds, for which samples, and which shards are complete."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai import __version__
from amkd_monai.atomic import atomic_write_bytes
from amkd_monai.cache.shards import ArraySpec

logger = logging.getLogger("amkd_monai")

FORMAT_VERSION = 1
NAME = "manifest.json"
DESCRIPTION = ("key", "arrays", "views", "view_parameters", "shard_size", "sample_ids", "content_hashes")
_REMEDY = "delete its folder to compute it again"

Shard = tuple[int, int]  # (view, shard)
Files = dict[str, dict[str, Any]]  # file name -> {"bytes": int, "sha256": str}


class StoreError(RuntimeError):
    """A store that cannot be used as asked; the message says why and what to do."""


def describe(
    directory: Path,
    key: Mapping[str, Any],
    sample_ids: Sequence[str],
    content_hashes: Sequence[str],
    arrays: Mapping[str, ArraySpec],
    views: int,
    shard_size: int,
    *,
    view_parameters: Sequence[Any] | None,
) -> dict[str, Any]:
    """Check what a store is asked to hold and put it as plain JSON values.

    The arguments are those of :meth:`amkd_monai.cache.store.FeatureStore.create_or_open`.

    Raises:
        ValueError: arguments that contradict each other.
        TypeError: ``key`` or ``view_parameters`` hold something that JSON cannot express.
    """
    ids, hashes = list(sample_ids), list(content_hashes)
    parameters = [None] * views if view_parameters is None else list(view_parameters)
    if not ids or len(set(ids)) != len(ids) or len(hashes) != len(ids):
        raise ValueError(f"{directory}: needs unique sample ids and one content hash for each of them")
    if views < 1 or shard_size < 1 or len(parameters) != views:
        raise ValueError(f"{directory}: needs views, shard_size >= 1 and one of view_parameters per view")
    if not arrays or not all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in arrays):
        raise ValueError(f"{directory}: name arrays with letters, digits, _ and -, not {list(arrays)}")
    description = {
        "key": key,
        "arrays": {name: asdict(spec) for name, spec in arrays.items()},
        "views": views,
        "view_parameters": parameters,
        "shard_size": shard_size,
        "sample_ids": ids,
        "content_hashes": hashes,
    }
    return json.loads(json.dumps(description, allow_nan=False))


def read_description(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what a store says it holds, in the form of :func:`describe`.

    Returns:
        The description, or None where there is no manifest.

    Raises:
        StoreError: the manifest is damaged, or of another format or byte order.
    """
    path = Path(directory) / NAME
    try:
        content = _read(path, path.read_bytes())
        key, arrays, views, parameters, shard_size, ids, hashes = (content[name] for name in DESCRIPTION)
        specs = {name: ArraySpec(**spec) for name, spec in arrays.items()}
        return describe(path.parent, dict(key), ids, hashes, specs, views, shard_size, view_parameters=parameters)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); {_REMEDY}") from error


class Manifest:
    """The file ``manifest.json`` of one store, read and replaced as a whole.

    Args:
        path: the file; it need not exist yet.
        description: all that has to be equal for the store to be used, from :func:`describe`.
        origin: JSON-able facts that are kept with a new store and need not be equal for it to be used.

    Attributes:
        committed: the complete shards and their files.
        origin: as given, or as kept in the file.
    """

    def __init__(self, path: Path, description: dict[str, Any], origin: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.description = description
        self.origin = dict(origin or {})
        self.committed: dict[Shard, Files] = {}
        self._created_with: Any = {"amkd_monai": __version__, "numpy": np.__version__}
        self._on_disk: bytes | None = None  # as last read or written

    def load(self) -> bool:
        """Read the file unless it is as it was last read or written.

        Returns:
            Whether :attr:`committed` was read anew, so that its shards need checking.

        Raises:
            StoreError: the file is damaged, of another format or byte order, or describes something else.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            if any(self.path.parent.glob("*.npy")):
                logger.warning("%s is missing beside its shards: all of them are computed again", self.path)
            self.committed, self._on_disk = {}, None
            return True
        if data == self._on_disk:
            return False
        self.committed, self._created_with, self.origin = self._parse(data)
        self._on_disk = data
        return True

    def save(self, committed: dict[Shard, Files]) -> None:
        """Replace the file by one with these complete shards, unless it would be the same.

        Args:
            committed: the complete shards and their files; :attr:`committed` from then on.

        Raises:
            OSError: the file cannot be written; it and :attr:`committed` stay as they were.
        """
        content = {
            "format": FORMAT_VERSION,
            "byte_order": sys.byteorder,
            "created_with": self._created_with,
            "origin": self.origin,
            "committed": {f"{view}/{shard}": files for (view, shard), files in sorted(committed.items())},
            **self.description,
        }
        data = json.dumps(content, indent=1, allow_nan=False).encode()
        if data != self._on_disk:
            atomic_write_bytes(self.path, data)
        self.committed, self._on_disk = committed, data

    def _parse(self, data: bytes) -> tuple[dict[Shard, Files], Any, dict[str, Any]]:
        content = _read(self.path, data)
        try:
            for name, asked in self.description.items():
                if content[name] != asked:
                    difference = self._difference(name, content[name], asked)
                    raise StoreError(f"the store {self.path.parent} {difference}; {_REMEDY}")
            committed = {_shard(text): _files(files) for text, files in content["committed"].items()}
            origin = content.get("origin") or self.origin  # stores of older versions have none
            return committed, content["created_with"], dict(origin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path} is damaged ({error!r}); {_REMEDY}") from error

    def _difference(self, name: str, stored: Any, asked: Any) -> str:
        """Say how an entry differs from the one asked for; raises as :meth:`_parse` expects if it is damaged."""
        if name == "key":
            changed = sorted(part for part in {*stored, *asked} if stored.get(part) != asked.get(part))
            return f"was computed with another {', '.join(changed)}"
        if name == "sample_ids":
            return f"holds another list of samples ({len(stored)} stored, {len(asked)} asked for)"
        if name == "content_hashes":
            pairs = zip(self.description["sample_ids"], stored, asked, strict=True)
            first, *others = [sample for sample, old, new in pairs if old != new]
            more = f" and {len(others)} more" if others else ""
            return f"is stale: image {first!r}{more} changed since its features were computed"
        return f"was built with {name} {stored}, not {asked}"


def _read(path: Path, data: bytes) -> dict[str, Any]:
    """Parse a manifest of this format and byte order."""
    try:
        content = json.loads(data)
        for name, expected in [("format", FORMAT_VERSION), ("byte_order", sys.byteorder)]:
            if content[name] != expected:
                difference = f"has {name} {content[name]!r} where {expected!r} is needed"
                raise StoreError(f"the store {path.parent} {difference}; {_REMEDY}")
        return dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); {_REMEDY}") from error


def _shard(text: str) -> Shard:
    view, shard = map(int, text.split("/"))
    return view, shard


def _files(files: dict[str, Any]) -> Files:
    return {name: {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])} for name, record in files.items()}
