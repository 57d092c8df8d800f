"""Building a store by two processes (gloo), against one of them alone: wall seconds, and the peak memory of a process.

python benchmarks/two_ranks.py [--rounds 3]

Both processes live throughout; the other one waits while one builds alone. Each has one thread: the machine needs two
cores that are free.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paired import Row, print_table

COUNT, VIEWS = 32, 4
"""Each view of the images is a shard, and each process computes two of the four."""


def build(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Build stores in turn alone and by all processes of the group, which is made here; wall seconds."""
    import torch
    import torch.distributed as dist
    from data_path import chain

    from amkd_monai.cache.build import cache_teacher
    from amkd_monai.cache.store import EVERYTHING, Part
    from amkd_monai.data.datasets import get_task
    from amkd_monai.data.decoded import DecodedDataset
    from amkd_monai.memory import own_peak
    from amkd_monai.teachers.base import build_teacher

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    polyps = get_task("kvasir_seg")
    dataset = DecodedDataset(
        polyps.layout.find_items(polyps.write_phantom(folder / str(rank), count=COUNT, size=(240, 360))),
        chain((256, 256)),
        folder / "cache",
    )
    teacher = build_teacher({"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"})

    def seconds(name: str, part: Part | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        if part is not None:
            cache_teacher(teacher, dataset, folder / name, views=VIEWS, part=part)
        dist.barrier()
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"together": [], "alone": []}
    for turn in range(rounds + 1):
        parts = {"together": Part(rank, world), "alone": EVERYTHING if rank == 0 else None}
        for name in sorted(parts, reverse=turn % 2 == 0):
            found[name].append(seconds(f"{name}-{turn}", parts[name]))
    dist.destroy_process_group()
    return {name: times[1:] for name, times in found.items()} | {"peak": [own_peak()]}  # without the warm-up


def measure(rounds: int) -> list[Row]:
    """Wall seconds of two processes and of one, and the peak memory of one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--rounds", str(rounds), "--folder", folder], check=True, env=environment)
        found = json.loads((Path(folder) / "found.json").read_text())
    return [
        Row("building a store by two processes, against one, wall time", "s", found["together"], found["alone"]),
        Row("building a store, EfficientNet-Lite1, peak memory of the process", "MB", found["peak"]),
    ]


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="build here, as one of torchrun's processes, and write JSON")
    arguments = parser.parse_args()
    if arguments.folder is None:
        return print_table(measure(arguments.rounds))
    found = build(arguments.folder, arguments.rounds)
    if os.environ["RANK"] == "0":
        (arguments.folder / "found.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
