"""Handlers that keep small copies of cases and teacher outputs for the report."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.networks import eval_mode
from monai.utils import CommonKeys
from monai.visualize import GradCAM
from torch import Tensor, nn

from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import UNLABELLED
from amkd_monai.distillation import Batch
from amkd_monai.distillation.losses import label_map
from amkd_monai.engines.handlers.checkpoints import Handler
from amkd_monai.engines.handlers.reports import identify
from amkd_monai.metrics.summary import TEACHERS, preview_file
from amkd_monai.report.previews import mask_preview, save_arrays, small

SAMPLES = 6
"""Training images kept with the teacher outputs."""


class CasePreviews(Handler):
    """Write ``previews/<case>.npz`` for each case of an evaluation.

    Masks: see :func:`amkd_monai.report.previews.mask_preview`. Classes: ``image`` (1, h, w, 3) and
    ``cam`` (1, h, w) uint8, the Grad-CAM of the predicted class or of all findings (Selvaraju et al., ICCV 2017), where
    the student is given. Attach to the evaluator that gets the case report.
    """

    def __init__(self, task: str, output_dir: str | Path, student: nn.Module | None = None) -> None:
        self.task, self.output_dir, self.student = get_task(task), Path(output_dir), student
        self.camera: GradCAM | None = None

    def _iteration_completed(self, engine: Engine) -> None:
        for item, source in zip(engine.state.output, engine.state.batch, strict=True):
            case, filename = identify({**source, **item})
            if self.task.is_classification:
                arrays = self._class_preview(item)
            else:
                reference, prediction = (np.asarray(item[k][0]) for k in (CommonKeys.LABEL, CommonKeys.PRED))
                arrays = mask_preview(filename, reference, prediction)
            save_arrays(preview_file(self.output_dir, case), arrays)

    def _class_preview(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        image = torch.as_tensor(item[CommonKeys.IMAGE]).float()
        shown = image if len(image) == 3 else image[:1].expand(3, -1, -1)
        arrays = {"image": small(_byte(shown.permute(1, 2, 0))[None])}
        if self.student is not None:
            if self.camera is None:  # a copy, since its hooks stay; made now, since the weights are loaded by now
                name = str(self.student.encoder.feature_info.module_name(-1))  # module of the coarsest map
                modules = dict(self.student.named_modules())
                layer = next(n for n in (f"encoder.{name}", f"encoder.{name.replace('.', '_')}") if n in modules)
                self.camera = GradCAM(copy.deepcopy(self.student).eval(), layer)
            predicted = 1 if self.task.has_findings else int(torch.as_tensor(item[CommonKeys.PRED]).argmax())
            with torch.enable_grad():
                heat = self.camera(image[None].to(next(self.student.parameters()).device), class_idx=predicted)
            arrays["cam"] = small((heat[0].detach().cpu().numpy() * 255).astype(np.uint8))
        return arrays


def _byte(values: Tensor) -> np.ndarray:
    return (values.float() * 255).round().clamp(0, 255).byte().cpu().numpy()


class TeacherPictures(Handler):
    """Write ``teachers.npz`` when a training with teachers ends.

    Six labelled training samples without augmentation, of a 3D student slices of one patch: ``image`` (N, H, W, 3),
    ``label`` (N, H, W) class indices, ``student`` (N, H, W), ``answer_<teacher>`` (N, h, w) where it has outputs,
    ``weight_<teacher>`` (N, h, w); all uint8, outputs and weights with 255 for 1. Outputs are probabilities of any
    foreground, or of the true class (one cell); weights are the gate's, over all teachers.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / TEACHERS

    @idist.one_rank_only()
    def _completed(self, engine: Engine) -> None:
        if engine.targets is None:
            return
        dataset, device = engine.data_loader.dataset, engine.state.device
        distiller = getattr(engine.network, "module", engine.network)
        shows = dataset.has_label & (dataset.has_foreground | (dataset.classes is not None))
        wanted = np.flatnonzero(shows if shows.any() else dataset.has_label)
        indices = np.unique(wanted[np.linspace(0, len(wanted) - 1, SAMPLES).round().astype(int)]).tolist()
        if (slices := getattr(distiller.student, "slices", 1)) > 1:
            indices = engine.data_loader.batch_sampler.patch(wanted[len(wanted) // 2]).tolist()
        items = [dataset[i] for i in indices]
        label = torch.stack([item["label"] for item in items]).long().to(device)
        image = torch.stack([item["image"] for item in items])
        targets = engine.targets.read(indices, device)
        known = torch.ones(len(indices), dtype=torch.bool, device=device)
        batch = Batch(image.to(device).float() / 255, label, known, targets, torch.tensor(indices, device=device))
        with eval_mode(distiller):
            logits, answers, weights = distiller.teacher_maps(batch)
        classes = label if label.ndim == 1 else None
        shown = label_map(label if classes is None else torch.ones_like(label))[:, 0]
        shown = shown.masked_fill(shown == UNLABELLED, 0).byte().cpu().numpy()
        seen = np.stack([dataset.shown(i) for i in indices]).transpose(0, 2, 3, 1)
        arrays = {"image": seen, "label": shown, "student": _shown(logits, classes)}
        arrays |= {f"weight_{t.name}": _byte(weights[:, k]) for k, t in enumerate(distiller.teachers)}
        arrays |= {f"answer_{name}": _shown(answer, classes) for name, answer in answers.items()}
        arrays["ids"] = np.array([item["id"] for item in items])
        save_arrays(self.path, {name: array[:: -(-slices // SAMPLES)] for name, array in arrays.items()})


def _shown(logits: Tensor, classes: Tensor | None) -> np.ndarray:
    """Probability of foreground (N, h, w), or of the true class."""
    p = logits.softmax(1)
    return _byte(1 - p[:, 0] if classes is None else p[torch.arange(len(p)), classes])
