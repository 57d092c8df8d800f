"""What the 3D student costs beside the 2.5D one, and what each reaches in equal processor time.

    python benchmarks/volume_student.py                             # cost on phantoms, sizes of bundles/msd_heart
    python benchmarks/volume_student.py --minutes 20 --dataset_dir data/Task02_Heart --set fold=1

CPU time of one thread, per slice: a step of supervised training (read, augment, forward, backward, optimiser) and
inference on a volume by the bundle's own inferer. With ``--minutes`` each student is then trained for so much processor
time, its schedule fitted to it, and scored on the test section."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from step_cost import ROOT, batches, step

from amkd_monai.cli import settings_of
from amkd_monai.terminal import align

STUDENTS = {"2.5D": (), "3D": ("volumes3d",)}
STEPS = 6


def workflow(values: dict[str, Any], *names: str) -> ConfigWorkflow:
    """Return the initialised workflow of some configs of the heart bundle."""
    folder = ROOT / "bundles" / "msd_heart" / "configs"
    made = ConfigWorkflow([str(folder / f"{name}.json") for name in names], logging_file=False, **values)
    made.initialize()
    return made


def cost(values: dict[str, Any], overlay: tuple[str, ...]) -> dict[str, float]:
    """CPU ms per slice of a training step and of inference, millions of parameters, and seconds of an epoch."""
    parser = workflow(values, "train", *overlay).parser
    trainer = parser.get_parsed_content("train#trainer")
    trainer.network.train()
    source = batches(trainer)
    step(trainer, source)
    start = time.process_time()
    for _ in range(STEPS):
        step(trainer, source)
    seconds = (time.process_time() - start) / STEPS
    sampler, network = trainer.data_loader.batch_sampler, parser.get_parsed_content("network").eval()
    volume = next(iter(parser.get_parsed_content("validate#dataloader")))["image"]
    start = time.process_time()
    with torch.inference_mode():
        parser.get_parsed_content("validate#inferer")(volume, network)
    slices = sampler.batch_size * getattr(sampler, "slices", 1)
    return {
        "train": seconds / slices * 1e3,
        "infer": (time.process_time() - start) / volume.shape[2] * 1e3,
        "parameters": sum(p.numel() for p in network.parameters()) / 1e6,
        "epoch": seconds * len(trainer.data_loader),
    }


def reached(values: dict[str, Any], overlay: tuple[str, ...], epochs: int) -> float:
    """Train, and return the mean Dice of the test section."""
    workflow({**values, "max_epochs": epochs}, "train", *overlay).run()
    workflow(values, "train", *overlay, "evaluate", *(f"{name}_evaluate" for name in overlay)).run()
    metrics = json.loads((Path(values["output_dir"]) / "metrics.json").read_text())
    return float(metrics["summary"]["metrics"]["dice"]["mean"])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="CPU time to train each student; 0: cost only")
    parser.add_argument("--dataset_dir", help="default: as in a training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of both runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("student", "M parameters", "train ms/slice", "infer ms/slice", "epochs", "test Dice")]
    for name, overlay in STUDENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            values = {"output_dir": f"{folder}/eval", "ckpt_dir": f"{folder}/models", "cache_dir": f"{folder}/cache"}
            values |= {"teachers": [], "dataset_dir": given.dataset_dir, **settings_of(given.set)}
            found = cost(values, overlay)
            epochs = max(1, round(given.minutes * 60 / found["epoch"])) if given.minutes else 0
            dice = f"{reached(values, overlay, epochs):.3f}" if epochs else "-"
        cells = (f"{found[key]:.1f}" for key in ("parameters", "train", "infer"))
        rows.append((name, *cells, str(epochs or "-"), dice))
    print(align(rows))


if __name__ == "__main__":
    main()
