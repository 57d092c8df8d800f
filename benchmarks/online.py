"""What a step costs with a teacher in the loop instead of its stored answers.

python benchmarks/online.py [--rounds 5] [--full]

CPU time of one thread, paired and alternated, of the default student of kvasir_seg on phantoms, 256 px, batch 4. With
--full also MedSAM's network with random weights, 1.5 minutes for a step.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from paired import Row, paired, print_table
from step_cost import TEACHERS, batches, block, build

from amkd_monai.cache.build import Batches, images_of
from amkd_monai.data.sampling import warp
from amkd_monai.engines.trainer import DistillationTrainer, TeacherTargets
from amkd_monai.teachers.base import Teacher, build_teacher

SIDE, BATCH, STEPS = 256, 4, 4
MEDSAM = {"name": "medsam", "kind": "medsam", "weights": "random"}
LEAST_GAIN = 1.1
"""Steps with cached teachers that one step takes with the smallest of teachers in the loop, at least."""


class InTheLoop(TeacherTargets):
    """Targets whose teacher is asked about the augmented images of each step, at their size; a stored probe answers."""

    def __init__(self, stored: TeacherTargets, teacher: Teacher, dataset: Any) -> None:
        super().__init__(stored.teachers, stored.prior_entropy, stored.record, stored.groups, stored.classes)
        self.teacher, self.dataset, self.at_once = teacher, dataset, Batches()

    def read(self, indices: Any, device: Any, theta: Any = None, views: Any = None) -> dict[str, Any]:
        """What is stored, with the feature map of the teacher where it is one of those stored."""
        found = super().read(indices, device, theta, views)
        images = warp(images_of(self.dataset, indices, device), theta)
        with torch.no_grad():
            grid = torch.cat([said.grid for _, said in self.at_once.run(self.teacher, images)])
        if self.teacher.name in found:
            found[self.teacher.name]["grid"] = grid
        return found


def settings(folder: str) -> dict[str, Any]:
    """Settings of a run with one teacher whose files all lie in a folder."""
    return {
        "image_size": SIDE,
        "recipe#batch_size": BATCH,
        "output_dir": folder,
        "ckpt_dir": folder,
        "cache_dir": f"{folder}/cache",
        "admission": {"mode": "all"},
        "teachers": TEACHERS[:1],
    }


def compare(trainer: DistillationTrainer, description: dict[str, Any], steps: int, rounds: int) -> Row:
    """CPU milliseconds per step with a teacher in the loop and with what is stored."""
    stored, source = trainer.targets, batches(trainer)
    assert stored is not None
    loop = InTheLoop(stored, build_teacher(description), trainer.data_loader.dataset)

    def run(targets: TeacherTargets) -> int:
        trainer.targets = targets
        block(trainer, source, steps)
        return steps

    ours, other = paired(lambda: run(stored), lambda: run(loop), rounds)
    trainer.targets = stored
    what = f"step with stored features, against {description['name']} in the loop"
    return Row(what, "ms/step", ours, other, 1 / LEAST_GAIN)


def measure(rounds: int, full: bool = False) -> list[Row]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(settings(folder))
        rows = [compare(trainer, TEACHERS[0], STEPS, rounds)]
        return [*rows, compare(trainer, MEDSAM, 1, 1)] if full else rows


def main() -> int:
    """Measure and print the table; exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="MedSAM's network too")
    torch.set_num_threads(1)
    return print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    raise SystemExit(main())
