"""Feature store: outputs of frozen teachers for a fixed list of samples, computed once and read by index.

A store is one folder::

    store.json                  what is stored and for which samples, written once
    v0.s00003.safetensors       view 0, shard 3: every array of its samples, and the hash of the data
    building.lock               held while one process builds the whole store

A shard is written next to its place and renamed: one that exists is complete, and two processes that write the same
one do no harm. Size and header of its file follow from what the store holds, but for the SHA-256 of the data, which
stands first in the header; so a damaged file, or one of another store, is found when a process first reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amkd_monai import __version__
from amkd_monai.storage import TEMPORARY_MARK, atomic_path, exclusive_lock, fingerprint
from amkd_monai.terminal import align, progress

logger = logging.getLogger("amkd_monai")

FORMAT = 2
NAME = "store.json"
LOCK = "building.lock"
DESCRIPTION = ("key", "arrays", "views", "view_parameters", "shard_size", "sample_ids", "content_hashes")
_REMEDY = "delete its folder to compute it again"
_LEFTOVER_S = 3600.0  # a temporary file older than this has no writer any more
_INT8_LIMIT = 127  # symmetric: -128 is not used
_SAFETENSORS = {"float32": "F32", "float16": "F16", "int8": "I8"}
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_DIGEST_SIZE = 64

Shard = tuple[int, int]  # (view, shard)


class StoreError(RuntimeError):
    """A store that cannot be used as asked; the message says why and what to do."""


# ------------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class ArraySpec:
    """One stored array of every sample, of ``shape`` (C, h, w) for a map, (C,) for a pooled vector.

    ``float16`` and ``float32`` are read as stored, ``int8`` as float32: it has one float32 scale per sample and channel
    (axis 0 of at least two).
    """

    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "int8"] = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.dtype not in _SAFETENSORS or min(self.shape, default=1) < 1:
            raise ValueError(f"{self}: use float16, float32 or int8, and at least one value on every axis")
        if self.dtype == "int8" and len(self.shape) < 2:
            raise ValueError(f"{self}: int8 has a scale per channel and needs (channels, ...); use float16 here")

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """Type of the values a reader gets."""
        return np.dtype("float32" if self.dtype == "int8" else self.dtype)

    @property
    def nbytes(self) -> int:
        """Stored bytes per sample."""
        values = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        return values + (4 * self.shape[0] if self.dtype == "int8" else 0)


def _tensors(arrays: Mapping[str, ArraySpec], n: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Dtype and shape of every tensor of a shard of ``n`` samples, the widest dtype first, so that each is aligned."""
    found = {name: (np.dtype(spec.dtype).newbyteorder("<"), (n, *spec.shape)) for name, spec in arrays.items()}
    coded = {f"{name}.scale": spec for name, spec in arrays.items() if spec.dtype == "int8"}
    found |= {name: (np.dtype("<f4"), (n, spec.shape[0])) for name, spec in coded.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(arrays: Mapping[str, ArraySpec], n: int, identity: str, digest: str) -> bytes:
    """What stands in the file of a shard of ``n`` samples before the data."""
    content: dict[str, Any] = {"__metadata__": {"sha256": digest, "identity": identity}}
    end = 0
    for name, (dtype, shape) in _tensors(arrays, n).items():
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        content[name] = {"dtype": _SAFETENSORS[dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_bytes(arrays: Mapping[str, ArraySpec], n: int) -> int:
    """Size of the file of a shard of ``n`` samples."""
    header = _header(arrays, n, "0" * _DIGEST_SIZE, "0" * _DIGEST_SIZE)
    return len(header) + n * sum(spec.nbytes for spec in arrays.values())


def _encode(array: str, values: np.ndarray, spec: ArraySpec, sample_ids: Sequence[str]) -> list[np.ndarray]:
    """Values (n, *shape) as stored, and for int8 (symmetric per sample and channel) their scales (n, C)."""
    expected = (len(sample_ids), *spec.shape)
    if values.shape != expected or values.dtype.kind not in "fiu":
        raise ValueError(f"array {array!r} needs numbers of shape {expected}, got {values.dtype} {values.shape}")
    with np.errstate(over="ignore"):
        stored = values.astype(spec.read_dtype, copy=False)
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        problem = "NaN or infinity: check that image, or run the teacher in float32"
        if np.isfinite(values[bad]).all():
            problem = f"a value beyond {stored.dtype}: store it as float32 or int8"
        raise ValueError(f"array {array!r} of sample {sample_ids[bad]!r} holds {problem}")
    if spec.dtype != "int8":
        return [stored]
    axes = tuple(range(2, stored.ndim))
    scales = np.maximum(stored.max(axis=axes), -stored.min(axis=axes)) / np.float32(_INT8_LIMIT)
    scales[scales == 0] = 1  # a channel of zeros
    codes = np.empty(stored.shape, np.int8)
    for code, value, scale in zip(codes, stored, scales, strict=True):  # by sample: no second copy of the shard
        levels = np.rint(value / scale.reshape(-1, *[1] * (value.ndim - 1)))
        code[...] = np.clip(levels, -_INT8_LIMIT, _INT8_LIMIT)
    return [codes, scales]


# ------------------------------------------------------------------------------------------------------- the store


def store_directory(parent: str | os.PathLike[str], name: str, key: Mapping[str, Any]) -> Path:
    """Folder of the store called ``name`` (the teacher, say) with ``key``: another key or format, another folder."""
    return Path(parent) / f"{name}-{fingerprint(FORMAT, key)[:16]}"


class FeatureStore:
    """Arrays of a fixed, ordered list of samples in memory-mapped shards; made by :meth:`create_or_open`.

    Opening reads no shard. Reading needs no write access and may happen while other processes build.

    Args:
        directory: folder of this store, from :func:`store_directory`.
        key: what the arrays depend on (teacher fingerprint, preprocessing, views, hash of the list); JSON-able.
        sample_ids: N unique ids; their order is the index.
        content_hashes: the hash of each sample's image file.
        arrays: the arrays of every sample by name (letters, digits, ``_`` and ``-``).
        views: number of views of every image.
        shard_size: samples per file.
        view_parameters: one JSON-able value per view, from which that view of an image is made again.
        origin: JSON-able facts about where the content comes from; an existing store keeps its own.

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
        self._maps: dict[Shard, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> FeatureStore:
        """Open a store as its ``store.json`` describes it, or raise a StoreError."""
        path = Path(directory) / NAME
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise StoreError(f"the store {directory} has format {content['format']!r}, not {FORMAT}; {_REMEDY}")
            content["arrays"] = {name: ArraySpec(**spec) for name, spec in content["arrays"].items()}
            return cls(directory, **{name: content[name] for name in DESCRIPTION}, origin=dict(content["origin"]))
        except FileNotFoundError as error:
            raise StoreError(f"{directory} is not a feature store: it has no {NAME}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); {_REMEDY}") from error

    @classmethod
    def create_or_open(cls, *arguments: Any, **options: Any) -> FeatureStore:
        """Return a store, which is made with its first shard; an existing one must fit the arguments."""
        store = cls(*arguments, **options)
        store._compare()
        return store

    def _compare(self) -> None:
        """Compare with the store in the folder, if there is one, and take its origin."""
        stored = FeatureStore.open(self.directory) if (self.directory / NAME).is_file() else self
        for name in DESCRIPTION:
            if getattr(stored, name) != getattr(self, name):
                raise StoreError(f"the store {self.directory} was built with another `{name}`; {_REMEDY}")
        self.origin = stored.origin

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        # Do not pickle memory maps (NumPy would copy their contents); worker processes reopen the files.
        return {**self.__dict__, "_maps": {}}

    @property
    def bytes_per_image(self) -> int:
        """Stored bytes per image over all views."""
        return self.views * sum(spec.nbytes for spec in self.arrays.values())

    @property
    def shards(self) -> list[Shard]:
        """Pairs (view, shard) of the complete store, view by view."""
        return [(view, shard) for view in range(self.views) for shard in range(-(-len(self) // self.shard_size))]

    def path(self, view: int, shard: int) -> Path:
        """File of a shard."""
        return self.directory / f"v{view}.s{shard:05d}.safetensors"

    def samples_of(self, shard: int) -> range:
        """Indices of the samples in a shard; the last shard may be shorter."""
        samples = range(len(self))[shard * self.shard_size : (shard + 1) * self.shard_size]
        if shard < 0 or not samples:
            raise IndexError(f"{self.directory} has no shard {shard}: it holds {len(self)} samples")
        return samples

    def written(self) -> set[Shard]:
        """The shards that are there, by one listing of the folder."""
        names = set(os.listdir(self.directory)) if self.directory.is_dir() else set()  # noqa: PTH208
        return {(v, s) for v, s in self.shards if f"v{v}.s{s:05d}.safetensors" in names}

    def missing(self) -> list[Shard]:
        """Pairs (view, shard) that are still to be written, view by view."""
        written = self.written()
        return [at for at in self.shards if at not in written]

    @property
    def is_complete(self) -> bool:
        """Whether every shard of every view is there."""
        return not self.missing()

    def read(
        self, array: str, indices: Sequence[int] | np.ndarray, view: int | Sequence[int] | np.ndarray = 0
    ) -> np.ndarray:
        """Read one array of B samples (B, *shape), in the order asked for, in one view or in a view for each.

        A StoreError where a shard is still missing, or its file is damaged, and then removed; a KeyError or IndexError
        where the store has no such array, sample or view.
        """
        if (spec := self.arrays.get(array)) is None:
            raise KeyError(f"{self.directory} has no array {array!r}, only {', '.join(self.arrays)}")
        views = np.broadcast_to(view, len(indices)).tolist()
        out = np.empty((len(indices), *spec.shape), spec.read_dtype)
        for row, (index, of) in enumerate(zip(indices, views, strict=True)):
            if not (0 <= of < self.views and 0 <= index < len(self)):
                raise IndexError(f"{self.directory} has no sample {index} in view {of}: {len(self)} in {self.views}")
            shard, offset = divmod(int(index), self.shard_size)
            maps = self._maps.get((of, shard)) or self._map(of, shard)
            if spec.dtype == "int8":
                np.multiply(maps[array][offset], maps[f"{array}.scale"][offset], out=out[row])
            else:
                out[row] = maps[array][offset]
        return out

    def _map(self, view: int, shard: int) -> dict[str, np.ndarray]:
        """Check a shard and map it into memory: values (n, *shape) by array, and for int8 scales (n, C, 1, ...).

        They are read-only plain arrays: indexing a ``numpy.memmap`` costs more than reading a small sample.
        """
        from safetensors.torch import load_file  # a map of NumPy keeps its file open: a large store runs out of them

        path = self.path(view, shard)
        try:
            self._check(view, shard)
        except FileNotFoundError as error:
            missing = f"view {view} shard {shard} is not computed yet; build it first"
            raise StoreError(f"{self.directory}: {missing}") from error
        except ValueError as error:
            logger.warning("%s: damaged", error)
            with contextlib.suppress(OSError):
                path.unlink()
            remedy = "delete it" if path.exists() else "it is removed"
            raise StoreError(f"{error}: {remedy}, run again to compute it") from error
        maps = self._maps[view, shard] = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        for name, values in maps.items():
            values.flags.writeable = False
            axes = 1 + len(self.arrays[name.removesuffix(".scale")].shape)
            maps[name] = values.reshape(*values.shape, *[1] * (axes - values.ndim))
        return maps

    def _check(self, view: int, shard: int) -> None:
        """Refuse a shard's file that is damaged or of another store by a ValueError."""
        path, n = self.path(view, shard), len(self.samples_of(shard))
        with path.open("rb") as file:
            size, expected = os.fstat(file.fileno()).st_size, shard_bytes(self.arrays, n)
            if size != expected:
                raise ValueError(f"{path} has {size} bytes instead of {expected}")
            start = 8 + len(_BEFORE_DIGEST)
            found = file.read(expected - n * sum(spec.nbytes for spec in self.arrays.values()))
            digest = found[start : start + _DIGEST_SIZE].decode("ascii", "replace")
            if found != _header(self.arrays, n, self._identity(view, shard), digest):
                raise ValueError(f"{path} does not have the header of this shard of this store")
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} does not have the hash in its header")

    def _identity(self, view: int, shard: int) -> str:
        samples = self.samples_of(shard)
        ids, hashes = (a[samples.start : samples.stop] for a in (self.sample_ids, self.content_hashes))
        return fingerprint(self.key, self.view_parameters[view], view, shard, ids, hashes)

    def verify(self) -> dict[Shard, str]:
        """Read every shard that is there; returns what is wrong with each damaged (view, shard)."""
        faults = {}
        for at in sorted(self.written()):
            try:
                self._check(*at)
            except (ValueError, OSError) as error:
                faults[at] = str(error)
        return faults

    @contextlib.contextmanager
    def building(self, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the store for building, see :func:`exclusive_lock`; ask :meth:`missing` inside."""
        with exclusive_lock(self.directory / LOCK, wait_s=wait_s):
            self.create()
            yield

    def create(self) -> None:
        """Make ``store.json``, unless it is there, and remove what killed builders left."""
        path = self.directory / NAME
        if not path.is_file():
            made = {"amkd_monai": __version__, "numpy": np.__version__}
            content = {"format": FORMAT, "created_with": made, "origin": self.origin}
            content |= {name: getattr(self, name) for name in DESCRIPTION}
            content["arrays"] = {name: asdict(spec) for name, spec in self.arrays.items()}
            lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
            _write_once(path, [("{\n" + ",\n".join(lines) + "\n}\n").encode()])
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
        """Store all arrays of one shard, (n, *shape) with n = ``len(samples_of(shard))``; one that is there stays.

        No such view is an IndexError. An array that is missing, unknown, of a wrong shape or kind, or not finite in the
        stored dtype is a ValueError. After an OSError (full disk) no part of the shard is left.
        """
        if not 0 <= view < self.views:
            raise IndexError(f"{self.directory} has no view {view}: it holds {self.views}")
        ids, path = [self.sample_ids[index] for index in self.samples_of(shard)], self.path(view, shard)
        if path.is_file():
            return
        if set(values) != set(self.arrays):
            raise ValueError(f"the store holds the arrays {sorted(self.arrays)}, but was given {sorted(values)}")
        encoded: dict[str, np.ndarray] = {}
        for name, spec in self.arrays.items():
            parts = _encode(name, np.asarray(values[name]), spec, ids)
            encoded |= dict(zip((name, f"{name}.scale")[: len(parts)], parts, strict=True))
        digest, data = hashlib.sha256(), []
        for name, (dtype, _) in _tensors(self.arrays, len(ids)).items():
            data.append(np.ascontiguousarray(encoded[name], dtype).reshape(-1).view(np.uint8).data)
            digest.update(data[-1])
        header = _header(self.arrays, len(ids), self._identity(view, shard), digest.hexdigest())
        if not (self.directory / NAME).is_file():
            self.create()
        _write_once(path, [header, *data])


def _write_once(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file; pass over a failure where another process has written it meanwhile: it holds the same."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.writelines(parts)
    except OSError:
        if not path.is_file():
            raise


# ------------------------------------------------------------- which process computes which shards of a store

LOG_INTERVAL_S = 30.0  # between lines of progress where the output is not a terminal
Compute = Callable[[int, int, Callable[[int], object]], Mapping[str, np.ndarray]]
"""(view, shard, report) -> arrays of that shard; ``report`` is called with each number of images that is done."""


@dataclass(frozen=True)
class Part:
    """One of ``count`` equal parts of the work, counted from 0: shards are dealt out by their number."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None = None) -> Part:
        """Read ``3/8``, the third of eight parts; None: that under torchrun, or all. Else a ValueError."""
        if text is None:
            return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"The part '{text}' is invalid: write 1/8 to 8/8 for one of eight.")
        return cls(int(found[1]) - 1, int(found[2]))


EVERYTHING = Part()


def build_missing(
    store: FeatureStore, compute: Compute, part: Part = EVERYTHING, title: str = "", wait_s: float = 3600.0
) -> None:
    """Compute and write the missing shards of a part, with progress, rate and time left.

    A process that builds everything holds the store meanwhile; parts run side by side, on any machines.
    """
    if part.count > 1:
        store.create()
    with store.building(wait_s) if part.count == 1 else nullcontext():
        own, written = store.shards[part.index :: part.count], store.written()
        missing = [at for at in own if at not in written]
        total, left = (sum(len(store.samples_of(shard)) for _, shard in shards) for shards in (own, missing))
        live: dict[str, Any] = {} if os.isatty(2) else {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S}
        with progress(total=total, initial=total - left, desc=title, unit="image", disable=False, **live) as bar:
            for view, shard in missing:
                if store.path(view, shard).is_file():  # another process was faster
                    bar.update(len(store.samples_of(shard)))
                else:
                    store.write_shard(view, shard, compute(view, shard, bar.update))
        store.tidy()


# ------------------------------------------------------------------------------------------- the stores in a folder


class StoredTeacher:
    """One store as found on the disk, in ``<teacher>-<key>``; the store is None where it cannot be opened."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.name.rpartition("-")[0]
        self.modified = (directory / NAME).stat().st_mtime  # seconds since the epoch
        self.store: FeatureStore | None = None
        self.fault, self.state, self.size = "", "damaged", 0  # bytes of all its files
        try:
            self.store = store = FeatureStore.open(directory)
            there, shards = len(store.written()), len(store.shards)
            self.state = "complete" if there == shards else f"incomplete ({there} of {shards} shards)"
        except StoreError as error:
            self.fault = str(error)
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a temporary file of a builder
                self.size += path.stat().st_size


def find_stores(folder: str | Path) -> list[StoredTeacher]:
    """Open every store below a folder, which must exist (FileNotFoundError)."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the cache_dir of a run, such as bundles/.cache.")
    return [StoredTeacher(file.parent) for file in sorted(Path(folder).rglob(NAME))]


def format_stores(found: Sequence[StoredTeacher], folder: str | Path) -> str:
    """Table of stores: teacher, images, views, arrays, size, state."""
    rows = [("data set", "teacher", "images", "views", "arrays", "kB/image", "MB", "state", "folder")]
    for entry in found:
        store, what = entry.store, ("-",) * 4
        if store is not None:
            arrays = (f"{n} {spec.dtype} {'x'.join(map(str, spec.shape))}" for n, spec in store.arrays.items())
            what = (str(len(store)), str(store.views), ", ".join(arrays), f"{store.bytes_per_image / 1e3:.1f}")
        place = str(entry.directory.relative_to(folder))
        rows.append((entry.directory.parent.name, entry.name, *what, f"{entry.size / 1e6:.1f}", entry.state, place))
    if len(rows) == 1:
        return f"{folder} holds no feature store."
    return "\n".join([align(rows, left=None, ruled=True), *(entry.fault for entry in found if entry.fault)])


def useless(found: Iterable[StoredTeacher]) -> dict[Path, str]:
    """Return the stores that no run can use as they are, and why: ``{folder: reason}``.

    A store is useless if it is damaged, incomplete, of an older format, orphaned (its decoded images were deleted) or
    superseded: a newer one has the same teacher name and samples with other weights, preprocessing or image contents.
    """
    entries, reasons = list(found), {}
    for entry in entries:
        if entry.store is None or entry.state != "complete":
            reasons[entry.directory] = entry.fault or entry.state
        elif not (entry.directory.parent / str(entry.store.key.get("decoded")) / "index.json").is_file():
            reasons[entry.directory] = "stale: the decoded images it belongs to are gone"
        else:
            for other in entries:
                if change := _superseded(entry, other):
                    reasons[entry.directory] = f"stale: {change} since; {other.directory.name} is newer"
    return reasons


def _superseded(entry: StoredTeacher, other: StoredTeacher) -> str:
    """What changed between a store and a newer one of the same teacher name and samples; empty if it is none."""
    old, new = entry.store, other.store
    if old is None or new is None or other.modified <= entry.modified or other.state != "complete":
        return ""
    same = (entry.directory.parent, entry.name) == (other.directory.parent, other.name) and "preprocessing" in old.key
    if not same or old.sample_ids != new.sample_ids:
        return ""
    if old.content_hashes != new.content_hashes:
        return "images changed"
    parts = [part for part in ("teacher", "preprocessing") if old.key.get(part) != new.key.get(part)]
    return f"the {' and '.join(parts)} changed" if parts else ""


def prune(folders: Iterable[Path]) -> None:
    """Remove stores; one that a process is building is refused with a TimeoutError."""
    for directory in folders:
        with exclusive_lock(directory / LOCK):
            shutil.rmtree(directory)
