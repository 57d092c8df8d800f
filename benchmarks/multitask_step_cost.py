"""What a step of the student of six tasks costs, in single steps of each with equal networks.

    python benchmarks/multitask_step_cost.py                # phantoms, 96 px, batch 4

CPU time of one thread; blocks of the two alternate, each pair gives a ratio."""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from paired import Row, print_table
from step_cost import TEACHERS, batches, block, build

TASKS = ("busi", "covid", "kvasir_seg", "msd_heart", "aptos2019", "isic2017")
SIZES = {"msd_heart": {"spacing": [2.5, 2.5, 2.74], "volume_size": [16, 96, 64]}}
NETWORKS = {"msd_heart": {"network_def#neck_channels": 64}}  # that of the shared student
LIMIT = 1.10


def measure(image_size: int, batch_size: int, pairs: int, steps: int) -> list[Row]:
    """CPU milliseconds of a step of six tasks and of six single steps."""
    with tempfile.TemporaryDirectory() as folder:
        method = {"admission": {"mode": "all"}, "output_dir": folder, "ckpt_dir": folder, "teachers": TEACHERS}
        sizes = {name: SIZES.get(name, {"image_size": image_size}) for name in TASKS}
        entries = {name: {**size, "recipe#batch_size": batch_size} for name, size in sizes.items()}
        singles = [
            build({**method, **NETWORKS.get(n, {}), **entries[n], "cache_dir": f"{folder}/cache/{n}"}, n) for n in TASKS
        ]
        sources = [batches(trainer) for trainer in singles]
        every = {"cache_dir": f"{folder}/cache", "tasks": entries, "tasks_per_step": len(TASKS)}
        shared = build({**method, **every}, "multitask")
        stream = batches(shared)

        def shared_block() -> float:
            start = time.process_time()
            for _ in range(steps):
                shared.state.iteration += 1
                shared._iteration(shared, next(stream))
            return (time.process_time() - start) / steps * 1e3

        def single_block() -> float:
            return sum(block(trainer, source, steps) for trainer, source in zip(singles, sources, strict=True))

        shared_block(), single_block()  # warm-up
        ours, other = zip(*[(shared_block(), single_block()) for _ in range(pairs)], strict=True)
        return [Row("a step of six tasks, against six single steps", "ms/step", ours, other, LIMIT)]


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    torch.set_num_threads(1)
    return print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    raise SystemExit(main())
