"""Handlers of evaluations: score every case, write the report, calibrate a class student."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.metrics import EpochMetric
from monai.data.utils import affine_to_spacing
from monai.engines import IterationEvents
from monai.handlers import MLFlowHandler
from monai.utils import CommonKeys, ImageMetaKey
from torch import Tensor, nn

from amkd_monai.cache.probes import CALIBRATED_ON, LEAST_GROUPS, fit_calibration
from amkd_monai.data.datasets import get_task
from amkd_monai.distillation.losses import as_map, class_areas
from amkd_monai.engines.handlers.checkpoints import Handler
from amkd_monai.metrics.classification import class_metrics, class_row
from amkd_monai.metrics.evaluation import figures_of, mask_rows, write_figures
from amkd_monai.metrics.segmentation import STATUSES
from amkd_monai.metrics.summary import Row, write_case_csv
from amkd_monai.networks import Student

logger = logging.getLogger("amkd_monai")

AFFINE_TOLERANCE = 1e-3
"""Largest difference (mm) between the affines of a prediction and its label on one grid."""


class CaseReport(Handler):
    """Score each case; when the run ends, write and log the report.

    Attach it to an evaluator whose output is, after decollating and postprocessing, a list of dicts with ``pred`` and
    ``label``. Masks: label maps of shape (1, H, W) or (1, H, W, D) of the size the image has on disk (``Invertd``
    undoes resizing, ``AsDiscreted(argmax=True)`` makes the map). Classes: probabilities (C,) and a class; of
    findings (2, F) and the number whose bits they are.

    ``per_case.csv`` gets the rows of :py:func:`~amkd_monai.metrics.segmentation.case_metrics` or
    :py:func:`~amkd_monai.metrics.classification.class_row`, with the ``id`` first (of the batch item, or else the name
    of its image file); ``metrics.json`` the task, the ``facts`` and the summary. ``engine.state.metrics`` gets
    ``dice_mean``, ``dice_ci_low`` and so on, ``cases_missed`` etc. with the number of rows of each status and
    ``false_positive_rate`` where a reference is empty; of classes ``<metric>``, ``<metric>_ci_low`` and
    ``<metric>_ci_high``. Under torch.distributed the cases of all ranks are gathered, repeated ones counted once, and
    rank 0 writes.

    Args:
        task: name of the task, which gives classes, dimensions, NSD tolerance and unit.
        output_dir: folder of the report.
        facts: further content of ``metrics.json``, see :py:func:`amkd_monai.engines.runs.evaluated`.

    Raises:
        ValueError: a case has no id, or its prediction is of the wrong shape or on another grid than its label; two
            files have the same id; some cases could not be used and the folder holds the figures of all.
    """

    def __init__(self, task: str, output_dir: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        self.task, self.output_dir, self.facts = get_task(task), Path(output_dir), dict(facts or {})
        self._cases: dict[tuple[str, str], list[Row]] = {}

    def _started(self, engine: Engine) -> None:
        self._cases.clear()

    def _iteration_completed(self, engine: Engine) -> None:
        output, batch = engine.state.output, engine.state.batch
        if not isinstance(output, list):
            raise TypeError("CaseReport needs a list of dicts: run the evaluator with decollate=True.")
        sources = batch if isinstance(batch, list) and len(batch) == len(output) else [{}] * len(output)
        for item, source in zip(output, sources, strict=True):
            key = case, _ = identify({**source, **item})
            if key in self._cases:
                logger.info("The case %s appeared again and is counted once.", case)
                continue
            try:
                self._cases[key] = self._rows(item, case)
            except ValueError as error:
                raise ValueError(f"Case {case}: {error}") from error

    def _rows(self, item: Mapping[str, Any], case: str) -> list[Row]:
        task, pred, label = self.task, item[CommonKeys.PRED], item[CommonKeys.LABEL]
        if task.is_classification:
            return [class_row(task, case, int(torch.as_tensor(label)), _probabilities(pred))]
        for name, array in (("pred", pred), ("label", label)):
            if array.ndim != task.dimensions + 1 or array.shape[0] != 1:
                wanted = f"one label map of shape (1, ...) with {task.dimensions} axes"
                raise ValueError(f"'{name}' must be {wanted}, got shape {tuple(array.shape)}.")
        spacing = _voxel_size(pred, label) if task.dimensions == 3 else [1.0, 1.0]
        prediction, reference = (torch.as_tensor(m[0]).detach().cpu().numpy() for m in (pred, label))
        return mask_rows(task, case, prediction, reference, spacing)

    def _gathered(self) -> list[Row]:
        cases = {key: rows for of_rank in reversed(idist.all_gather(self._cases)) for key, rows in of_rank.items()}
        return [row for key in sorted(cases) for row in cases[key]]

    def _completed(self, engine: Engine) -> None:
        rows, flat = self._gathered(), engine.state.metrics
        figures = figures_of(self.task, rows, self.facts.get("seen", {}))
        summary = figures["summary"]
        for metric, values in summary["metrics"].items():
            flat |= {metric if name == "value" else f"{metric}_{name}": value for name, value in values.items()}
        if "status" in summary:
            flat |= {f"cases_{status}": summary["status"].get(status, 0) for status in STATUSES}
        if summary.get("empty_references"):
            flat["false_positive_rate"] = summary["false_positive_rate"]
        if idist.get_rank() == 0:
            logger.info("%s", write_figures(self.output_dir, rows, figures, self.facts))


def identify(item: Mapping[str, Any]) -> tuple[str, str]:
    """Id and image file of a case; the id may be the name of the file, the file may be unknown."""
    filename = getattr(item.get(CommonKeys.IMAGE), "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ)
    if "id" in item:
        return str(item["id"]), str(filename)
    if filename is None:
        raise ValueError("A case has neither an 'id' nor a file name in the meta data of its image.")
    return PurePath(str(filename).removesuffix(".gz")).stem, str(filename)  # volume.nii.gz -> volume


def _voxel_size(pred: Tensor, label: Tensor) -> list[float]:
    """Voxel size (mm) along the axes of a label (1, H, W, D), whose grid the prediction must share."""
    affine = getattr(label, "affine", None)
    if affine is None:
        raise ValueError("the label has no affine: load it with LoadImaged.")
    other = getattr(pred, "affine", affine)
    if not torch.allclose(other.to(affine), affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise ValueError("prediction and label lie on different grids: invert the transforms of the prediction.")
    return [float(size) for size in affine_to_spacing(affine, r=3)]


def _probabilities(pred: Any) -> np.ndarray:
    """Probabilities (C,) of classes, or (F,) of findings of those of absence and presence (2, F)."""
    found = np.asarray(torch.as_tensor(pred).detach().cpu(), dtype=float)
    return found[1] if found.ndim == 2 else found


class ClassPredictions(CaseReport):
    """Write the class probabilities (``pred``) of every image to ``predictions.csv`` when the engine ends."""

    def _rows(self, item: Mapping[str, Any], case: str) -> list[Row]:
        row = class_row(self.task, case, None, _probabilities(item[CommonKeys.PRED]))
        return [{"id": case, "class": self.task.text_of(row["prediction"]), **row}]

    def _completed(self, engine: Engine) -> None:
        rows = self._gathered()
        if idist.get_rank() == 0:
            write_case_csv(self.output_dir / "predictions.csv", rows)


class ClassScore(EpochMetric):
    """The primary metric of a classification task over all cases of an epoch."""

    def __init__(self, task: str) -> None:
        described = get_task(task)
        metric = class_metrics(described)[described.primary_metric]

        def compute(pred: Tensor, label: Tensor) -> float:
            return metric(label.numpy().astype(int), pred.numpy().astype(float))

        super().__init__(compute, output_transform=_numbered, check_compute_fn=False)


def _numbered(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C) and classes (B,), or of findings (B, F) and the numbers whose bits they are."""
    pred, label = _stack(output)
    return (pred, label) if pred.ndim == 2 else (pred[:, 1], label @ (1 << torch.arange(label.shape[1])))


CALIBRATED_SIDE = 32
"""Pixels of each side of a mask that its calibration is fitted on."""


def _stack(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C) and classes (B,), or of findings (B, 2, F) and labels (B, F), of decollated items."""
    pred = torch.stack([torch.as_tensor(item[CommonKeys.PRED]).float().cpu() for item in output])
    label = torch.stack([torch.as_tensor(item[CommonKeys.LABEL]).long().cpu().squeeze() for item in output])
    if pred.ndim == 3 and label.ndim == 1:  # numbers whose bits are the findings
        label = label[:, None] >> torch.arange(pred.shape[2]) & 1
    return pred.as_subclass(Tensor), label.as_subclass(Tensor)


class FitTemperature(Handler):
    """Calibrate a student on validation: one temperature that minimises the cross entropy (Guo et al., 2017).

    Attach to the validation evaluator, before the handler that saves the student: the temperature is a buffer of the
    student and is saved with it. Validation itself runs at temperature 1, so a value never depends on an earlier epoch.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    def _epoch_started(self, engine: Engine) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.student.temperature.fill_(1.0)

    def _iteration_completed(self, engine: Engine) -> None:
        self.outputs.append(_stack(engine.state.output))

    def _epoch_completed(self, engine: Engine) -> None:
        p, label = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        logits = p.clamp_min(1e-12).log()  # logits up to a constant per case
        with torch.enable_grad():
            targets = F.one_hot(label, p.shape[1]).movedim(-1, 1).float()
            fitted = fit_calibration(as_map(logits), as_map(targets)).temperature
        self.student.temperature.fill_(fitted)
        engine.state.metrics["temperature"] = fitted


class CalibrateMasks(Handler):
    """Calibrate a student of masks on validation, by a temperature and an offset for each foreground class.

    A student of few labels draws too little; an offset of its logits makes its masks right in the mean. Attach to the
    validation evaluator, before the handler that saves the student: both are folded into the weights of its last layer,
    which is linear up to its answers, while the student is saved, and taken out behind it. Scores of validation are of
    the uncalibrated student. ``groups`` are those of the validation split; fewer than
    :data:`~amkd_monai.cache.probes.LEAST_GROUPS` calibrate nothing, nor does a student of another kind.
    """

    def __init__(self, student: nn.Module, groups: Sequence[str]) -> None:
        self.student = student
        self.is_on = isinstance(student, Student) and len(set(groups)) >= LEAST_GROUPS

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        super().attach(engine)
        if self.is_on:
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._keep)

    def _epoch_started(self, engine: Engine) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def _keep(self, engine: Engine) -> None:
        logits, label = (engine.state.output[key].as_subclass(Tensor) for key in (CommonKeys.PRED, CommonKeys.LABEL))
        step = max(1, logits.shape[-1] // CALIBRATED_SIDE)
        some = (..., slice(step // 2, None, step), slice(step // 2, None, step))
        self.outputs.append((logits[some].float().cpu(), label[some].long().cpu()))

    def _epoch_completed(self, engine: Engine) -> None:
        if self.is_on:
            logits, label = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
            some = torch.linspace(0, len(label) - 1, min(len(label), CALIBRATED_ON)).long()
            logits, label = logits[some], label[some]
            targets = class_areas(label, logits.shape[1], (logits.shape[-2], logits.shape[-1]))
            with torch.enable_grad():
                fitted = fit_calibration(logits, targets, offsets=True)
            head = self.student.head
            self.kept = {name: value.clone() for name, value in head.state_dict().items()}
            head.load_state_dict(fitted.folded(self.kept))
            offsets = {f"offset_{c}": value for c, value in enumerate(fitted.offsets) if c}
            engine.state.metrics |= {"temperature": fitted.temperature, **offsets}

    def _completed(self, engine: Engine) -> None:
        if self.is_on:
            self.student.head.load_state_dict(self.kept)


class EmptyReferences(Handler):
    """Report how often foreground is predicted where the reference is empty.

    MONAI's mean Dice leaves cases with an empty reference out, which would hide their errors. ``engine.state.metrics``
    gets ``val_false_positive_rate``, the share of these cases with a predicted foreground, and
    ``val_empty_references``, their number; nothing if there is no such case. Attach before handlers that log metrics,
    to an evaluator whose output is a list of dicts with one-hot ``pred`` and ``label``, (C, ...), background first.
    """

    def _epoch_started(self, engine: Engine) -> None:
        self._seen: list[list[bool]] = []

    def _iteration_completed(self, engine: Engine) -> None:
        parts = (CommonKeys.LABEL, CommonKeys.PRED)
        self._seen += [[bool((case[part][1:] > 0).any()) for part in parts] for case in engine.state.output]

    def _epoch_completed(self, engine: Engine) -> None:
        wrong = [predicted for present, predicted in self._seen if not present]
        if wrong and len(wrong) == len(self._seen):
            raise ValueError(
                f"All {len(wrong)} validation cases have an empty reference, so Dice cannot choose the best student: "
                "change the split, or check that the masks are read correctly (`python -m amkd_monai data check`)."
            )
        if wrong:
            metrics = {"val_false_positive_rate": sum(wrong) / len(wrong), "val_empty_references": len(wrong)}
            engine.state.metrics |= metrics


class WriteReport(Handler):
    """Write ``report.html`` next to the results of an evaluation. Attach it after the case report."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    def _completed(self, engine: Engine) -> None:
        idist.barrier()
        if idist.get_rank() == 0:
            from amkd_monai.report.page import write_report

            logger.info("report: %s", write_report([self.output_dir], self.output_dir / "report.html"))


class TrackEvaluation(MLFlowHandler):
    """MONAI's handler for evaluations whose metrics are complete when they end, as the case report's are.

    Attach it after the handlers that write the ``artifacts``. Options are those of MONAI's handler.
    """

    def attach(self, engine: Engine) -> None:
        """Register the handler; metrics are logged before MONAI's own handlers close the run."""
        engine.add_event_handler(Events.COMPLETED, self.epoch_completed)
        super().attach(engine)
