"""Handler that keeps a few training images with what every teacher says about them and how far it is trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn

from amkd_monai.atomic import atomic_path
from amkd_monai.distillation import Batch
from amkd_monai.metrics.summary import TEACHERS

SAMPLES = 6


class TeacherPictures:
    """Write ``teachers.npz`` when a training with teachers ends.

    Six labelled training samples without augmentation: ``image`` (N, H, W, 3), ``label`` and ``student`` (N, H, W),
    ``answer_<teacher>`` (N, h, w) where it answers, ``weight_<teacher>`` (N, h, w); all uint8 with 255 for 1. Answers
    are probabilities of foreground, or of the true class (one cell); weights are the gate's, over all teachers.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / TEACHERS

    def attach(self, engine: Engine) -> None:
        """Follow the trainer."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    @torch.no_grad()
    def _write(self, engine: Engine) -> None:
        if engine.targets is None or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
            return
        dataset = engine.data_loader.dataset
        wanted = np.flatnonzero(dataset.has_label & (dataset.has_foreground | (dataset.classes is not None)))
        if not len(wanted):
            wanted = np.flatnonzero(dataset.has_label)
        indices = np.unique(wanted[np.linspace(0, len(wanted) - 1, SAMPLES).round().astype(int)]).tolist()
        device, distiller = engine.state.device, _without_wrapper(engine.network)
        items = [dataset[i] for i in indices]
        label = torch.stack([item["label"] for item in items]).long().to(device)
        image = torch.stack([item["image"] for item in items])
        targets = engine.targets.read(indices, device)
        known = torch.ones(len(indices), dtype=torch.bool, device=device)
        batch = Batch(image.to(device).float() / 255, label, known, targets, torch.tensor(indices, device=device))
        was_training = distiller.training
        distiller.eval()
        logits, answers, weights = distiller.teacher_maps(batch)
        distiller.train(was_training)
        classes = label if label.ndim == 1 else None
        shown = batch.label_map[:, 0] > 0 if classes is None else torch.ones_like(batch.label_map[:, 0])
        arrays = {"image": image.permute(0, 2, 3, 1).numpy(), "label": _byte(shown), "student": _shown(logits, classes)}
        for k, spec in enumerate(distiller.teachers):
            arrays[f"weight_{spec.name}"] = _byte(weights[:, k])
            if spec.name in answers:
                arrays[f"answer_{spec.name}"] = _shown(answers[spec.name], classes)
        arrays["ids"] = np.array([item["id"] for item in items])
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def _without_wrapper(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def _shown(logits: torch.Tensor, classes: torch.Tensor | None) -> np.ndarray:
    """Probability of foreground (N, h, w), or of the true class."""
    p = logits.softmax(1)
    return _byte(1 - p[:, 0] if classes is None else p[torch.arange(len(p)), classes])


def _byte(values: torch.Tensor) -> np.ndarray:
    return (values.float() * 255).round().clamp(0, 255).byte().cpu().numpy()
