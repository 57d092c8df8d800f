"""Finished runs judged at their last epoch: how much of a difference is the chance of choosing a checkpoint.

    python benchmarks/last_epoch.py --shared ../shared --jobs 2 --seeds 6             # those of results.py
    python benchmarks/last_epoch.py --shared ../shared --jobs 2 --output runs/ablation    # those of ablation.py

A run keeps the student that was best on its validation section, which is small. Here the student of the last epoch is
evaluated on the same test section, in ``<runs>_last``; nothing is trained. Settings without finished runs are left out;
it resumes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from ablation import FOLDER, heart, polyps, write_planted
from bundle_runner import ROOT, Job, call, commands, is_finished, main, options
from results import SETTINGS

from amkd_monai.engines.runs import record_weights
from amkd_monai.storage import atomic_path
from amkd_monai.weights import file_sha256

STUDENT = "student."
"""What the names of the student's tensors begin with in the distillation state."""


def evaluate(job: Job, shared: Path, runs: Path, output: Path) -> None:
    """Evaluate the last student of one run unless it is done.

    Raises:
        FileNotFoundError: the run has no distillation state.
    """
    name, setting, seed, fold = job
    source, folder = (place / name / f"fold{fold}_seed{seed}" for place in (runs, output))
    if (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(source / "distillation.pt", map_location="cpu", weights_only=True)["distiller"]
    student = {key.removeprefix(STUDENT): value for key, value in state.items() if key.startswith(STUDENT)}
    with atomic_path(folder / "model.pt") as temporary:
        torch.save(student, temporary)
    for file in (
        source / "run.json",
        source / "history.csv",
        *source.glob("split_*.json"),
        *source.glob("student.json"),
    ):
        shutil.copy(file, folder)
    record_weights(folder, file_sha256(folder / "model.pt"))
    elsewhere = {**setting.overrides, "output_dir": str(folder), "ckpt_dir": str(folder)}
    _, evaluation = commands(name, replace(setting, overrides=elsewhere), seed, fold, shared, runs)
    call([evaluation], folder)


if __name__ == "__main__":
    arguments = options(str(__doc__), "runs/results").parse_args()
    runs = arguments.output.resolve()
    settings = SETTINGS | heart() | polyps(write_planted(ROOT / FOLDER))
    finished = {name: s for name, s in settings.items() if is_finished(name, s, arguments.seeds, runs)}
    if not finished:
        raise SystemExit(
            f"{runs} has no setting with {arguments.seeds} finished seeds: run its benchmark, or give --seeds."
        )
    arguments.output = runs.with_name(f"{runs.name}_last")
    main(finished, arguments, lambda job, shared, output: evaluate(job, shared, runs, output))
