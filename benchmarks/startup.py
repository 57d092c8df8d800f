"""How long a cached run takes from its start to its first step, and what memory it has taken by then.

python benchmarks/startup.py [--rounds 3]

CPU seconds of fresh processes of one thread, alternated with ones that only import MONAI's bundles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time

from paired import Row, print_table

IMPORT = "import json, time, monai.bundle; print(json.dumps([time.process_time(), 0]))"


def first_step(folder: str) -> tuple[float, float]:
    """Do the first step of a run in this process; returns its CPU seconds and its peak memory, MB."""
    import torch
    from online import settings
    from step_cost import batches, block, build

    from amkd_monai.memory import own_peak

    torch.set_num_threads(1)
    trainer = build(settings(folder))
    block(trainer, batches(trainer), 1)
    return time.process_time(), own_peak()


def child(*arguments: str) -> list[float]:
    """Run Python; returns what its last line says."""
    ended = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(ended.stdout.splitlines()[-1]))


def measure(rounds: int) -> list[Row]:
    """CPU seconds to the first step, and the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        own = [__file__, "--folder", folder]
        child(*own), child("-c", IMPORT)  # the first one fills the cache
        found = [(child(*own), child("-c", IMPORT)) for _ in range(rounds)]
    ours, other = [run[0] for run, _ in found], [alone[0] for _, alone in found]
    return [
        Row("start of a cached run to its first step, against importing MONAI's bundles", "CPU s", ours, other),
        Row("the same, peak memory of the process", "MB", [run[1] for run, _ in found]),
    ]


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="do the first step of a run here, in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.folder is None:
        return print_table(measure(arguments.rounds))
    with contextlib.redirect_stdout(sys.stderr):  # what MONAI prints on the way
        found = first_step(arguments.folder)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
