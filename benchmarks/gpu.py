"""What one GPU gives: full-size teachers, cached steps, training rate, synchronisations, torch.compile.

benchmarks/gpu.sh          # the same with a limit of 6 minutes
python benchmarks/gpu.py --tiny

Times are wall time between synchronisations, after a warm-up, the median of several; ratios are of steps in turns. What
no longer fits into the time is named as left out, never guessed. Weights are random, which costs the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from step_cost import TEACHERS as CACHED
from step_cost import batches, build, step
from teachers import TEACHERS
from torch import Tensor

from amkd_monai.engines.trainer import DistillationTrainer
from amkd_monai.teachers.base import TeacherFeatures, build_teacher

MINUTES = 5.5
"""For all parts together; building what follows must still fit into the 6 of gpu.sh."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: of the real one, or of one that only shows that all parts run."""

    teachers: dict[str, tuple[dict[str, Any], int]]
    images: int = 8
    repeats: int = 5
    side: int = 256
    batch: int = 32
    steps: int = 20
    cached: int = 2
    backend: str = "inductor"


_VIT = {"image_size": 64, "sizes": {"embed_dim": 48, "depth": 2, "num_heads": 4}}
TINY = Scale(
    {"retfound": ({"kind": "retfound", **_VIT}, 64), "usfm": ({"kind": "usfm", "taps": (0, 0, 1, 1), **_VIT}, 64)},
    *(2, 1, 64, 4, 1, 1, "eager"),
)


class Bench:
    """A device, a scale, and the time that is left."""

    def __init__(self, device: torch.device, scale: Scale) -> None:
        self.device, self.scale, self.end = device, scale, time.monotonic() + 60 * MINUTES

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median wall time of a call, after one that is not counted."""
        run()
        taken = []
        for _ in range(self.scale.repeats):
            self.synchronise()
            start = time.perf_counter()
            run()
            self.synchronise()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def peak_mb(self, run: Callable[[], object]) -> str:
        """Peak of the GPU's memory during a call, in MB."""
        if self.device.type != "cuda":
            return "-"
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return f"{torch.cuda.max_memory_allocated(self.device) / 1e6:.0f}"

    def teacher(self, name: str) -> str:
        """One row: preparation and network per image in float32 and bfloat16, memory, fidelity."""
        description, side = self.scale.teachers[name]
        teacher = build_teacher({"name": name, **description, "weights": "random"}).to(self.device)
        noise = torch.rand(self.scale.images, 3, side, side, generator=torch.Generator().manual_seed(0))
        image = noise.to(self.device)
        with torch.inference_mode():
            prepared = self.seconds(lambda: teacher.prepare(image[:1]))
            pixels = teacher.prepare(image)
            teacher.prepare = lambda _: pixels
            cells, said = [], []
            for teacher.precision in ("float32", "bfloat16"):
                said.append(teacher(image))
                cells.append(f"{1e3 * self.seconds(lambda: teacher(image)) / len(image):.2f}")
                cells.append(self.peak_mb(lambda: teacher(image)))
        return row(name, len(image), f"{1e3 * prepared:.2f}", *cells, fidelity(*said))

    def student(self) -> Iterator[str]:
        """Rows about training with cached teachers, by lines of the second table."""
        scale = self.scale
        with tempfile.TemporaryDirectory() as folder:
            common = {
                "image_size": scale.side,
                "recipe#batch_size": scale.batch,
                **dict.fromkeys(("output_dir", "ckpt_dir"), folder),
                "cache_dir": f"{folder}/cache",
                "admission": {"mode": "all"},
                "device": str(self.device),
            }
            trainers = {
                "plain": build({**common, "teachers": []}),
                "cached": build({**common, "teachers": CACHED[: scale.cached]}),
            }
            sources = {name: batches(trainer) for name, trainer in trainers.items()}
            ready = {n: t.prepare_distillation_batch(next(sources[n])) for n, t in trainers.items()}

            def compute(name: str) -> float:
                trainer = trainers[name]

                def one() -> None:
                    trainer.optimizer.zero_grad(set_to_none=True)
                    with torch.autocast(self.device.type, torch.bfloat16):
                        loss = trainer.network(ready[name], progress=0.5).total
                    loss.backward()
                    trainer.optimizer.step()

                return self.seconds(lambda: [one() for _ in range(scale.steps)]) / scale.steps

            def rated(name: str) -> float:
                with torch.autocast(self.device.type, torch.bfloat16):
                    return self.seconds(lambda: [step(trainers[name], sources[name]) for _ in range(scale.steps)])

            plain, cached = compute("plain"), compute("cached")
            yield row("plain step, data on the device", f"{1e3 * plain:.1f} ms")
            yield row("cached step, data on the device", f"{1e3 * cached:.1f} ms, {cached / plain:.3f} plain steps")
            for name in trainers:
                rate = scale.steps * len(ready[name].image) / rated(name)
                yield row(f"training with reading, augmentation and optimiser, {name}", f"{rate:.0f} images/s")
            for name in trainers:
                yield row(f"synchronisations per step, {name}", self.waits(trainers[name], sources[name]))
            for name in trainers if self.device.type == "cuda" else ["cached"]:
                student = trainers[name].network.student
                student.encode = torch.compile(student.encode, backend=scale.backend)
                student.decode = torch.compile(student.decode, backend=scale.backend)
                yield row(f"{name} step, student compiled ({scale.backend})", f"{1e3 * compute(name):.1f} ms")

    def waits(self, trainer: DistillationTrainer, source: Iterator[dict[str, Any]]) -> str:
        """How often the host waits for the GPU in a step, reading included, as CUDA reports it."""
        if self.device.type != "cuda":
            return "-"
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(self.scale.steps):
                    step(trainer, source)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return f"{sum('synchroniz' in str(warning.message) for warning in caught) / self.scale.steps:.1f}"


def fidelity(exact: TeacherFeatures, rough: TeacherFeatures) -> str:
    """Lowest cosine of an image's grid, and of its own answer where there is one."""

    def lowest(one: Tensor | None, other: Tensor | None) -> list[str]:
        if one is None or other is None:
            return []
        cosine = torch.nn.functional.cosine_similarity(one.double().flatten(1), other.double().flatten(1))
        return [f"{float(cosine.min()):.6f}"]

    return " / ".join([*lowest(exact.grid, rough.grid), *lowest(exact.logits, rough.logits)])


def row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Print device and tables; exit code 1 where no GPU is found or a part was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("There is no GPU here: run it on a machine with one, or with --tiny to see that it runs.")
        return 1
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench, left_out = Bench(device, TINY if tiny else Scale(TEACHERS)), []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}{', toy sizes: no figure below means anything' if tiny else ''}\n")
    header = ("teacher", "images at once", "preparing, ms/image", "network float32", "MB", "bfloat16", "MB", "cosines")
    print(f"{row(*header)}\n{row(*['---'] * len(header))}", flush=True)
    student = row("training, bfloat16 autocast", "figure") + "\n" + row("---", "---")
    # the student's part is short and needs little memory: it comes first, so that it is never left out
    lines = list(bench.student())
    for teacher in bench.scale.teachers:
        if time.monotonic() > bench.end:
            left_out.append(teacher)
            continue
        print(bench.teacher(teacher), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{student}\n" + "\n".join(lines), flush=True)
    if left_out:
        print(f"\nLeft out, as {MINUTES} minutes were over: {', '.join(left_out)}.")
    return int(bool(left_out))


if __name__ == "__main__":
    raise SystemExit(main())
