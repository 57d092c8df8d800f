"""Runs of bundles with overrides, side by side and resumable.

A run that has its metrics.json is not repeated. Teachers are admitted by the cross-fitting of the first seed; later
seeds repeat its decision.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tables import Row, table

ROOT = Path(__file__).resolve().parent.parent
BEST: dict[str, Any] = {
    "keep": "best",
    "recipe#ema": 0.0,
    "recipe#first_stage": 0.0,
    "loss_strength#decay": 0.3,
    "losses": {"output": 1.0, "overlap": 0.0, "feature": 0.2},
    "kd_temperature": {"start": 2.0, "end": 2.0},
}
"""Runs that keep the student of the best validation; others keep the averaged one of the last epoch, the default."""
BEST_MASKS = {**BEST, "calibrate_masks": False}


@dataclass(frozen=True)
class Setting:
    """One row of the results: a bundle with overrides, over folds where it is cross-validated.

    ``data`` is a folder in ``shared/data``, or an absolute path; ``joined`` a folder in ``shared/pools`` of the same
    layout, whose labelled images join those of ``data``; ``pool`` a pattern of unlabelled files in ``shared/pools``,
    which are copied into a folder of their own.
    """

    bundle: str
    data: str
    overrides: dict[str, Any]
    reference: str | None = None
    folds: tuple[int, ...] = (0,)
    teachers: list[dict[str, Any]] | None = field(default=None)
    seeds: int | None = None  # where fewer or more are wanted than of the other rows
    pool: str | None = None
    joined: str | None = None


Job = tuple[str, Setting, int, int]
"""A run: the name of its setting, the setting, seed and fold."""


def overrides_of(name: str, setting: Setting, seed: int, fold: int, shared: Path, output: Path) -> dict[str, Any]:
    """Return what one run sets beyond its bundle; pools are copied beside the results."""
    folder = output / name / f"fold{fold}_seed{seed}"
    data = shared / "data" / setting.data
    if setting.joined is not None:
        data = _joined(data, shared / "pools" / setting.joined, output / "joined" / setting.joined)
    overrides: dict[str, Any] = {
        "dataset_dir": str(data),
        "output_dir": str(folder),
        "ckpt_dir": str(folder),
        "cache_dir": str(output / "cache" / setting.bundle),
        "seed": seed,
        "teachers": "imagenet_lite1+imagenet_lite2",  # whatever files lie on this machine
        **setting.overrides,
    }
    if setting.folds != (0,):
        overrides["fold"] = fold
    if setting.pool is not None:
        overrides["unlabelled"] = [str(_copied(shared / "pools", setting.pool, output / "pools"))]
    if seed > 0 and setting.teachers != [] and "admission" not in setting.overrides:
        overrides["admission"] = {"mode": decision(output / name / "fold0_seed0" / "run.json")}
    if setting.teachers is not None:
        weights = str(shared / "weights" / "kvasir_specialist.ts")
        overrides["teachers"] = [{"path": weights, **t} if t["kind"] == "specialist" else t for t in setting.teachers]
    return overrides


def commands(name: str, setting: Setting, seed: int, fold: int, shared: Path, output: Path) -> list[list[str]]:
    """Return the train and evaluate commands of one run."""
    overrides = overrides_of(name, setting, seed, fold, shared, output)
    arguments = _arguments(overrides)
    # evaluation has handlers of its own
    asked = _arguments({key: value for key, value in overrides.items() if not key.startswith("validate#handlers")})
    train, evaluate = (f"bundles/{setting.bundle}/configs/{config}.json" for config in ("train", "evaluate"))
    run = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    return [
        [*run, "training", "--config_file", train, *arguments],
        [*run, "--config_file", f"['{train}','{evaluate}']", *asked],
    ]


def _copied(pools: Path, pattern: str, output: Path) -> Path:
    """Copy the files of a pattern into a folder, unless they are there."""
    folder = output / re.sub(r"[^a-z0-9]+", "_", pattern)
    folder.mkdir(parents=True, exist_ok=True)
    if not (files := sorted(pools.glob(pattern))):
        raise FileNotFoundError(
            f"There is no file {pattern} in {pools}: give the folder that holds pools/ as --shared."
        )
    for file in files:
        if not (folder / file.name).is_file():
            shutil.copy(file, folder)
    return folder


def _joined(data: Path, more: Path, output: Path) -> Path:
    """Copy two folders of one layout into one, unless it is there; rows of tables of one name follow each other."""
    part = output.with_suffix(".part")
    if output.is_dir():
        return output
    shutil.rmtree(part, ignore_errors=True)
    for source in (data, more):
        part.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.rglob("*")):
            copy = part / file.relative_to(source)
            if file.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
            elif file.suffix == ".csv" and copy.is_file():
                header, rows = file.read_text().split("\n", 1)
                if header != copy.read_text().split("\n", 1)[0]:
                    raise ValueError(f"{file} has other columns than the table of the same name in {data}.")
                copy.write_text(copy.read_text().rstrip("\n") + "\n" + rows)
            elif copy.is_file() and copy.suffix in (".jpg", ".png"):
                raise FileExistsError(f"{file} has the name of an image in {data}.")
            else:
                shutil.copy(file, copy)
    part.rename(output)
    return output


def decision(record: Path) -> str:
    """Return the admission mode that repeats the decision of the first seed, whose cross-fitting is not repeated."""
    if not record.is_file():
        return "cross_fit"
    admitted = {t["outputs_admitted"] for t in json.loads(record.read_text())["distillation"]["teachers"]}
    return {(True,): "all", (False,): "none"}.get(tuple(admitted), "cross_fit")


def _arguments(overrides: dict[str, Any]) -> list[str]:
    texts = {key: value if isinstance(value, str) else repr(value) for key, value in overrides.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def execute(job: Job, shared: Path, output: Path) -> None:
    """Train and evaluate one run unless it is done."""
    name, setting, seed, fold = job
    folder = output / name / f"fold{fold}_seed{seed}"
    if (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    call(commands(name, setting, seed, fold, shared, output), folder)


def call(lines: list[list[str]], folder: Path) -> None:
    """Run commands one after the other with one thread each; their words and output go to ``log.txt``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        for command in lines:
            print(" ".join(command), file=log, flush=True)
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    print(f"done: {folder}", flush=True)


def seeds_of(setting: Setting, seeds: int) -> list[int]:
    """Return the seeds of a row."""
    return list(range(setting.seeds or seeds))


def is_finished(name: str, setting: Setting, seeds: int, output: Path) -> bool:
    """Whether every run of a row has its metrics."""
    folders = (output / name / f"fold{f}_seed{s}" for f in setting.folds for s in seeds_of(setting, seeds))
    return all((folder / "metrics.json").is_file() for folder in folders)


def options(description: str, default_output: str) -> argparse.ArgumentParser:
    """Return the command line that every comparison of runs has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_default = Path(os.environ.get("AMKD_SHARED_DATA", "../shared/data")).parent
    parser.add_argument("--shared", type=Path, default=shared_default, help="folder with data/ and weights/")
    parser.add_argument("--output", type=Path, default=Path(default_output))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", help="settings by name, with * and ?, and commas between")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the table of finished rows")
    return parser


def main(
    settings: dict[str, Setting], arguments: argparse.Namespace, run: Callable[[Job, Path, Path], None] = execute
) -> None:
    """Run what is missing, print and keep the table; ``arguments`` as of :func:`options`."""
    shared, output = arguments.shared.resolve(), arguments.output.resolve()
    chosen = {
        name: setting for name, setting in settings.items() if any(fnmatch(name, p) for p in arguments.only.split(","))
    }
    if not arguments.table:
        jobs = [
            (name, setting, seed, fold)
            for name, setting in chosen.items()
            for seed in seeds_of(setting, arguments.seeds)
            for fold in setting.folds
        ]
        jobs.sort(key=lambda job: job[2:])  # all rows of the first seed first, fold by fold
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda job: run(job, shared, output), jobs))
    elif left_out := [name for name, s in chosen.items() if not is_finished(name, s, arguments.seeds, output)]:
        print(f"not finished, left out: {', '.join(left_out)}\n")
        chosen = {name: setting for name, setting in chosen.items() if name not in left_out}
    rows = {name: Row(s.bundle, len(seeds_of(s, arguments.seeds)), s.reference) for name, s in chosen.items()}
    text = table(rows, output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text + "\n")
    print(text)
