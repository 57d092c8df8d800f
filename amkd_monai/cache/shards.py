"""One shard of a feature store: a safetensors file with all arrays of some samples, and how values are encoded in it.

Size and header of the file follow from what the store holds, but for the SHA-256 of the data, which stands first in the
header. So a file that is truncated, altered, or of another store is told from the one it should be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from amkd_monai.atomic import atomic_path

_INT8_LIMIT = 127  # symmetric: -128 is not used
_SAFETENSORS = {"float32": "F32", "float16": "F16", "int8": "I8"}
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_DIGEST_SIZE = 64


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
    coded = {name: spec for name, spec in arrays.items() if spec.dtype == "int8"}
    found |= {f"{name}.scale": (np.dtype("<f4"), (n, spec.shape[0])) for name, spec in coded.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(arrays: Mapping[str, ArraySpec], n: int, identity: str, digest: str) -> bytes:
    """What stands in the file before the data."""
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


def write_shard_file(
    path: Path,
    arrays: Mapping[str, ArraySpec],
    values: Mapping[str, np.ndarray],
    sample_ids: Sequence[str],
    identity: str,
) -> None:
    """Check, encode and write all arrays of one shard; the file appears whole or not at all.

    Args:
        path: file to make.
        arrays: what the store holds, by name.
        values: the same names, each (n, *shape).
        sample_ids: the n samples of the shard, for messages.
        identity: hash of all that tells this shard from others, 64 hexadecimal digits.

    Raises:
        ValueError: an array is missing, unknown, of a wrong shape or kind, or not finite in the stored dtype.
        OSError: the folder is not writable or the disk is full.
    """
    if set(values) != set(arrays):
        raise ValueError(f"the store holds the arrays {sorted(arrays)}, but was given {sorted(values)}")
    encoded: dict[str, np.ndarray] = {}
    for name, spec in arrays.items():
        parts = _encode(name, np.asarray(values[name]), spec, sample_ids)
        encoded |= dict(zip((name, f"{name}.scale"), parts, strict=False))
    n, digest, data = len(sample_ids), hashlib.sha256(), []
    for name, (dtype, _) in _tensors(arrays, n).items():
        data.append(np.ascontiguousarray(encoded[name], dtype).reshape(-1).view(np.uint8).data)
        digest.update(data[-1])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_header(arrays, n, identity, digest.hexdigest()))
        for part in data:
            file.write(part)


def _encode(array: str, values: np.ndarray, spec: ArraySpec, sample_ids: Sequence[str]) -> list[np.ndarray]:
    """Values (n, *shape) as stored, and for int8 their scales (n, C)."""
    expected = (len(sample_ids), *spec.shape)
    if values.shape != expected or values.dtype.kind not in "fiu":
        raise ValueError(f"array {array!r} needs numbers of shape {expected}, got {values.dtype} {values.shape}")
    with np.errstate(over="ignore"):
        stored = values.astype(spec.read_dtype, copy=False)
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
        levels = np.rint(value / scale.reshape(-1, *[1] * (value.ndim - 1)))
        code[...] = np.clip(levels, -_INT8_LIMIT, _INT8_LIMIT)
    return [codes, scales]


def check_shard(path: Path, arrays: Mapping[str, ArraySpec], n: int, identity: str) -> int:
    """Read the file of a shard of ``n`` samples and compare size, header and hash with what they should be.

    Args:
        path: its file.
        arrays: what the store holds, by name.
        n: samples in the shard.
        identity: as it was written with.

    Returns:
        Where its data begins, bytes.

    Raises:
        FileNotFoundError: the shard is not there.
        ValueError: the file is damaged, or the shard of another store; the message names it.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size, expected = os.fstat(file.fileno()).st_size, shard_bytes(arrays, n)
        if size != expected:
            raise ValueError(f"{path} has {size} bytes instead of {expected}")
        start = 8 + len(_BEFORE_DIGEST)
        found = file.read(expected - n * sum(spec.nbytes for spec in arrays.values()))
        digest = found[start : start + _DIGEST_SIZE].decode("ascii", "replace")
        if found != _header(arrays, n, identity, digest):
            raise ValueError(f"{path} does not have the header of this shard of this store")
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(f"{path} does not have the hash in its header")
    return len(found)


def map_shard(path: Path, arrays: Mapping[str, ArraySpec], n: int, offset: int) -> dict[str, list[np.ndarray]]:
    """Map a checked shard of ``n`` samples, whose data begins at ``offset``, into memory.

    Returns:
        For every array its values (n, *shape), and for int8 the scales (n, C, 1, ...), ready to multiply with. They are
        read-only plain arrays: indexing a ``numpy.memmap`` costs more than reading a small sample.
    """
    import torch  # its maps keep no file open, those of Python before 3.13 do: a large store would run out of them

    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    mapped.flags.writeable = False
    tensors = {}
    for name, (dtype, shape) in _tensors(arrays, n).items():
        tensors[name] = np.frombuffer(mapped, dtype, int(np.prod(shape)), offset).reshape(shape)
        offset += tensors[name].nbytes
    maps = {}
    for name, spec in arrays.items():
        maps[name] = [tensors[name]]
        if spec.dtype == "int8":
            maps[name].append(tensors[f"{name}.scale"].reshape(n, spec.shape[0], *[1] * (len(spec.shape) - 1)))
    return maps
