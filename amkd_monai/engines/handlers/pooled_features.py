"""Handler that keeps one small vector per training image from the student and from each teacher, for the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn

from amkd_monai.atomic import atomic_path
from amkd_monai.data.decoded import UNLABELLED, DecodedImages
from amkd_monai.metrics.summary import FEATURES

MOST = 300
"""Samples kept of a training section, evenly spaced."""
BATCH = 16


class PooledFeatures:
    """Write ``features.npz`` when a training ends.

    Of at most 300 labelled training samples without augmentation: ``student`` (N, C) float32, the mean over the cells
    of its coarsest feature map as it is after the last step; ``teacher_<name>`` (N, C') float32, the mean over the
    cells of the cached map of each teacher whose features are distilled; ``value`` (N,) float32, the class, or the part
    of the pixels that is foreground.

    Args:
        output_dir: folder of the run.
        student: the network, which has ``encode``.
    """

    def __init__(self, output_dir: str | Path, student: nn.Module) -> None:
        self.path, self.student = Path(output_dir) / FEATURES, student

    def attach(self, engine: Engine) -> None:
        """Follow the trainer."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        dataset = engine.data_loader.dataset
        known = np.flatnonzero(dataset.has_label)
        indices = known[np.linspace(0, len(known) - 1, min(MOST, len(known))).round().astype(int)].tolist()
        arrays = {"student": student_vectors(self.student, dataset, indices), "value": _values(dataset, indices)}
        if engine.targets is not None:
            arrays |= {f"teacher_{name}": vectors for name, vectors in engine.targets.pooled(indices).items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


@torch.no_grad()
def student_vectors(student: nn.Module, dataset: DecodedImages, indices: list[int]) -> np.ndarray:
    """Mean over the cells of the coarsest feature map of each sample, (N, C) float32; the student's mode is kept."""
    device, was_training = next(student.parameters()).device, student.training
    student.eval()
    parts = []
    for start in range(0, len(indices), BATCH):
        image = torch.stack([dataset[i]["image"] for i in indices[start : start + BATCH]])
        levels = student.encode(image.to(device).float() / 255)
        parts.append(levels[-1].float().mean((2, 3)).cpu().numpy())  # (B, C, h, w) -> (B, C)
    student.train(was_training)
    return np.concatenate(parts)


def _values(dataset: DecodedImages, indices: list[int]) -> np.ndarray:
    """Class of each sample, or the part of its pixels that is foreground, (N,)."""
    labels = [np.asarray(dataset.labels[i]) for i in indices]
    found = [x if x.ndim == 0 else ((x > 0) & (x != UNLABELLED)).mean() for x in labels]
    return np.array(found, dtype=np.float32)
