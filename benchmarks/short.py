"""What a step, a start, the cache and the data path cost, in a few minutes: one table (`make bench`).

python benchmarks/short.py [--full]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys

import cache
import data_path
import online
import startup
import step_cost
import torch
import two_ranks
from paired import print_table


def main() -> int:
    """Measure and print; exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="MedSAM's network in the loop too")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):  # what MONAI prints on the way
        rows = step_cost.measure(image_size=256, batch_size=4, pairs=7, steps=4, only=step_cost.DEFAULT)
        rows += online.measure(rounds=5, full=full) + startup.measure(rounds=3)
        rows += cache.measure(rounds=5) + two_ranks.measure(rounds=3) + data_path.measure(rounds=3)
    return print_table(rows)


if __name__ == "__main__":
    raise SystemExit(main())
