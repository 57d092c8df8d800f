"""Feature store: outputs of frozen teachers for a fixed list of samples, computed once and read by index.

A store is one folder::

    manifest.json                    what is stored, for which samples, and which shards are complete
    features.v0.s00003.npy           array "features", view 0, shard 3: (samples, *shape)
    features.scale.v0.s00003.npy     int8 arrays only: (samples, channels) float32
    building.lock                    while a process writes

A shard's files are written and renamed first; then the manifest, with their sizes and hashes, is replaced. What
the manifest does not name does not exist, so a process killed at any moment loses at most the current shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amkd_monai.atomic import TEMPORARY_MARK, exclusive_lock
from amkd_monai.cache.manifest import NAME, Files, Manifest, Shard, StoreError, describe, read_description
from amkd_monai.cache.shards import ArraySpec, encode_shard, file_names, find_fault, map_npy, write_npy
from amkd_monai.data.content import fingerprint

logger = logging.getLogger("amkd_monai")

LOCK = "building.lock"


def store_directory(parent: str | os.PathLike[str], name: str, key: Mapping[str, Any]) -> Path:
    """Folder of the store called ``name`` (the teacher, say) with ``key``: another key is another folder."""
    return Path(parent) / f"{name}-{fingerprint(key)[:16]}"


class FeatureStore:
    """Arrays of a fixed, ordered list of samples in memory-mapped shards; made by :meth:`create_or_open`.

    Reading needs no write access, opens each shard once and may happen while another process builds; a reader
    sees what was complete when it opened the store. Writing happens inside :meth:`building`. Features are best
    read in the main process: worker processes only add copies.

    Example::

        store = FeatureStore.create_or_open(directory, key, ids, hashes, {"grid": ArraySpec((256, 16, 16))})
        with store.building():
            for view, shard in store.missing():
                store.write_shard(view, shard, {"grid": run_teacher(store.samples_of(shard), view)})
        store.read("grid", [5, 900, 3])  # (3, 256, 16, 16) float16
    """

    def __init__(
        self,
        directory: Path,
        description: dict[str, Any],
        check: Literal["hash", "size"],
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.key: dict[str, Any] = description["key"]
        self.sample_ids: list[str] = description["sample_ids"]
        self.content_hashes: list[str] = description["content_hashes"]
        self.arrays = {name: ArraySpec(**spec) for name, spec in description["arrays"].items()}
        self.views: int = description["views"]
        self.view_parameters: list[Any] = description["view_parameters"]
        self.shard_size: int = description["shard_size"]
        self._check = check
        self._manifest = Manifest(directory / NAME, description, origin)
        self._building = False
        self._opened = False
        self._suspect: set[Shard] = set()  # found damaged
        self._maps: dict[tuple[str, int, int], list[np.ndarray]] = {}
        self.refresh()

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, check: Literal["hash", "size"] = "hash") -> FeatureStore:
        """Open a store as whatever its manifest says it is.

        Raises:
            StoreError: there is no manifest, or it is damaged or of another format or byte order.
        """
        description = read_description(directory)
        if description is None:
            raise StoreError(f"{directory} is no feature store: it has no {NAME}")
        return cls(Path(directory), description, check)

    @classmethod
    def create_or_open(
        cls,
        directory: str | os.PathLike[str],
        key: Mapping[str, Any],
        sample_ids: Sequence[str],
        content_hashes: Sequence[str],
        arrays: Mapping[str, ArraySpec],
        views: int = 1,
        shard_size: int = 256,
        *,
        view_parameters: Sequence[Any] | None = None,
        check: Literal["hash", "size"] = "hash",
        origin: Mapping[str, Any] | None = None,
    ) -> FeatureStore:
        """Open the store in ``directory``, or start an empty one, which is written by :meth:`building`.

        Args:
            directory: folder of this store, from :func:`store_directory`.
            key: what the arrays depend on (teacher fingerprint, preprocessing, views, hash of the list); JSON-able.
            sample_ids: N unique ids; their order is the index.
            content_hashes: hash of each sample's image file, length N.
            arrays: the arrays of every sample by name (letters, digits, ``_`` and ``-``).
            views: number of views of every image.
            shard_size: samples per file.
            view_parameters: one JSON-able value per view, from which that view of an image is made again.
            check: ``hash`` reads every complete shard (about 1 GB/s) to find damage, ``size`` only its file's size.
                Damaged shards are announced and count as missing.
            origin: JSON-able facts kept with a new store, which say where its content comes from.

        Raises:
            ValueError: arguments that contradict each other.
            StoreError: the folder holds a store of something else, or a damaged manifest.
        """
        path = Path(directory)
        description = describe(
            path, key, sample_ids, content_hashes, arrays, views, shard_size, view_parameters=view_parameters
        )
        return cls(path, description, check, origin)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as its content; a copy in another process opens its own, and may not write.
        return {**self.__dict__, "_maps": {}, "_building": False}

    @property
    def origin(self) -> dict[str, Any]:
        """Where the content comes from, as given when the store was made; empty in stores of older versions."""
        return self._manifest.origin

    @property
    def committed(self) -> Mapping[Shard, Files]:
        """The complete shards: size and hash of each of their files."""
        return self._manifest.committed

    @property
    def is_complete(self) -> bool:
        """Whether every shard of every view can be read."""
        return not self.missing()

    def missing(self) -> list[Shard]:
        """Pairs (view, shard) that are still to be written, view by view."""
        shards = range(-(-len(self) // self.shard_size))
        return [(v, s) for v in range(self.views) for s in shards if (v, s) not in self._manifest.committed]

    def samples_of(self, shard: int) -> range:
        """Indices of the samples in a shard; the last shard may be shorter.

        Raises:
            IndexError: there is no such shard.
        """
        samples = range(len(self))[shard * self.shard_size : (shard + 1) * self.shard_size]
        if shard < 0 or not samples:
            raise IndexError(f"{self.directory} has no shard {shard}: it holds {len(self)} samples")
        return samples

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
            StoreError: a shard is still missing, or its file is damaged.
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
            values, *scales = self._maps.get((array, of, shard)) or self._map(array, of, shard)
            if scales:
                np.multiply(values[offset], scales[0][offset], out=out[row])
            else:
                out[row] = values[offset]
        return out

    @contextlib.contextmanager
    def building(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the store for writing, knowing what others have written before: ask :meth:`missing` inside.

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
                for leftover in self.directory.glob(f".*{TEMPORARY_MARK}*"):
                    leftover.unlink(missing_ok=True)
                self.refresh()
                self._manifest.save(self._manifest.committed)
                yield
            finally:
                self._building = False

    def write_shard(self, view: int, shard: int, values: Mapping[str, np.ndarray]) -> None:
        """Store all arrays of one missing shard; it exists for readers once this returns.

        Args:
            view: which view.
            shard: which shard.
            values: for every array of the store, (n, *shape) with n = ``len(samples_of(shard))``.

        Raises:
            ValueError: an array is missing, unknown, of a wrong shape, not finite or beyond the range of its dtype
                (the sample is named); or the shard is already stored.
            StoreError: called outside :meth:`building`.
            OSError: the folder is not writable or the disk is full; no part of the shard is left.
        """
        if not self._building:
            raise StoreError(f"{self.directory}: write_shard works only inside 'with store.building()'")
        if (view, shard) not in self.missing():
            raise ValueError(f"{self.directory}: view {view} shard {shard} is not one of the missing shards")
        ids = [self.sample_ids[index] for index in self.samples_of(shard)]
        encoded = encode_shard(self.arrays, values, view, shard, ids)
        files: Files = {}
        try:
            for file, content in encoded.items():
                files[file] = write_npy(self.directory / file, content)
            self._manifest.save({**self._manifest.committed, (view, shard): files})
        except BaseException:
            for file in files:
                (self.directory / file).unlink(missing_ok=True)
            raise

    def verify(self) -> dict[Shard, str]:
        """Read every complete shard; returns what is wrong with each damaged (view, shard)."""
        return {at: fault for at in sorted(self._manifest.committed) if (fault := self._fault(at, hashed=True))}

    def _map(self, array: str, view: int, shard: int) -> list[np.ndarray]:
        if (view, shard) not in self._manifest.committed:
            raise StoreError(f"{self.directory}: view {view} shard {shard} is not computed yet; build it first")
        n = len(self.samples_of(shard))
        try:
            maps = map_npy(self.directory, array, self.arrays[array], view, shard, n)
        except ValueError as error:
            raise StoreError(f"{error}; run again to compute it anew") from error
        return self._maps.setdefault((array, view, shard), maps)

    def _fault(self, at: Shard, *, hashed: bool) -> str | None:
        names = [file for name, spec in self.arrays.items() for file in file_names(name, spec, *at)]
        return find_fault(self.directory, names, self._manifest.committed[at], hashed=hashed)

    def refresh(self) -> None:
        """Read the manifest if another process changed it, and forget damaged shards.

        Raises:
            StoreError: another process has made this folder a store of something else.
        """
        before = self._manifest.committed
        if not self._manifest.load():
            return
        self._maps.clear()
        committed = self._manifest.committed
        for at in sorted(committed):
            if committed[at] == before.get(at):
                continue
            # What another process wrote since this one opened the store is not read again, unless it was damaged.
            hashed = self._check == "hash" and (not self._opened or at in self._suspect)
            if fault := self._fault(at, hashed=hashed):
                logger.warning("%s: %s; view %d shard %d is computed again", self.directory, fault, *at)
                self._suspect.add(at)
                del committed[at]
        self._opened = True
