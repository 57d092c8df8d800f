"""Students of finished runs scored on labelled images of another place: transfer, and tests with more images.

    python benchmarks/outside.py --shared ../shared --only "kvasir_12*,isic2017_30*,aptos2019_24*" --seeds 3

Nothing is trained. ``runs/results_outside/<row>_on_<data>`` holds the scores; it resumes. Rows without finished runs
are left out, and so are rows whose students saw images of the same pool.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

from bundle_runner import Job, call, commands, is_finished, main, options
from results import SETTINGS

from amkd_monai.metrics.summary import read_case_csv

POOLS = {
    "kvasir_seg": ("clinicdb", "kvasir"),  # CVC-ClinicDB; further images of Kvasir-SEG
    "isic2017": ("isic2017",),
    "aptos2019": ("idrid",),
}
"""Folders of ``shared/pools`` in the layout of the bundle's own data."""


def evaluate(job: Job, shared: Path, runs: Path, output: Path) -> None:
    """Score one student on the pool that its row names, unless it is done."""
    name, setting, seed, fold = job
    row, pool = name.split("_on_")
    source, folder = runs / row / f"fold{fold}_seed{seed}", output / name / f"fold{fold}_seed{seed}"
    if (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _, [*evaluation] = commands(row, replace(setting, pool=None), seed, fold, shared, runs)
    config = evaluation.index("--config_file")
    cache = evaluation.index("--cache_dir")
    places = ["--ckpt_dir", str(source), "--output_dir", str(folder), "--other_data", str(shared / "pools" / pool)]
    call([[*evaluation[: config + 2], *evaluation[cache : cache + 2], *places]], folder)
    (folder / "run.json").write_text((source / "run.json").read_text())
    cases, groups = [str(case["id"]) for case in read_case_csv(folder / "per_case.csv")], {}
    if (sequences := shared / "pools" / pool / "sequences.csv").is_file():  # frames of one polyp are one group
        with sequences.open() as file:
            groups = {line["id"]: f"sequence {line['sequence']}" for line in csv.DictReader(file)}
    split = {"test": {case: groups.get(case, case) for case in cases}}
    (folder / "split_outside.json").write_text(json.dumps(split))


if __name__ == "__main__":
    arguments = options(str(__doc__), "runs/results").parse_args()
    runs = arguments.output.resolve()
    settings = {
        f"{name}_on_{pool}": replace(s, reference=s.reference and f"{s.reference}_on_{pool}")
        for name, s in SETTINGS.items()
        if is_finished(name, s, arguments.seeds, runs)
        for pool in POOLS.get(s.bundle, ())
        if not (s.pool or s.joined or "").startswith(pool)
    }
    if not settings:
        raise SystemExit(f"{runs} has no setting with {arguments.seeds} finished seeds: run results.py first.")
    arguments.only = ",".join(f"{pattern}_on_*" for pattern in arguments.only.split(","))
    arguments.output = runs.with_name(f"{runs.name}_outside")
    main(settings, arguments, lambda job, shared, output: evaluate(job, shared, runs, output))
