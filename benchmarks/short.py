"""What a step costs, what the cache costs and what the data path costs, in a few minutes: one table (`make bench`).

python benchmarks/short.py
"""

from __future__ import annotations

import contextlib
import logging
import sys

import cache
import data_path
import step_cost
import torch
from paired import print_table


def main() -> int:
    """Measure and print; exit code 1 if a limit is not kept."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):  # what MONAI prints on the way
        rows = step_cost.measure(image_size=256, batch_size=4, pairs=7, steps=4, only=step_cost.DEFAULT)
        rows += cache.measure(rounds=5) + data_path.measure(rounds=3)
    return print_table(rows)


if __name__ == "__main__":
    raise SystemExit(main())
