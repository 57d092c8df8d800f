"""What cached teachers cost: bytes per image, reading, building, and warping what was read.

python benchmarks/cache.py [--rounds 7]

CPU time of one thread, paired and alternated. Reading is compared on the same arrays with MONAI's PersistentDataset and
with one .pt file per sample, all from a warm page cache. Sizes are those of the foundation teachers' outputs, whose
values play no part and are drawn.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import Transform
from paired import Row, paired, print_table

from amkd_monai.cache.build import BATCH_SIZE, ask, cache_teacher
from amkd_monai.cache.store import ArraySpec, FeatureStore, shard_bytes
from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.sampling import Augmentation, warp
from amkd_monai.teachers.base import build_teacher

GRIDS = {"medsam": (256, 16, 16), "retfound": (1024, 14, 14), "usfm": (768, 14, 14), "biomedparse": (1536, 16, 16)}
"""Feature maps at the default ``grid_limit`` of 16."""
ANSWER = (2, 256, 256)
"""What BiomedParse answers itself; other teachers are answered for by probes, at the grid of their features."""
READ = ("medsam", "retfound")
"""The two maps of a sample that is read, 0.53 MB in float16."""
SAMPLES, BATCH, SIDE = 256, 8, 256
LARGE = 100_000
SLOWEST_OPENING = 1.0
"""Seconds."""
LARGEST_SIZE = {"float16": 1.7, "int8": 0.9}
"""MB per image, four teachers."""
SLOWEST_READ = 0.15
"""Milliseconds per sample of two maps."""
LARGEST_OVERHEAD = 1.05
"""Building in forwards of the teacher."""


def filled(folder: Path, name: str, dtype: str, samples: int) -> FeatureStore:
    """A store of drawn numbers in the shapes of one teacher."""
    arrays = {"grid": ArraySpec(GRIDS[name], dtype), "pooled": ArraySpec(GRIDS[name][:1])}
    ids, rng = [f"case_{i:05d}" for i in range(samples)], np.random.default_rng(0)
    store = FeatureStore.create_or_open(folder / f"{name}-{dtype}", {"of": name}, ids, ids, arrays, shard_size=128)
    with store.building():
        for view, shard in store.missing():
            n = len(store.samples_of(shard))
            store.write_shard(view, shard, {a: rng.normal(size=(n, *s.shape)) for a, s in arrays.items()})
    return store


def opening(folder: Path, rounds: int) -> Row:
    """Seconds to open a store of 100,000 samples, whose shards are sparse files of the right size."""
    ids = [f"case_{i:06d}#{i % 100:03d}" for i in range(LARGE)]
    arrays = {"grid": ArraySpec(GRIDS["medsam"])}
    store = FeatureStore.create_or_open(folder / "large-0", {"of": "large"}, ids, ids, arrays, shard_size=128)
    store.create()
    for view, shard in store.shards:
        with store.path(view, shard).open("wb") as file:
            file.truncate(shard_bytes(arrays, len(store.samples_of(shard))))

    def opened() -> None:
        if not FeatureStore.open(store.directory).is_complete:
            raise RuntimeError(f"{store.directory} is not complete")

    return Row(
        f"opening a store of {LARGE:,} samples", "s", [seconds(opened) for _ in range(rounds)], limit=SLOWEST_OPENING
    )


def sizes(folder: Path) -> list[Row]:
    """Megabytes per image of all four teachers."""
    rows = [Row("stored answer of BiomedParse, 2 x 256 x 256, float16", "MB/image", [2 * float(np.prod(ANSWER)) / 1e6])]
    for dtype, limit in LARGEST_SIZE.items():
        size = sum(filled(folder, name, dtype, 128).bytes_per_image for name in GRIDS) / 1e6
        rows.append(Row(f"stored features of four foundation teachers, {dtype}", "MB/image", [size], limit=limit))
    return rows


class ReadMaps(Transform):
    """The transform whose result a PersistentDataset keeps."""

    def __init__(self, stores: list[FeatureStore]) -> None:
        self.stores = stores

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        return {s.key["of"]: torch.from_numpy(s.read("grid", [index])[0]) for s in self.stores}


def reading(folder: Path, rounds: int) -> list[Row]:
    """CPU milliseconds per sample of two maps by random index, and megabytes per second of wall time."""
    stores = {dtype: [filled(folder, name, dtype, SAMPLES) for name in READ] for dtype in LARGEST_SIZE}
    read = ReadMaps(stores["float16"])
    persistent = PersistentDataset(list(range(SAMPLES)), read, folder / "persistent")
    for index in range(SAMPLES):
        torch.save(read(index), folder / f"{index}.pt")
    rng = np.random.default_rng(1)

    def ours(dtype: str) -> int:
        for batch in rng.permutation(SAMPLES).reshape(-1, BATCH).tolist():
            for store in stores[dtype]:
                torch.from_numpy(store.read("grid", batch))
        return SAMPLES

    def monai() -> int:
        return sum(len(persistent[int(i)]) == len(READ) for i in rng.permutation(SAMPLES))

    def files() -> int:
        return sum(
            len(torch.load(folder / f"{i}.pt", weights_only=True)) == len(READ) for i in rng.permutation(SAMPLES)
        )

    def float16() -> int:
        return ours("float16")

    first = paired(float16, monai, rounds)
    rows = [
        Row("reading two maps, 0.53 MB", "ms/sample", first[0], limit=SLOWEST_READ),
        Row("the same, against MONAI PersistentDataset", "ms/sample", *first),
        Row("the same, against one .pt file per sample", "ms/sample", *paired(float16, files, rounds)),
        Row("int8 against float16", "ms/sample", *paired(lambda: ours("int8"), float16, rounds)),
    ]
    megabytes = SAMPLES * sum(np.prod(GRIDS[name]) * 2 for name in READ) / 1e6
    rates = [[megabytes / seconds(work) for _ in range(rounds)] for work in (float16, monai, files)]
    names = ("feature store", "MONAI PersistentDataset", "one .pt file per sample")
    return rows + [Row(f"rate, {name}", "MB/s", rate) for name, rate in zip(names, rates, strict=True)]


def seconds(work: Any) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def building(folder: Path, rounds: int) -> Row:
    """Building a store against the teacher's forwards alone, over the same images in the same batches."""
    polyps = get_task("kvasir_seg")
    items = polyps.layout.find_items(polyps.write_phantom(folder, count=32, size=(240, 360)))
    dataset = DecodedDataset(items, _chain(), folder / "cache")
    teacher = build_teacher({"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"})
    turn, at_once = iter(range(10_000)), BATCH_SIZE["cpu"]

    def whole() -> int:
        cache_teacher(teacher, dataset, folder / f"stores-{next(turn)}", batch_size=at_once)
        return len(dataset)

    def forward() -> int:
        for first in range(0, len(dataset), at_once):
            ask(teacher, dataset, range(first, first + at_once), "cpu")
        return len(dataset)

    times = paired(whole, forward, rounds)
    return Row("building a store, against the forward alone", "ms/image", *times, limit=LARGEST_OVERHEAD)


def _chain() -> Any:
    from data_path import chain

    return chain((SIDE, SIDE))


def augmentation(rounds: int) -> Row:
    """Warping image, mask and two maps, against image and mask alone."""
    generator = torch.Generator().manual_seed(0)
    augment = Augmentation(rotation=0.5, scale=0.25, shift=0.05, flip_height=True, flip_width=True)
    image, label = torch.rand(BATCH, 3, SIDE, SIDE), torch.zeros(BATCH, 1, SIDE, SIDE)
    maps = [torch.rand(BATCH, *GRIDS[name]) for name in READ]

    def warped(what: list[torch.Tensor]) -> int:
        theta = augment.sample(BATCH, (SIDE, SIDE), generator)
        for value in what:
            warp(value, theta)
        return BATCH

    times = paired(lambda: warped([image, label, *maps]), lambda: warped([image, label]), rounds)
    return Row("warping image, mask and two maps, against image and mask", "ms/image", *times)


def measure(rounds: int) -> list[Row]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [opening(Path(folder), rounds), *sizes(Path(folder) / "sizes"), *reading(Path(folder), rounds)]
        return [*rows, building(Path(folder), rounds), augmentation(rounds)]


def main() -> int:
    """Measure and print the table; exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    return print_table(measure(rounds))


if __name__ == "__main__":
    raise SystemExit(main())
