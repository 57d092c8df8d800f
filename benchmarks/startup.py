"""How long a cached run takes from its start to its first step, and what memory it has taken by then.

python benchmarks/startup.py [--rounds 3] [--foundation]

CPU seconds of fresh processes of one thread, alternated with ones that only import MONAI's bundles. With --foundation
of runs with four foundation teachers whose outputs are cached, alternated with runs without teachers: tiny ones in
the official layouts and USFM at full size, all from files of random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paired import Row, print_table

MOST = 1.1
"""Start of a run with four known teachers, in starts of one without."""
IMPORT = "import json, time, monai.bundle; print(json.dumps([time.process_time(), 0]))"


def foundation_teachers(folder: Path) -> list[dict[str, Any]]:
    """Write four weight files, and describe the teachers that are read from them."""
    import torch

    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "teachers"))
    from tiny_teachers import TINY, official_state, tiny

    from amkd_monai.teachers.base import build_teacher

    described = []
    for which in ("medsam", "retfound", "usfm", "biomedparse"):
        options: dict[str, Any] = {"kind": "usfm", "weights": "random"} if which == "usfm" else TINY[which]
        teacher = build_teacher({"name": which, **options}) if which == "usfm" else tiny(which)
        torch.save(official_state(which, teacher), folder / f"{which}.pth")
        described.append({"name": which, **options, "weights": str(folder / f"{which}.pth")})
    return described


def first_step(folder: str, teachers: list[dict[str, Any]] | None) -> tuple[float, float]:
    """Do the first step of a run in this process; returns its CPU seconds and its peak memory, MB."""
    import torch
    from online import settings
    from step_cost import batches, block, build

    from amkd_monai.memory import own_peak

    torch.set_num_threads(1)
    given = settings(folder)
    trainer = build(given if teachers is None else {**given, "teachers": teachers})
    block(trainer, batches(trainer), 1)
    return time.process_time(), own_peak()


def child(*arguments: str) -> list[float]:
    """Run Python; returns what its last line says."""
    ended = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(ended.stdout.splitlines()[-1]))


def measure_foundation(rounds: int) -> Row:
    """CPU seconds to the first step with four known teachers and with none."""
    with tempfile.TemporaryDirectory() as folder:
        described = foundation_teachers(Path(folder))
        runs = [
            (__file__, "--folder", f"{folder}/{len(teachers)}", "--teachers", json.dumps(teachers))
            for teachers in (described, [])
        ]
        for run in runs:
            child(*run)  # fills the cache
        found = [[child(*run)[0] for run in runs] for _ in range(rounds)]
    what = "start of a cached run with four foundation teachers, against one without teachers"
    return Row(what, "CPU s", *zip(*found, strict=True), MOST)


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
    parser.add_argument("--foundation", action="store_true", help="only the runs with foundation teachers and without")
    parser.add_argument("--teachers", type=json.loads, help="their descriptions")
    parser.add_argument("--folder", help="do the first step of a run here, in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.folder is None:
        rounds = arguments.rounds
        return print_table([measure_foundation(rounds)] if arguments.foundation else measure(rounds))
    with contextlib.redirect_stdout(sys.stderr):  # what MONAI prints on the way
        found = first_step(arguments.folder, arguments.teachers)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
