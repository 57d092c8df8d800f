"""One shard of a feature store: the .npy files that hold some samples' arrays, and how values are encoded in them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amkd_monai.atomic import atomic_path
from amkd_monai.data.content import content_hash

_INT8_LIMIT = 127  # symmetric: -128 is not used


@dataclass(frozen=True)
class ArraySpec:
    """One stored array of every sample.

    Args:
        shape: shape for one sample, ``(C, h, w)`` for a map, ``(C,)`` for a pooled vector.
        dtype: ``float16`` and ``float32`` are read as stored. ``int8`` keeps one float32 scale per sample and
            channel (axis 0 of ``shape``) and is read as float32; it needs at least two axes.

    Raises:
        ValueError: an unknown dtype, an empty axis, or int8 for fewer than two axes.
    """

    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "int8"] = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.dtype not in ("float16", "float32", "int8") or min(self.shape, default=1) < 1:
            raise ValueError(f"{self}: use float16, float32 or int8, and at least one value on every axis")
        if self.dtype == "int8" and len(self.shape) < 2:
            raise ValueError(f"{self}: int8 has a scale per channel and needs (channels, ...); use float16 here")

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """Type of the values a reader gets."""
        return np.dtype("float32" if self.dtype == "int8" else self.dtype)


def file_names(array: str, spec: ArraySpec, view: int, shard: int) -> list[str]:
    """Names of the files that hold one array of one shard: the values, and for int8 their scales."""
    names = [f"{array}.v{view}.s{shard:05d}.npy"]
    if spec.dtype == "int8":
        names.append(f"{array}.scale.v{view}.s{shard:05d}.npy")
    return names


def encode_shard(
    arrays: Mapping[str, ArraySpec],
    values: Mapping[str, np.ndarray],
    view: int,
    shard: int,
    sample_ids: Sequence[str],
) -> dict[str, np.ndarray]:
    """Check and encode all arrays of one shard.

    Args:
        arrays: what the store holds, by name.
        values: the same names, each (n, *shape).
        view: which view.
        shard: which shard.
        sample_ids: the n samples of the shard, for messages.

    Returns:
        The content of every file of the shard, by :func:`file_names`.

    Raises:
        ValueError: an array is missing, unknown, of a wrong shape or kind, or not finite in the stored dtype.
    """
    if set(values) != set(arrays):
        raise ValueError(f"the store holds the arrays {sorted(arrays)}, but was given {sorted(values)}")
    content: dict[str, np.ndarray] = {}
    for name, spec in arrays.items():
        encoded = _encode(name, np.asarray(values[name]), spec, sample_ids)
        content.update(zip(file_names(name, spec, view, shard), encoded, strict=True))
    return content


def _encode(array: str, values: np.ndarray, spec: ArraySpec, sample_ids: Sequence[str]) -> list[np.ndarray]:
    """Values (n, *shape) as stored, and for int8 their scales (n, C)."""
    expected = (len(sample_ids), *spec.shape)
    if values.shape != expected or values.dtype.kind not in "fiu":
        raise ValueError(f"array {array!r} needs numbers of shape {expected}, got {values.dtype} {values.shape}")
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32 if spec.dtype == "int8" else spec.dtype, copy=False)
    finite = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        if np.isfinite(values[bad]).all():
            problem, advice = f"a value beyond {stored.dtype}", "store it as float32 or int8"
        else:
            problem, advice = "NaN or infinity", "check that image, or run the teacher in float32"
        raise ValueError(f"array {array!r} of sample {sample_ids[bad]!r} holds {problem}: {advice}")
    return _quantise(stored) if spec.dtype == "int8" else [stored]


def _quantise(values: np.ndarray) -> list[np.ndarray]:
    """Symmetric int8 per sample and channel: (n, C, ...) float32 -> codes (n, C, ...) int8, scales (n, C)."""
    axes = tuple(range(2, values.ndim))
    scales = np.maximum(values.max(axis=axes), -values.min(axis=axes)) / np.float32(_INT8_LIMIT)
    scales[scales == 0] = 1  # a channel of zeros
    codes = np.empty(values.shape, np.int8)
    for code, value, scale in zip(codes, values, scales, strict=True):  # by sample: no second copy of the shard
        levels = np.rint(value / _per_channel(scale, value.ndim))
        code[...] = np.clip(levels, -_INT8_LIMIT, _INT8_LIMIT)
    return [codes, scales]


def _per_channel(scales: np.ndarray, ndim: int) -> np.ndarray:
    """Append axes so that scales (..., C) multiply values (..., C, ...) of ``ndim`` axes."""
    return scales.reshape(*scales.shape, *[1] * (ndim - scales.ndim))


def write_npy(path: Path, values: np.ndarray) -> dict[str, Any]:
    """Write a .npy file atomically.

    ``numpy.save`` is not used: on a full disk it raises an error without ``errno``, and the hash would need a
    second pass over the data.

    Args:
        path: file to make.
        values: its content, of any shape.

    Returns:
        ``{"bytes": size of the file, "sha256": hash of the file}``.

    Raises:
        OSError: the folder is not writable or the disk is full; the file is not there then.
    """
    values = np.ascontiguousarray(values)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    body = values.reshape(-1).view(np.uint8).data
    digest = hashlib.sha256(header.getvalue())
    digest.update(body)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        handle.write(header.getvalue())
        handle.write(body)
    return {"bytes": header.tell() + body.nbytes, "sha256": digest.hexdigest()}


def map_npy(directory: Path, array: str, spec: ArraySpec, view: int, shard: int, n: int) -> list[np.ndarray]:
    """Map one array of one shard of ``n`` samples into memory, read-only.

    Args:
        directory: folder of the store.
        array: name of the array.
        spec: its shape and dtype.
        view: which view.
        shard: which shard.
        n: samples in the shard.

    Returns:
        The values (n, *shape), and for int8 their scales (n, C, 1, ...), ready to multiply with.

    Raises:
        ValueError: a file is missing, is not a .npy file, or holds another shape or dtype.
    """
    expected = [((n, *spec.shape), spec.dtype), ((n, *spec.shape[:1]), "float32")]
    maps = []
    for file, (shape, dtype) in zip(file_names(array, spec, view, shard), expected, strict=False):
        try:
            # As a plain ndarray: indexing a memmap costs more than reading a small sample.
            values = np.asarray(np.load(directory / file, mmap_mode="r", allow_pickle=False))
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{directory / file} cannot be read: {error}") from error
        if values.shape != shape or values.dtype != dtype:
            raise ValueError(f"{directory / file} holds {values.dtype} {values.shape}, not {dtype} {shape}")
        maps.append(values if file.startswith(f"{array}.v") else _per_channel(values, 1 + len(spec.shape)))
    return maps


def find_fault(directory: Path, names: Sequence[str], files: dict[str, Any], *, hashed: bool) -> str | None:
    """Compare the files of one shard with what :func:`write_npy` returned for them.

    Args:
        directory: folder of the store.
        names: the files the shard should have.
        files: their recorded ``bytes`` and ``sha256``, by name.
        hashed: also read the files and compare their hashes.

    Returns:
        What is wrong with the first damaged file, or None.
    """
    if set(names) != set(files):
        return f"the manifest does not name exactly {', '.join(names)}"
    for name, record in files.items():
        try:
            size = (directory / name).stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes instead of {record['bytes']}"
            if hashed and content_hash(directory / name) != record["sha256"]:
                return f"{name} does not have the recorded hash"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
