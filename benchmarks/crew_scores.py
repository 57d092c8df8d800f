"""What crews know of held-out labels, without a training of students: scores by cross-fitting.

    python benchmarks/crew_scores.py --shared ../shared --only "*_side_crew,*_finer_crew"

Rows are those of results.py whose teachers are crews, seed 0. The undistilled student's own score is cross-fitted only
in rows that admit by it; it costs a few trainings."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

import torch
from bundle_runner import overrides_of
from results import SETTINGS

from amkd_monai.engines.prepare import open_bundle

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Print the held-out scores of the crew of each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and pools/")
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder whose caches are used")
    parser.add_argument("--only", default="*_side_crew,*_finer_crew", help="rows by name, with * and ?, by commas")
    arguments = parser.parse_args()
    shared, output = arguments.shared.resolve(), arguments.output.resolve()
    torch.set_num_threads(1)
    for name, setting in SETTINGS.items():
        if not any(fnmatch(name, pattern) for pattern in arguments.only.split(",")):
            continue
        overrides = overrides_of(name, setting, 0, setting.folds[0], shared, output)
        inner = {key: overrides.pop(key) for key in list(overrides) if "#" in key}
        config = open_bundle(ROOT / "bundles" / setting.bundle, overrides)
        config.update(inner)
        for teacher in config.get_parsed_content("targets").teachers:
            facts = {key: value for key, value in teacher.record.items() if isinstance(value, int | float | str)}
            print(f"{name}: {facts}", flush=True)


if __name__ == "__main__":
    main()
