"""What the student costs on one thread of a CPU: eager, and by each runtime it is exported for; its teachers beside it.

    python benchmarks/inference.py                              # polyp student, 256 px; the cheaper teachers
    python benchmarks/inference.py --teachers medsam usfm       # MedSAM takes 20 s an image

The student is exported from untrained weights, on phantoms: its cost does not depend on them. CPU time; blocks of eager
and of every runtime alternate, and each round gives a ratio to eager. Then `predict` is started on one image, in
processes of its own. The exit code is 1 if a goal is missed."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from teachers import TEACHERS as FOUNDATION

from amkd_monai.__main__ import main as amkd_monai
from amkd_monai.data.datalist import inference_datalist
from amkd_monai.export.formats import FORMATS
from amkd_monai.export.runners import Runner, runner, torch_runner
from amkd_monai.teachers.base import build_teacher

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "kvasir_seg"
EXPORTED = ("ts", "onnx", "ort-int8", "openvino", "openvino-int8")
GOALS = {"onnx": 1.9, "ort-int8": 3.5, "openvino": 1.9}
"""How many times faster than eager, at least."""
MOST_MEGABYTES, MOST_SECONDS = 600, 1.0
"""Of `predict` on one image, from start to end; seconds of CPU time."""
TEACHERS: dict[str, tuple[dict[str, Any], int]] = {
    **{
        f"imagenet_lite{n}": ({"kind": "timm", "model": f"tf_efficientnet_lite{n}", "image_size": 224}, 256)
        for n in (1, 2)
    },
    **{name: ({**description, "weights": "random"}, size) for name, (description, size) in FOUNDATION.items()},
}
CHEAP = ("imagenet_lite1", "imagenet_lite2", "usfm", "retfound")
CALLS = 5
"""Of a student in a block."""
TEACHER_ROUNDS = 3
PREDICT = """
import sys, time
from amkd_monai.__main__ import main
from amkd_monai.memory import own_peak
code = main(sys.argv[1:])
assert not {"torch", "monai"} & set(sys.modules)
print(time.process_time(), own_peak())
sys.exit(code)
"""


def export(
    folder: Path, image_size: int, formats: Sequence[str] = EXPORTED, cases: int = 4, calibration: int = 8
) -> tuple[torch.nn.Module, Path]:
    """Export an untrained student of the polyp bundle; return it and the exported bundle."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.json"))
    student = parser.get_parsed_content("network_def").eval()
    torch.save(student.state_dict(), folder / "model.pt")
    settings = {"ckpt_dir": folder, "output_dir": folder / "eval", "cache_dir": folder, "image_size": image_size}
    arguments = ["export", str(BUNDLE), "--to", str(folder / "dist"), "--formats", ",".join(formats), "--accept-loss"]
    arguments += ["--cases", str(cases), "--calibration", str(calibration)]
    arguments += [f"--set={key}={value}" for key, value in settings.items()]
    if amkd_monai(arguments):
        raise SystemExit("the student could not be exported")
    return student, folder / "dist"


def block(run: Callable[[Any], Any], image: Any, calls: int) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    for _ in range(calls):
        run(image)
    return (time.process_time() - start) / calls * 1e3


def alternated(runners: Mapping[str, Runner], image: np.ndarray, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each by round, after a warm-up; every second round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name in list(runners)[:: 1 if number % 2 else -1]:
            milliseconds = block(runners[name], image, CALLS)
            if number:
                times[name].append(milliseconds)
    return times


def students(student: torch.nn.Module, dist: Path, image: np.ndarray, rounds: int) -> tuple[dict[str, Runner], bool]:
    """Print the student's table; return what ran, and whether the goals are kept."""
    channels_last = copy.deepcopy(student).to(memory_format=torch.channels_last)
    runners = {"eager": torch_runner(student), "eager, channels_last": torch_runner(channels_last)}
    runners |= {name: runner(name, dist / "models" / FORMATS[name], 1) for name in EXPORTED}
    rows = {row["name"]: row for row in json.loads((dist / "docs" / "export.json").read_text())["formats"]}
    times = alternated(runners, image, rounds)
    print("| student | MB | p50 ms | p95 ms | eager / this, median [least, most] | peak MB | goal |\n|" + " --- |" * 7)
    kept = True
    for name, values in times.items():
        row, goal = rows.get(name, {}), GOALS.get(name)
        ratios = [one / this for one, this in zip(times["eager"], values, strict=True)]
        ratio, (p50, p95) = statistics.median(ratios), np.percentile(values, (50, 95))
        said = f"{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        size, memory = (f"{row[key]:.{n}f}" if row.get(key) else "-" for key, n in (("megabytes", 1), ("memory", 0)))
        verdict = "" if goal is None else f">= {goal}: {'kept' if ratio >= goal else 'MISSED'}"
        kept &= goal is None or ratio >= goal
        print(f"| {name} | {size} | {p50:.1f} | {p95:.1f} | {said} | {memory} | {verdict} |")
    return runners, kept


def teachers(names: Sequence[str], runners: Mapping[str, Runner], image: np.ndarray, rounds: int) -> None:
    """Print each teacher's time in students, alternated with them."""
    shown = {name: runners[name] for name in ("eager", "onnx", "ort-int8")}
    print(f"\n| teacher | input | ms | {' | '.join(f'in students, {name}' for name in shown)} |\n|{' --- |' * 6}")
    for name in names:
        description, size = TEACHERS[name]
        teacher = build_teacher({"name": name, **description})
        large = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        values, ratios = [], []
        with torch.inference_mode():
            teacher(large)
            for _ in range(rounds):
                values.append(block(teacher, large, 1))
                ratios.append([values[-1] / block(run, image, CALLS) for run in shown.values()])
        cells = [f"{statistics.median(column):.1f}" for column in zip(*ratios, strict=True)]
        print(f"| {name} | {size} x {size} | {statistics.median(values):.0f} | {' | '.join(cells)} |", flush=True)


def prediction(dist: Path, folder: Path, repeats: int) -> bool:
    """Print what `predict` takes for one image, as a process; return whether its goals are kept."""
    image = inference_datalist("kvasir_seg", cache_dir=folder)[0]["image"]
    arguments = ["predict", "--model", str(dist), image, "--output", str(folder / "masks"), "--threads", "1"]
    found = []
    for _ in range(repeats):
        ended = subprocess.run([sys.executable, "-c", PREDICT, *arguments], check=True, capture_output=True, text=True)
        found.append([float(value) for value in ended.stdout.split()[-2:]])
    seconds, megabytes = (statistics.median(column) for column in zip(*found, strict=True))
    kept = seconds < MOST_SECONDS and megabytes < MOST_MEGABYTES
    print(
        f"\npredict, one image, from start to end: {seconds:.2f} s CPU (< {MOST_SECONDS:g}), peak {megabytes:.0f} MB "
        f"(< {MOST_MEGABYTES}): {'kept' if kept else 'MISSED'}"
    )
    return kept


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--teachers", nargs="*", choices=TEACHERS, default=CHEAP)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        student, dist = export(folder, arguments.image_size)
        image = np.random.default_rng(0).random((1, 3, arguments.image_size, arguments.image_size), np.float32)
        runners, fast = students(student, dist, image, arguments.rounds)
        teachers(arguments.teachers, runners, image, TEACHER_ROUNDS)
        light = prediction(dist, folder, TEACHER_ROUNDS)
    return 0 if fast and light else 1


if __name__ == "__main__":
    raise SystemExit(main())
