"""Feature store: outputs of frozen teachers for a fixed list of samples, computed once and read by index.

A store is one folder::

    store.json                  what is stored and for which samples, written once
    v0.s00003.safetensors       view 0, shard 3: every array of its samples, and the hash of the data
    building.lock               held while one process builds the whole store

A shard is written beside its place and renamed, so a shard that exists is complete: a process killed at any moment
loses at most its current shard, and two processes that write the same one do no harm. The hash of a shard is checked
when a process first reads it, and by ``cache verify``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai import __version__
from amkd_monai.atomic import TEMPORARY_MARK, atomic_folder, atomic_write_bytes, exclusive_lock
from amkd_monai.cache.shards import ArraySpec, check_shard, map_shard, shard_bytes, write_shard_file
from amkd_monai.content import fingerprint

logger = logging.getLogger("amkd_monai")

FORMAT = 2
NAME = "store.json"
LOCK = "building.lock"
DESCRIPTION = ("key", "arrays", "views", "view_parameters", "shard_size", "sample_ids", "content_hashes")
_REMEDY = "delete its folder to compute it again"
_LEFTOVER_S = 3600.0  # a temporary file older than this has no writer any more

Shard = tuple[int, int]  # (view, shard)


class StoreError(RuntimeError):
    """A store that cannot be used as asked; the message says why and what to do."""


def store_directory(parent: str | os.PathLike[str], name: str, key: Mapping[str, Any]) -> Path:
    """Folder of the store called ``name`` (the teacher, say) with ``key``: another key or format, another folder."""
    return Path(parent) / f"{name}-{fingerprint(FORMAT, key)[:16]}"


class FeatureStore:
    """Arrays of a fixed, ordered list of samples in memory-mapped shards; made by :meth:`create_or_open`.

    Opening reads no shard. Reading needs no write access and may happen while other processes build. Features are best
    read in the main process: worker processes only add copies.

    Args:
        directory: folder of this store, from :func:`store_directory`.
        key: what the arrays depend on (teacher fingerprint, preprocessing, views, hash of the list); JSON-able.
        sample_ids: N unique ids; their order is the index.
        content_hashes: hash of each sample's image file, length N.
        arrays: the arrays of every sample by name (letters, digits, ``_`` and ``-``).
        views: number of views of every image.
        shard_size: samples per file.
        view_parameters: one JSON-able value per view, from which that view of an image is made again.
        origin: JSON-able facts that say where the content comes from; a store that is there keeps its own.

    Example::

        store = FeatureStore.create_or_open(directory, key, ids, hashes, {"grid": ArraySpec((256, 16, 16))})
        for view, shard in store.missing():
            store.write_shard(view, shard, {"grid": run_teacher(store.samples_of(shard), view)})
        store.read("grid", [5, 900, 3])  # (3, 256, 16, 16) float16
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        key: Mapping[str, Any],
        sample_ids: Sequence[str],
        content_hashes: Sequence[str],
        arrays: Mapping[str, ArraySpec],
        views: int = 1,
        shard_size: int = 256,
        *,
        view_parameters: Sequence[Any] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.sample_ids, self.content_hashes = list(sample_ids), list(content_hashes)
        parameters = [None] * views if view_parameters is None else list(view_parameters)
        self.key: dict[str, Any]
        self.view_parameters: list[Any]
        self.key, self.view_parameters = json.loads(json.dumps([dict(key), parameters], allow_nan=False))
        self.arrays, self.views, self.shard_size, self.origin = dict(arrays), views, shard_size, dict(origin or {})
        if not self.sample_ids or not len(set(self.sample_ids)) == len(self) == len(self.content_hashes):
            raise ValueError(f"{directory}: needs unique sample ids and one content hash for each of them")
        if views < 1 or shard_size < 1 or len(parameters) != views:
            raise ValueError(f"{directory}: needs views, shard_size >= 1 and one of view_parameters per view")
        if not arrays or not all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in arrays):
            raise ValueError(f"{directory}: name arrays with letters, digits, _ and -, not {list(arrays)}")
        self._building = False
        self._maps: dict[Shard, dict[str, list[np.ndarray]]] = {}
        self._bytes: dict[int, int] = {}  # of a shard's file, by its number of samples

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> FeatureStore:
        """Open a store as whatever its ``store.json`` says it is.

        Raises:
            StoreError: there is none, or it is damaged or of another format.
        """
        path = Path(directory) / NAME
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise StoreError(f"the store {directory} has format {content['format']!r}, not {FORMAT}; {_REMEDY}")
            content["arrays"] = {name: ArraySpec(**spec) for name, spec in content["arrays"].items()}
            return cls(directory, **{name: content[name] for name in DESCRIPTION}, origin=dict(content["origin"]))
        except FileNotFoundError as error:
            raise StoreError(f"{directory} is no feature store: it has no {NAME}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); {_REMEDY}") from error

    @classmethod
    def create_or_open(cls, *arguments: Any, **options: Any) -> FeatureStore:
        """Open a store that has to be as the arguments (those of the class) say; it is made with its first shard.

        Raises:
            ValueError: arguments that contradict each other.
            StoreError: the folder holds a store of something else, or a damaged ``store.json``.
        """
        store = cls(*arguments, **options)
        store._compare()
        return store

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        # Maps would be pickled as their content; a copy in another process opens its own, and holds no lock.
        return {**self.__dict__, "_maps": {}, "_building": False}

    @property
    def shards(self) -> list[Shard]:
        """Pairs (view, shard) of the complete store, view by view."""
        return [(view, shard) for view in range(self.views) for shard in range(-(-len(self) // self.shard_size))]

    def path(self, view: int, shard: int) -> Path:
        """File of a shard."""
        return self.directory / f"v{view}.s{shard:05d}.safetensors"

    def written(self) -> set[Shard]:
        """The shards that are there, by one listing of the folder; a file of another size does not count."""
        sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors") and not entry.name.startswith("."):
                    sizes[entry.name] = entry.stat().st_size
        return {(v, s) for v, s in self.shards if sizes.get(self.path(v, s).name) == self._bytes_of(s)}

    def has(self, view: int, shard: int) -> bool:
        """Whether one shard is there, without listing the folder."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(view, shard).stat().st_size == self._bytes_of(shard)
        return False

    def missing(self) -> list[Shard]:
        """Pairs (view, shard) that are still to be written, view by view."""
        written = self.written()
        return [at for at in self.shards if at not in written]

    @property
    def is_complete(self) -> bool:
        """Whether every shard of every view is there."""
        return not self.missing()

    def samples_of(self, shard: int) -> range:
        """Indices of the samples in a shard; the last shard may be shorter.

        Raises:
            IndexError: there is no such shard.
        """
        samples = range(len(self))[shard * self.shard_size : (shard + 1) * self.shard_size]
        if shard < 0 or not samples:
            raise IndexError(f"{self.directory} has no shard {shard}: it holds {len(self)} samples")
        return samples

    def _bytes_of(self, shard: int) -> int:
        n = len(self.samples_of(shard))
        if n not in self._bytes:
            self._bytes[n] = shard_bytes(self.arrays, n)
        return self._bytes[n]

    def read(
        self, array: str, indices: Sequence[int] | np.ndarray, view: int | Sequence[int] | np.ndarray = 0
    ) -> np.ndarray:
        """Read one array of some samples, in the order asked for.

        Args:
            array: name of the array.
            indices: B indices of samples, repeated or not.
            view: which view, of all samples or of each.

        Returns:
            A new array (B, *shape): float16 or float32 as stored, float32 for int8.

        Raises:
            KeyError: there is no such array.
            IndexError: there is no such sample or view.
            StoreError: a shard is still missing, or its file is damaged, and then removed.
        """
        spec = self.arrays.get(array)
        if spec is None:
            raise KeyError(f"{self.directory} has no array {array!r}, only {', '.join(self.arrays)}")
        views = np.broadcast_to(view, len(indices)).tolist()
        out = np.empty((len(indices), *spec.shape), spec.read_dtype)
        for row, (index, of) in enumerate(zip(indices, views, strict=True)):
            if not 0 <= of < self.views:
                raise IndexError(f"{self.directory} has no view {of}: it holds {self.views}")
            if not 0 <= index < len(self):
                raise IndexError(f"{self.directory} has no sample {index}: it holds {len(self)}")
            shard, offset = divmod(int(index), self.shard_size)
            values, *scales = (self._maps.get((of, shard)) or self._map(of, shard))[array]
            if scales:
                np.multiply(values[offset], scales[0][offset], out=out[row])
            else:
                out[row] = values[offset]
        return out

    def _map(self, view: int, shard: int) -> dict[str, list[np.ndarray]]:
        path, n = self.path(view, shard), len(self.samples_of(shard))
        try:
            state = _state(path)
            offset = self._check_shard(view, shard)
            self._maps[view, shard] = map_shard(path, self.arrays, n, offset)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.directory}: view {view} shard {shard} is not computed yet; build it first"
            ) from error
        except ValueError as error:
            remedy = "it is removed" if _remove(path, state) else "delete it"
            raise StoreError(f"{error}: {remedy}, run again to compute it anew") from error
        return self._maps[view, shard]

    def _check_shard(self, view: int, shard: int) -> int:
        n = len(self.samples_of(shard))
        return check_shard(self.path(view, shard), self.arrays, n, self._identity(view, shard))

    def _identity(self, view: int, shard: int) -> str:
        samples = self.samples_of(shard)
        ids, hashes = (a[samples.start : samples.stop] for a in (self.sample_ids, self.content_hashes))
        return fingerprint(self.key, self.view_parameters[view], view, shard, ids, hashes)

    def verify(self) -> dict[Shard, str]:
        """Read every shard that is there; returns what is wrong with each damaged (view, shard)."""
        faults = {}
        for at in sorted(self.written()):
            try:
                self._check_shard(*at)
            except (ValueError, OSError) as error:
                faults[at] = str(error)
        return faults

    @contextlib.contextmanager
    def building(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the store, so that no other process that holds it computes the same: ask :meth:`missing` inside.

        Args:
            wait_s: how long to wait for another process that is building.

        Raises:
            TimeoutError: another process is still building after ``wait_s``.
            OSError: the folder is not writable or the disk is full.
            StoreError: another process has made this folder a store of something else.
        """
        if self._building:  # held already
            yield
            return
        with exclusive_lock(self.directory / LOCK, wait_s=wait_s):
            self._building = True
            try:
                self.create()
                yield
            finally:
                self._building = False

    def create(self) -> None:
        """Make the folder and its ``store.json``, unless they are there, and remove what killed builders left.

        Raises:
            OSError: the folder is not writable or the disk is full.
            StoreError: another process has made this folder a store of something else.
        """
        path = self.directory / NAME
        if not path.is_file():
            made = {"amkd_monai": __version__, "numpy": np.__version__}
            content = {"format": FORMAT, "created_with": made, "origin": self.origin}
            content |= {name: getattr(self, name) for name in DESCRIPTION}
            content["arrays"] = {name: asdict(spec) for name, spec in self.arrays.items()}
            lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
            with _unless_there(path.is_file):
                atomic_write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        self._compare()
        self.tidy()

    def tidy(self) -> None:
        """Remove temporary files of processes that were killed: of shards that are there, and old ones."""
        with os.scandir(self.directory) as entries:
            leftovers = [entry for entry in entries if TEMPORARY_MARK in entry.name]
        for entry in leftovers:
            final = entry.name[1:].split(TEMPORARY_MARK)[0] + Path(entry.name).suffix
            with contextlib.suppress(FileNotFoundError):
                if (self.directory / final).is_file() or time.time() - entry.stat().st_mtime > _LEFTOVER_S:
                    Path(entry.path).unlink()

    def write_shard(self, view: int, shard: int, values: Mapping[str, np.ndarray]) -> None:
        """Store all arrays of one shard; it exists for readers once this returns. A shard that is there stays.

        Args:
            view: which view.
            shard: which shard.
            values: for every array of the store, (n, *shape) with n = ``len(samples_of(shard))``.

        Raises:
            IndexError: there is no such view or shard.
            ValueError: as :func:`amkd_monai.cache.shards.write_shard_file` says; the sample is named.
            OSError: the folder is not writable or the disk is full; no part of the shard is left.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"{self.directory} has no view {view}: it holds {self.views}")
        ids = [self.sample_ids[index] for index in self.samples_of(shard)]
        if self.has(view, shard):
            return
        path = self.path(view, shard)
        if path.exists():
            logger.warning("%s has not the size of a shard of this store and is computed again", path)
        if not (self.directory / NAME).is_file():
            self.create()
        with _unless_there(lambda: self.has(view, shard)):
            write_shard_file(path, self.arrays, values, ids, self._identity(view, shard))

    def _compare(self) -> None:
        """Compare with the store in the folder, if there is one, and take its origin."""
        if not (self.directory / NAME).is_file():
            return
        stored = FeatureStore.open(self.directory)
        for name in DESCRIPTION:
            old, new = getattr(stored, name), getattr(self, name)
            if old == new:
                continue
            difference = f"was built with {name} {old}, not {new}"
            if name == "key":
                changed = sorted(part for part in {*old, *new} if old.get(part) != new.get(part))
                difference = f"was computed with another {', '.join(changed)}"
            elif name == "sample_ids":
                difference = f"holds another list of samples ({len(old)} stored, {len(new)} asked for)"
            elif name == "content_hashes":
                first, *others = [i for i, a, b in zip(self.sample_ids, old, new, strict=True) if a != b]
                more = f" and {len(others)} more" if others else ""
                difference = f"is stale: image {first!r}{more} changed since its features were computed"
            raise StoreError(f"the store {self.directory} {difference}; {_REMEDY}")
        self.origin = stored.origin


@contextlib.contextmanager
def _unless_there(is_there: Callable[[], bool]) -> Iterator[None]:
    """Pass over a failure to write a file that another process has written meanwhile: it holds the same."""
    try:
        yield
    except OSError:
        if not is_there():
            raise


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _remove(path: Path, state: tuple[int, int, int]) -> bool:
    """Remove a damaged shard unless another process has replaced it; False where that is not allowed."""
    try:
        if state == _state(path):
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    logger.warning("%s is damaged and removed", path)
    return True


def export_store(directory: str | Path, target: str | Path) -> Path:
    """Copy a complete store for publication; the description of the teacher, with paths of its weights, is left out.

    Args:
        directory: the store; every hash is checked.
        target: folder to make: itself a store, and plain safetensors files.

    Raises:
        FileExistsError: ``target`` is there already.
        StoreError: the store is incomplete or damaged.
        OSError: ``target`` cannot be written.
    """
    store = FeatureStore.open(directory)
    if missing := store.missing():
        raise StoreError(f"{directory} lacks {len(missing)} shards: build it first, then export it")
    if faults := store.verify():
        raise StoreError(f"{next(iter(faults.values()))}: delete it, build it anew, then export it")
    with atomic_folder(target) as folder:
        for at in store.shards:
            shutil.copyfile(store.path(*at), folder / store.path(*at).name)
        store.directory = folder
        store.origin.pop("teacher", None)
        store.create()
    return Path(target)
