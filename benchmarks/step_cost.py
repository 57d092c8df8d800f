"""What a distillation step with cached teachers costs, in plain supervised steps of the same student.

    python benchmarks/step_cost.py                          # kvasir_seg on phantoms, 128 px, batch 8, two teachers
    python benchmarks/step_cost.py --image_size 256 --batch_size 4

CPU time of one thread: read the sample and its targets, augment, forward, losses, backward, optimiser. Steps of the two
take turns, and each round of them gives a ratio; a round is as long as the loss gate's interval, so that the steps in
which it measures are counted. A second row per setting gives what gates and losses add, without networks between
student and teachers: the distiller on given student maps, less task loss, projections, heads and codes on the same
maps, in turns as well."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from monai.bundle import ConfigWorkflow
from paired import Row, interleaved, print_table
from torch import Tensor

from amkd_monai.distillation.distiller import SHARED_STRIDE
from amkd_monai.distillation.losses import task_loss
from amkd_monai.engines.trainer import DistillationTrainer

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "output + feature, learned, agreement"
LIMIT = 1.20
"""Of every setting, in plain steps."""
AIM = 1.10
"""Of the default setting, in plain steps; missing it is said."""
GATES_AND_LOSSES = 5.0
"""Milliseconds that gates and losses of the default setting may add to a step of batch size 8."""
TEACHERS = [
    {"name": f"imagenet_lite{n}", "kind": "timm", "model": f"tf_efficientnet_lite{n}", "image_size": 224}
    for n in (1, 2)
]
FULL = {"output": 1.0, "feature": 0.2, "reconstruction": 0.1, "contrastive": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "output + feature, reliability, scaled": {"gate": "reliability", "loss_gate": "scaled"},
    "all losses, learned code, learned, agreement": {"losses": FULL, "return_code": "learned"},
}


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


def step(trainer: DistillationTrainer, source: Iterator[dict[str, Any]]) -> None:
    """One step of training, from reading to the optimiser."""
    batch = trainer.prepare_distillation_batch(next(source))
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.network(batch, progress=0.5).total.backward()
    trainer.optimizer.step()


def block(trainer: DistillationTrainer, source: Iterator[dict[str, Any]], steps: int) -> float:
    """Return CPU milliseconds per step over a block of steps."""
    start = time.process_time()
    for _ in range(steps):
        step(trainer, source)
    return (time.process_time() - start) / steps * 1e3


def gates_and_losses(trainer: DistillationTrainer, data: dict[str, Any], rounds: int, repeats: int) -> list[float]:
    """CPU milliseconds per step of all but student, task loss, projections (heads too) and codes, both ways."""
    distiller, batch = trainer.network, trainer.prepare_distillation_batch(data)
    student, size = distiller.student, list(batch.image.shape[-2:])
    with torch.no_grad():
        levels = student.encode(batch.image)
        logits = student.decode(levels, size)
    levels, logits = [level.requires_grad_() for level in levels], logits.requires_grad_()
    features = dict(zip(student.strides, levels, strict=True))

    def whole() -> Tensor:
        return distiller(batch, progress=0.5).total

    def networks() -> Tensor:
        parts = [task_loss(logits, batch.label, distiller.batch_dice).mean()]
        for name, align in distiller.align.items():
            target = batch.teachers[name]["grid"].contiguous(memory_format=torch.channels_last)
            aligned = align(features, (target.shape[-2], target.shape[-1]))
            parts.append(aligned.mean())
            if name in distiller.codes:
                code = distiller.codes[name]
                code.encode(target)
                parts.append(code.decode_frozen(aligned).mean())
                parts.append(code.decoder(code.encoder(target[..., ::2, ::2])).mean())
        if distiller.contrast is not None:
            pooled = features[SHARED_STRIDE].mean((2, 3))
            parts += [head(pooled).mean() for head in distiller.contrast.heads.values()]
        return torch.stack(parts).sum()

    def both_ways(loss: Callable[[], Tensor]) -> None:
        distiller.zero_grad(set_to_none=True)
        loss().backward()

    added = []
    with patch.object(student, "encode", lambda image: levels), patch.object(student, "decode", lambda *_: logits):
        for _ in range(rounds + 1):  # the first is the warm-up
            ours, other = interleaved(lambda: both_ways(whole), lambda: both_ways(networks), repeats)
            added.append(ours - other)
    return added[1:]


def measure(image_size: int, batch_size: int, pairs: int, steps: int, only: str = "") -> list[Row]:
    """CPU milliseconds of distilled and plain steps, by setting, in ``pairs`` rounds of ``steps`` each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "image_size": image_size,
            "recipe#batch_size": batch_size,
            "output_dir": folder,
            "ckpt_dir": folder,
            "cache_dir": f"{folder}/cache",
            "admission": {"mode": "all"},
        }
        plain = build({**common, "teachers": []})
        plain_source = batches(plain)
        for name, values in SETTINGS.items():
            if only not in name:
                continue
            trainer = build({**common, "teachers": TEACHERS, **values})
            source = batches(trainer)
            for one in (plain, trainer):  # warm-up
                block(one, plain_source if one is plain else source, steps)
            turns = [partial(step, trainer, source), partial(step, plain, plain_source)]
            ours, other = zip(*(interleaved(*turns, steps) for _ in range(pairs)), strict=True)
            what, aim = f"step with cached teachers: {name}, against a plain step", AIM if name == DEFAULT else None
            rows.append(Row(what, "ms/step", ours, other, LIMIT, aim))
            added = gates_and_losses(trainer, next(source), pairs, steps)
            limit = GATES_AND_LOSSES if name == DEFAULT and batch_size == 8 else None
            rows.append(Row(f"gates and losses alone: {name}", "ms/step", added, limit=limit))
    return rows


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="steps of a round; a multiple of the gate's interval")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    torch.set_num_threads(1)
    return print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    raise SystemExit(main())
