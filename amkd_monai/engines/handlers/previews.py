"""Handler that keeps a small copy of every evaluated case, so that a report can show it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from monai.visualize import GradCAM
from torch import nn

from amkd_monai.atomic import atomic_path
from amkd_monai.engines.handlers.case_report import identify
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.volumes import grey_levels, read_volume
from amkd_monai.metrics.summary import preview_file
from amkd_monai.tasks import get_task

SIDE = 256
"""Longest side of a preview in pixels."""
SLICES = 24
"""Slices kept of a volume."""


class CasePreviews:
    """Write ``previews/<case>.npz`` for each case of an evaluation.

    Masks: ``image`` (S, h, w, 3) uint8, ``reference`` and ``prediction`` (S, h, w) uint8, S = 1 for an image and evenly
    spaced slices along the last axis for a volume; of a volume also ``plane0`` to ``plane2`` (h, w, 3) with
    ``reference0``, ``prediction0`` and so on, through the centre of the reference. Classes: ``image`` (1, h, w, 3) and
    ``cam`` (1, h, w) uint8, the Grad-CAM of the predicted class (Selvaraju et al., ICCV 2017), from MONAI.

    Attach to the evaluator that gets the case report.

    Args:
        task: name of the task.
        output_dir: folder of the report.
        student: network of a classification task, for Grad-CAM; None leaves it out.
    """

    def __init__(self, task: str, output_dir: str | Path, student: nn.Module | None = None) -> None:
        self.task, self.output_dir, self.student = get_task(task), Path(output_dir), student
        self.camera: GradCAM | None = None

    def attach(self, engine: Engine) -> None:
        """Register the handler."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        for item, source in zip(engine.state.output, engine.state.batch, strict=True):
            case, filename = identify({**source, **item})
            arrays = self._class_preview(item) if self.task.is_classification else self._mask_preview(item, filename)
            path = preview_file(self.output_dir, case)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

    def _mask_preview(self, item: Mapping[str, Any], filename: str) -> dict[str, np.ndarray]:
        reference, prediction = (np.asarray(item[k][0]).astype(np.uint8) for k in (CommonKeys.LABEL, CommonKeys.PRED))
        if self.task.dimensions == 2:
            arrays = {
                "image": read_picture(filename)[None],
                "reference": reference[None],
                "prediction": prediction[None],
            }
            return {name: _small(array) for name, array in arrays.items()}
        return _volume_preview(filename, reference, prediction)

    def _class_preview(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        image = torch.as_tensor(item[CommonKeys.IMAGE]).float()
        arrays = {"image": _small((image.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)[None])}
        if self.student is not None:
            if self.camera is None:  # a copy, since its hooks stay; made now, since the weights are loaded by now
                self.camera = GradCAM(copy.deepcopy(self.student).eval(), _last_block(self.student))
            predicted = int(torch.as_tensor(item[CommonKeys.PRED]).argmax())
            with torch.enable_grad():
                heat = self.camera(image[None].to(next(self.student.parameters()).device), class_idx=predicted)
            arrays["cam"] = _small((heat[0].detach().cpu().numpy() * 255).astype(np.uint8))
        return arrays


def _last_block(student: nn.Module) -> str:
    """Name of the encoder's module that gives the coarsest map."""
    name = str(student.encoder.feature_info.module_name(-1))
    modules = dict(student.named_modules())
    return next(n for n in (f"encoder.{name}", f"encoder.{name.replace('.', '_')}") if n in modules)


def _volume_preview(filename: str, reference: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
    grey = grey_levels(read_volume(filename)[0])
    inside = np.argwhere(reference if reference.any() else np.ones_like(reference))
    centre, first, last = inside.mean(0).round().astype(int), inside[:, 2].min(), inside[:, 2].max()
    chosen = np.unique(np.linspace(max(first - 2, 0), min(last + 2, grey.shape[2] - 1), SLICES).round().astype(int))
    pick = [np.moveaxis(a[..., chosen], 2, 0) for a in (grey, reference, prediction)]
    arrays = {"image": _rgb(_small(pick[0])), "reference": _small(pick[1]), "prediction": _small(pick[2])}
    for axis in range(3):
        planes = [_small(np.take(a, centre[axis], axis)[None])[0] for a in (grey, reference, prediction)]
        arrays |= {f"plane{axis}": _rgb(planes[0]), f"reference{axis}": planes[1], f"prediction{axis}": planes[2]}
    return arrays


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def _small(array: np.ndarray) -> np.ndarray:
    """Take every n-th pixel (S, H, W[, 3]) so that no side is longer than ``SIDE``."""
    step = -(-max(array.shape[1:3]) // SIDE)
    return array[:, ::step, ::step]
