"""What a distillation step with cached teachers costs, in plain supervised steps of the same student.

    python benchmarks/step_cost.py                          # kvasir_seg on phantoms, 128 px, batch 8, two teachers
    python benchmarks/step_cost.py --image_size 256 --batch_size 4
    python benchmarks/step_cost.py --multitask              # a step of all six tasks against single steps of each

CPU time of one thread: read the sample and its targets, augment, forward, losses, backward, optimiser. Blocks of the
two alternate and each pair gives a ratio; a block is as long as the loss gate's interval, so that the steps in which it
measures are counted."""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from amkd_monai.engines.trainer import DistillationTrainer

ROOT = Path(__file__).resolve().parent.parent
TEACHERS = [
    {"name": f"imagenet_lite{n}", "kind": "timm", "model": f"tf_efficientnet_lite{n}", "image_size": 224}
    for n in (1, 2)
]
FULL = {"output": 1.0, "feature": 0.2, "reconstruction": 0.1, "contrastive": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "output + feature, reliability, scaled": {},
    "the same, learned gate": {"gate": "learned"},
    "the same, agreement": {"loss_gate": "agreement"},
    "all losses, PCA code, learned, agreement": {
        "gate": "learned",
        "losses": FULL,
        "return_code": "pca",
        "loss_gate": "agreement",
    },
    "all losses, learned code, learned, agreement": {
        "gate": "learned",
        "losses": FULL,
        "return_code": "learned",
        "loss_gate": "agreement",
    },
}


TASKS = ("busi", "covid", "kvasir_seg", "msd_heart", "aptos2019", "isic2017")
SIZES = {"msd_heart": {"spacing": [2.5, 2.5, 2.74], "volume_size": [16, 96, 64]}}
NETWORKS = {"msd_heart": {"network_def#neck_channels": 64}}  # that of the shared student


def build(values: dict[str, Any], bundle: str = "kvasir_seg") -> DistillationTrainer:
    """Return the trainer of a bundle with overrides."""
    folder = ROOT / "bundles" / bundle / "configs"
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=str(folder / "train.json"),
        meta_file=str(folder / "metadata.json"),
        logging_file=False,
        bundle_root=str(folder.parent),
        **values,
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    trainer.network.train()
    return trainer


def batches(trainer: DistillationTrainer) -> Iterator[dict[str, Any]]:
    """Repeat the trainer's loader for ever."""
    return itertools.chain.from_iterable(trainer.data_loader for _ in itertools.count())


def block(trainer: DistillationTrainer, source: Iterator[dict[str, Any]], steps: int) -> float:
    """Return CPU milliseconds per step over a block of steps."""
    start = time.process_time()
    for _ in range(steps):
        batch = trainer.prepare_distillation_batch(next(source))
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.network(batch, progress=0.5).total.backward()
        trainer.optimizer.step()
    return (time.process_time() - start) / steps * 1e3


def multitask(common: dict[str, Any], pairs: int, steps: int) -> None:
    """Compare steps of the six tasks with as many steps of the students of single tasks, with equal networks."""
    sizes = {name: SIZES.get(name, {"image_size": common["image_size"]}) for name in TASKS}
    entries = {name: {**size, "recipe#batch_size": common["recipe#batch_size"]} for name, size in sizes.items()}
    method = {k: v for k, v in common.items() if k in ("admission", "output_dir", "ckpt_dir")} | {"teachers": TEACHERS}
    cache = common["cache_dir"]
    singles = [build({**method, **NETWORKS.get(n, {}), **entries[n], "cache_dir": f"{cache}/{n}"}, n) for n in TASKS]
    sources = [batches(trainer) for trainer in singles]
    shared = build({**method, "cache_dir": cache, "tasks": entries, "tasks_per_step": len(TASKS)}, "multitask")
    stream = batches(shared)

    def shared_block() -> float:
        start = time.process_time()
        for _ in range(steps):
            shared.state.iteration += 1
            shared._iteration(shared, next(stream))
        return (time.process_time() - start) / steps * 1e3

    def single_block() -> float:
        return sum(block(trainer, source, steps) for trainer, source in zip(singles, sources, strict=True))

    single_block(), shared_block()  # warm-up
    measured = [(single_block(), shared_block()) for _ in range(pairs)]
    ratios = [b / a for a, b in measured]
    a, b = (statistics.median(column) for column in zip(*measured, strict=True))
    print(f"six single steps {a:.0f} ms, one step of six tasks {b:.0f} ms CPU")
    print(f"ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="steps of a block; a multiple of the gate's interval")
    parser.add_argument("--multitask", action="store_true", help="a step of several tasks instead")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "image_size": arguments.image_size,
            "recipe#batch_size": arguments.batch_size,
            "output_dir": folder,
            "ckpt_dir": folder,
            "cache_dir": f"{folder}/cache",
            "admission": {"mode": "all"},
        }
        if arguments.multitask:
            multitask(common, arguments.pairs, arguments.steps)
            return
        plain = build({**common, "teachers": []})
        plain_source = batches(plain)
        lines = [("setting", "plain ms", "distilled ms", "ratio", "lowest", "highest")]
        for name, values in SETTINGS.items():
            if arguments.only not in name:
                continue
            trainer = build({**common, "teachers": TEACHERS, **values})
            source = batches(trainer)
            for one in (plain, trainer):  # warm-up
                block(one, plain_source if one is plain else source, arguments.steps)
            pairs = [
                (block(plain, plain_source, arguments.steps), block(trainer, source, arguments.steps))
                for _ in range(arguments.pairs)
            ]
            ratios = [b / a for a, b in pairs]
            numbers = [statistics.median(column) for column in zip(*pairs, strict=True)]
            row = [f"{v:.0f}" for v in numbers] + [f"{f(ratios):.3f}" for f in (statistics.median, min, max)]
            lines.append((name, *row))
            print(" | ".join(lines[-1]), flush=True)
    print()
    print("\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ("---",) * len(lines[0]), *lines[1:])))


if __name__ == "__main__":
    main()
