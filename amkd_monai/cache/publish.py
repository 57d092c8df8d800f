"""Write a store as safetensors files for publication, one per shard; no torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from amkd_monai.atomic import atomic_write_json
from amkd_monai.cache.shards import file_names
from amkd_monai.cache.store import FeatureStore, StoreError


def export_store(directory: str | Path, target: str | Path) -> Path:
    """Write a complete store as ``shard.v0.s00000.safetensors`` files with a ``store.json``.

    A file holds the arrays of one shard as they are stored, int8 with ``<array>.scale`` (samples, channels), and in its
    metadata the ids and content hashes of its samples. Where the teacher's weights lay is left out. The folder appears
    whole or not at all.

    Args:
        directory: the store.
        target: folder to make.

    Raises:
        FileExistsError: ``target`` is there already.
        StoreError: the store is incomplete or damaged.
        OSError: ``target`` cannot be written.
    """
    target, store = Path(target), FeatureStore.open(directory)
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it or give another folder.")
    if not store.is_complete:
        raise StoreError(f"{directory} lacks {len(store.missing())} shards: build it first, then export it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for view, shard in sorted(store.committed):
            _export_shard(store, view, shard, temporary / f"shard.v{view}.s{shard:05d}.safetensors")
        about = {
            "key": store.key,
            "arrays": {name: {"shape": spec.shape, "dtype": spec.dtype} for name, spec in store.arrays.items()},
            "views": store.view_parameters,
            "samples": len(store),
            "shard_size": store.shard_size,
        }
        atomic_write_json(temporary / "store.json", about)
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _export_shard(store: FeatureStore, view: int, shard: int, path: Path) -> None:
    samples, tensors = store.samples_of(shard), {}
    for name, spec in store.arrays.items():
        for file, kept in zip(file_names(name, spec, view, shard), (name, f"{name}.scale"), strict=False):
            tensors[kept] = np.load(store.directory / file, allow_pickle=False)
    about = {
        "ids": store.sample_ids[samples.start : samples.stop],
        "content_hashes": store.content_hashes[samples.start : samples.stop],
        "view": store.view_parameters[view],
    }
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in about.items()})
