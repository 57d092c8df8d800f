"""What 8 bits cost a trained student, on this processor and without its AVX-512, VNNI and AMX instructions.

    python benchmarks/int8.py bundles/kvasir_seg --set dataset_dir=... ckpt_dir=... output_dir=... image_size=128

Labelled images of the validation and test sections are answered by the exporter's networks, calibrated as `export` does
it. `avx2_only.c` hides the instructions (Linux, a C compiler, a processor of Intel). The exit code is 1 where 8 bits
lose more than `export` accepts, or more than a rounding lies between the two ways."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from amkd_monai.cli import settings_of
from amkd_monai.export.runners import runner

FORMATS = ("onnx", "ort-int8", "openvino-int8")
SAME = 1e-3
"""Dice that may lie between the two ways: layers in floats are summed in another order."""


def answer(name: str, file: Path, cases: Path, output: Path) -> None:
    """Answer all images of a file and keep the label maps, and the CPU milliseconds of one image."""
    run, found, milliseconds = runner(name, file, 1), {}, []
    with np.load(cases) as stored:
        for key in (key for key in stored.files if key.startswith("image")):
            batch, start = stored[key], time.process_time()
            found[key] = np.concatenate([run(batch[i : i + 1]) for i in range(len(batch))]).argmax(1)
            milliseconds.append((time.process_time() - start) / len(batch) * 1e3)
    np.savez(output, ms=np.median(milliseconds), **found)


def dices(found: Path, cases: Path, classes: int) -> tuple[np.ndarray, float]:
    """Return the mean Dice over classes of each case with foreground, and the milliseconds of an image."""
    values = []
    with np.load(found) as answers, np.load(cases) as stored:
        for key in (key for key in answers.files if key != "ms"):
            label = stored[key.replace("image", "label")]
            mask = np.where(label == 255, 255, answers[key])
            pairs = [(mask == c, label == c) for c in range(1, classes)]
            if scores := [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs if b.any()]:
                values.append(np.mean(scores))
        return np.array(values), float(answers["ms"])


def prepare(bundle: str, settings: dict[str, object], calibration: int, folder: Path) -> int:
    """Write networks and images of a bundle's run into a folder; return the number of classes."""
    from amkd_monai.data.splits import spread
    from amkd_monai.export import formats
    from amkd_monai.export.bundle import calibration_batches
    from amkd_monai.export.source import Source

    source = Source(bundle, settings)
    if source.task.is_classification:
        raise SystemExit(f"{bundle} has no masks to score: give a bundle of segmentation.")
    batches = calibration_batches(source, spread(source.data.train, calibration))
    for name in FORMATS:
        formats.write(name, source.student, folder, batches)
    cases = [source.case(item) for item in (*source.data.validation, *source.data.test)]
    images = {f"image{n}": case.batch for n, case in enumerate(cases)}
    np.savez(folder / "cases.npz", **images, **{f"label{n}": case.label for n, case in enumerate(cases)})
    return len(source.task.classes)


def main() -> int:
    """Measure and print; exit code 1 if 8 bits lose too much anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--calibration", type=int, default=32)
    arguments = parser.parse_args()
    from amkd_monai.export.bundle import LARGEST_LOSS
    from amkd_monai.export.formats import FORMATS as FILES

    kept = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        classes = prepare(arguments.bundle, settings_of(arguments.set), arguments.calibration, folder)
        hidden, source = folder / "avx2_only.so", Path(__file__).with_name("avx2_only.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", hidden, source], check=True)
        flags = Path("/proc/cpuinfo").read_text().split()
        here = "this processor, " + ("with VNNI" if {"avx512_vnni", "avx_vnni"} & {*flags} else "without VNNI")
        scores: dict[tuple[str, str], np.ndarray] = {}
        print("| network | on | cases | Dice | loss [95 % interval] | largest loss | ms |\n|" + " --- |" * 7)
        for way, library in ((here, None), ("AVX2 alone", hidden)):
            environment = os.environ | ({"LD_PRELOAD": str(library)} if library else {})
            if library and subprocess.run(["true"], env=environment).returncode:
                print(f"{way}: not measured")
                break
            for name in FORMATS:
                found = folder / "found.npz"
                given = [name, folder / FILES[name], folder / "cases.npz", found]
                subprocess.run([sys.executable, __file__, "answer", *given], env=environment, check=True)
                values, milliseconds = dices(found, folder / "cases.npz", classes)
                scores[way, name] = values
                loss = scores[way, FORMATS[0]] - values
                half = 1.96 * loss.std(ddof=1) / len(loss) ** 0.5
                kept &= loss.mean() <= LARGEST_LOSS and abs(values.mean() - scores[here, name].mean()) <= SAME
                interval = f"{loss.mean():.4f} [{loss.mean() - half:.4f}, {loss.mean() + half:.4f}]"
                cells = (name, way, len(values), f"{values.mean():.4f}", interval, f"{loss.max():.3f}")
                print(f"| {' | '.join(map(str, cells))} | {milliseconds:.1f} |", flush=True)
    print("kept" if kept else f"MISSED: more than {LARGEST_LOSS:g} is lost, or the ways differ")
    return 0 if kept else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        answer(sys.argv[2], *map(Path, sys.argv[3:]))
    else:
        raise SystemExit(main())
