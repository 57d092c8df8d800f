"""Ignite handlers: what happens besides the training and evaluation loops."""

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import Any

import ignite.distributed as idist
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.metrics import EpochMetric
from monai.data.utils import affine_to_spacing
from monai.engines import IterationEvents
from monai.handlers import MLFlowHandler
from monai.networks import eval_mode
from monai.utils import CommonKeys, ImageMetaKey
from monai.visualize import GradCAM
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from amkd_monai.data.datalist import Datalist
from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import UNLABELLED, DecodedDataset
from amkd_monai.distillation import Batch, DistillationConfig
from amkd_monai.distillation.interface import DistillationOutput
from amkd_monai.distillation.losses import as_map, class_areas, label_map
from amkd_monai.engines.probes import LEAST_GROUPS, calibrated_on, fit_calibration
from amkd_monai.engines.runs import Identity, record_weights, refuse_another, versions
from amkd_monai.engines.trainer import Recipe, TeacherTargets
from amkd_monai.errors import is_true
from amkd_monai.memory import own_peak
from amkd_monai.metrics.classification import class_metrics, class_row
from amkd_monai.metrics.segmentation import STATUSES, mask_rows
from amkd_monai.metrics.summary import TEACHERS, Row, figures_of, preview_file, write_case_csv, write_figures
from amkd_monai.networks.student import Student, initialised
from amkd_monai.report.previews import mask_preview, save_arrays, small
from amkd_monai.storage import atomic_path, atomic_write_json, file_sha256, jsonable, now, read_json
from amkd_monai.weights import CheckpointError, load_state_dict, load_strict

logger = logging.getLogger("amkd_monai")


class Handler:
    """Base of the handlers: ``_started``, ``_epoch_completed`` and so on run at the events of these names.

    ``state`` names the attributes that a checkpoint keeps, as ``state_dict`` and ``load_state_dict``.
    """

    state: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        for name in self.state:
            setattr(self, name, state[name])

    def attach(self, engine: Engine) -> None:
        """Register with an engine."""
        for event in (*Events, *IterationEvents):
            if method := getattr(self, f"_{event.name.lower()}", None):
                engine.add_event_handler(event, method)


class KeptStudent(Handler):
    """Save the student's state dict after every validation (``keep`` "last"), or after the best so far ("best")."""

    state = ("best",)

    def __init__(self, student: nn.Module, path: str | Path, keep: str = "best") -> None:
        self.student, self.path, self.keep = student, Path(path), keep
        self.best = -float("inf")

    def _epoch_completed(self, engine: Engine) -> None:
        name = engine.state.key_metric_name
        value = float(engine.state.metrics[name])
        if math.isnan(value):
            raise ValueError(f"Validation gives no {name}: change the split, it needs two classes, or foreground.")
        if value > self.best or self.keep == "last":
            self.best = max(self.best, value)
            if idist.get_rank() == 0:
                with atomic_path(self.path) as temporary:
                    torch.save({k: v.detach().cpu() for k, v in self.student.state_dict().items()}, temporary)
                    record_weights(self.path.parent, file_sha256(temporary))


class AveragedStudent(Handler):
    """Average the student's weights over the steps; the average takes their place while the evaluator runs.

    Its decay per step grows to ``decay``; 0 averages nothing. Attach before the handler that validates.
    """

    def __init__(self, student: nn.Module, evaluator: Engine, decay: float) -> None:
        self.student, self.steps = student, 0
        self.average = ModelEmaV3(student, decay, use_warmup=True) if decay else None
        for event in (Events.STARTED, Events.COMPLETED):
            evaluator.add_event_handler(event, self._exchange)

    def _iteration_completed(self, engine: Engine) -> None:
        if self.average is not None:
            self.steps = engine.state.iteration
            self.average.update(self.student, self.steps)

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average is not None and self.steps:
            pairs = zip(self.student.state_dict().values(), self.average.module.state_dict().values(), strict=True)
            for own, averaged in pairs:
                kept = own.clone()
                own.copy_(averaged)
                averaged.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the average, nothing without one."""
        return {} if self.average is None else {"steps": self.steps, "average": self.average.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        if self.average is not None:
            self.steps = state["steps"]
            self.average.module.load_state_dict(state["average"])


class ResumeCheckpoint(Handler):
    """Save all state at the end of every epoch; with ``resume`` continue from there.

    Attach last to the trainer, so that an epoch counts as done only with its validation: a run that is killed within an
    epoch repeats it. Besides the ``distiller`` the ``objects`` have a state (optimizer, scheduler, handlers), and of
    the ``evaluator`` the best metric and epoch are kept; ``identity`` must be the same on resuming.
    """

    def __init__(
        self,
        path: str | Path,
        distiller: nn.Module,
        objects: Mapping[str, Any],
        evaluator: Engine | None = None,
        resume: bool | str = False,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.objects, self.evaluator = Path(path), dict(objects), evaluator
        self.resume = is_true(resume)
        self.distiller = distiller.module if hasattr(distiller, "module") else distiller
        self.identity: dict[str, str] = {}
        for name, value in (identity or {}).items():  # fields of an object one by one, so that the refusal names them
            parts = {f"{name}#{k}": v for k, v in vars(value).items()} if is_dataclass(value) else {name: value}
            self.identity |= {k: str(v) for k, v in parts.items()}
        self._state: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Check what is to be resumed; restore when the run starts, save at the end of every epoch."""
        if self.resume:
            try:
                self._state = torch.load(self.path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError) as error:
                raise CheckpointError(f"{self.path} is missing or damaged: start without --resume.") from error
            refuse_another(self._state["identity"], self.identity, self.path)
        super().attach(engine)

    @idist.one_rank_only()
    def _epoch_completed(self, engine: Engine) -> None:
        state: dict[str, Any] = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "identity": self.identity,
            "distiller": self.distiller.state_dict(),
            "objects": {name: value.state_dict() for name, value in self.objects.items()},
        }
        if self.evaluator is not None:
            best, epoch = self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch
            state["best"] = [float(best), int(epoch)]
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def _started(self, engine: Engine) -> None:
        if self._state is None:
            return
        state, self._state = self._state, None
        load_strict(self.distiller, state["distiller"], self.path)
        for name, value in self.objects.items():
            value.load_state_dict(state["objects"][name])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        if self.evaluator is not None:
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["best"]
        logger.info("resumed after epoch %d from %s", state["epoch"], self.path)


class LoadStudent(Handler):
    """Load a trained student, strictly, before an evaluation or inference; of a shared student its task's part."""

    def __init__(self, student: nn.Module, path: str | Path) -> None:
        self.student, self.path = student, Path(path)

    def _started(self, engine: Engine) -> None:
        if not self.path.is_file():
            raise CheckpointError(f"There is no trained student at {self.path}: run `training` first.")
        if task := getattr(self.student, "part", None):
            initialised(self.student, self.path, task)
        else:
            load_strict(self.student, load_state_dict(self.path), self.path)


class Attach:
    """Attach a handler that is defined elsewhere in a config: MONAI looks at the ``_target_`` of each in a list."""

    def __init__(self, handler: Any) -> None:
        self.attach = handler.attach


class RunRecord(Handler):
    """Write ``run.json`` when a training starts and ends and after every epoch, with the facts of the run.

    The means over an epoch's steps and the validation become a row of ``history.csv``, the scalars ``epoch/...`` of
    TensorBoard, and, each figure's last known value, ``latest`` in ``run.json``. Steps are read from the device at the
    end of the epoch. ``identity`` claims its folders before the first step. Attach after the validation handler. At the
    end the teachers of a run on one task are shown, see :func:`write_teacher_pictures`. Time and memory are of all
    processes of a resumed run; CPU time counts from a process's start, or from the end of a training before in it.
    """

    state = ("rows",)
    counted = 0.0
    """CPU seconds of this process that are in the record of an earlier training."""

    def __init__(
        self,
        output_dir: str | Path,
        facts: Mapping[str, Any],
        evaluator: Engine | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.output_dir, self.facts, self.evaluator = Path(output_dir), dict(facts), evaluator
        self.identity = identity
        self.rows: list[dict[str, float]] = []
        self.steps: list[tuple[Tensor, dict[str, tuple[DistillationOutput, list[str]]]]] = []
        self.started = self.cpu_started = 0.0
        self.before: Mapping[str, Any] = {}
        self.board: SummaryWriter | None = None

    def _started(self, engine: Engine) -> None:
        self.started, self.cpu_started = time.time(), min(RunRecord.counted, time.process_time())
        if self.identity is not None:  # a student that this process has validated is where the run starts from
            self.before = read_json(self.output_dir / "run.json") if self.identity.resume else {}
            self.identity.claim(keep=self.evaluator is not None and self.evaluator.state.best_metric_epoch > 0)
        if idist.get_rank() == 0:
            self.board = SummaryWriter(str(self.output_dir))
        self._write(engine, "running")

    def _iteration_completed(self, engine: Engine) -> None:
        result = engine.state.distillation
        if isinstance(result, Mapping):  # a step of several tasks
            parts = {f"{task}/": (of_task, engine.teachers_of(task)) for task, of_task in result.items()}
            self.steps.append((engine.state.output["loss"], parts))
        else:
            names = [t.name for t in engine.targets.teachers] if engine.targets else []
            self.steps.append((result.total.detach(), {"": (result.means(), names)}))

    def _epoch_completed(self, engine: Engine) -> None:
        row: dict[str, float] = {"epoch": engine.state.epoch, "learning_rate": engine.optimizer.param_groups[0]["lr"]}
        figures: dict[str, list[float]] = {}
        for total, parts in self.steps:
            step = {"loss_total": float(total)}
            for prefix, part in parts.items():
                step |= {f"{prefix}{name}": value for name, value in step_figures(*part).items()}
            for name, value in step.items():
                figures.setdefault(name, []).append(value)
        row |= {name: sum(values) / len(values) for name, values in figures.items()}
        if self.evaluator is not None and self.evaluator.state.epoch == engine.state.epoch:
            row |= {k: float(v) for k, v in self.evaluator.state.metrics.items()}
        self.rows.append(row)
        self.steps = []
        if self.board is not None:
            write_case_csv(self.output_dir / "history.csv", self.rows)
            for name in row.keys() - {"epoch"}:
                self.board.add_scalar(f"epoch/{name}", row[name], engine.state.epoch)
            self.board.flush()
        self._write(engine, "running")

    def _completed(self, engine: Engine) -> None:
        self._write(engine, "completed")
        if self.board is not None:
            self.board.close()
            if engine.targets is not None:
                write_teacher_pictures(engine, self.output_dir)

    @idist.one_rank_only()
    def _write(self, engine: Engine, status: str) -> None:
        RunRecord.counted = time.process_time()
        record = {
            "status": status,
            "written": now(),
            **({} if self.identity is None else {"run": self.identity.record["run"]}),
            **self.facts,
            "epochs_done": engine.state.epoch,
            "max_epochs": engine.state.max_epochs,
            "steps_per_epoch": engine.state.epoch_length,
            "versions": versions(),
            "machine": {"cpus": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)},
            "seconds": round(self.before.get("seconds", 0) + time.time() - self.started, 1),
            "cpu_seconds": round(self.before.get("cpu_seconds", 0) + RunRecord.counted - self.cpu_started, 1),
            "peak_rss_mb": max(round(own_peak()), self.before.get("peak_rss_mb", 0)),
            "latest": jsonable({column: value for row in self.rows for column, value in row.items()}),
        }
        if self.evaluator is not None:
            state, epoch = self.evaluator.state, int(self.evaluator.state.best_metric_epoch)
            best = float(state.best_metric) if epoch > 0 else None
            record["best_validation"] = {"metric": state.key_metric_name, "value": best, "epoch": epoch}
        atomic_write_json(self.output_dir / "run.json", record)


def step_figures(result: DistillationOutput, teachers: Sequence[str]) -> dict[str, float]:
    """Return what is recorded of a step: losses, their weights, and the mean weight of each teacher by name."""
    values = {"loss_total": float(result.total)}
    for name, loss in result.losses.items():
        values[f"loss_{name}"] = float(loss)
        values[f"weight_{name}"] = float(result.loss_weights[name])
        values[f"weighted_{name}"] = values[f"loss_{name}"] * values[f"weight_{name}"]
    for name, weights in result.teacher_weights.items():
        mean = weights.tolist()
        values |= {f"teacher_{name}_{teacher}": value for teacher, value in zip(teachers, mean, strict=True)}
        values[f"effective_teachers_{name}"] = effective_number(mean)
    return values | {name: float(value) for name, value in result.figures.items()}


def effective_number(weights: Sequence[float]) -> float:
    """Effective number of teachers, exp of the entropy of their shares; K equal weights give K, all 0 give 0."""
    total = sum(weights)
    shares = [w / total for w in weights if w > 0]
    return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0


def run_facts(
    datalist: Datalist,
    targets: TeacherTargets,
    recipe: Recipe,
    train: DecodedDataset,
    validation: DecodedDataset,
    student: nn.Module,
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run; ``is_test`` marks one with a teacher of random weights."""
    teachers = targets.record["teachers"]
    return {
        "is_test": any(teacher.get("random_weights") for teacher in teachers),
        "data": datalist.describe(),
        "skipped_samples": {"train": train.skipped, "validation": validation.skipped},
        "training_samples": len(train),
        "labelled_samples": int(train.has_label.sum()),
        "image_size": list(train.images.shape[-2:]),
        "distillation": targets.record if teachers else "none: the undistilled student",
        **distillation.facts(**method),
        **settings,
        "recipe": asdict(recipe),
        "student_parameters": sum(p.numel() for p in student.parameters()),
    }


def shared_facts(
    tasks: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    distillation: DistillationConfig,
    method: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Return the JSON-able facts of a run on several tasks: each task's facts, missing tasks, method and settings."""
    settings = {**distillation.facts(**method), **settings}
    is_test = any(facts["is_test"] for facts in tasks.values())
    phantom = any(facts["data"]["phantom"] for facts in tasks.values())
    return {"is_test": is_test, "phantom": phantom, "missing_tasks": list(missing), **settings, "tasks": dict(tasks)}


CALIBRATED_SIDE = 32  # pixels of each side of a mask that its calibration is fitted on
AFFINE_TOLERANCE = 1e-3  # largest difference (mm) between the affines of a prediction and its label on one grid


class CaseReport(Handler):
    """Score each case; when the run ends, write and log the report.

    Attach it to an evaluator whose output is, after decollating and postprocessing, a list of dicts with ``pred`` and
    ``label``. Masks: label maps (1, H, W) or (1, H, W, D) of the size the image has on disk. Classes: probabilities
    (C,) and a class; of findings (2, F) and the number whose bits they are.

    ``per_case.csv`` gets a row per case, and class of masks, ``metrics.json`` the task, the ``facts``
    (:py:func:`amkd_monai.engines.runs.evaluated`) and the summary. ``engine.state.metrics`` gets ``dice_mean``,
    ``dice_ci_low`` and so on, ``cases_missed`` etc. with the number of rows of each status and ``false_positive_rate``
    where a reference is empty; of classes ``<metric>``, ``<metric>_ci_low`` and ``<metric>_ci_high``. Under
    torch.distributed the cases of all ranks are gathered, repeated ones counted once, and rank 0 writes.

    Where they are ``shown``, each case gets a file ``previews/<case>.npz``, and the run ``report.html``. Of masks it
    holds :func:`amkd_monai.report.previews.mask_preview`, of classes ``image`` (1, h, w, 3) and, with the ``student``,
    ``cam`` (1, h, w) uint8, the Grad-CAM of the predicted class or of all findings (Selvaraju et al., 2017).
    """

    def __init__(
        self,
        task: str,
        output_dir: str | Path,
        facts: Mapping[str, Any] | None = None,
        shown: bool = False,
        student: nn.Module | None = None,
    ) -> None:
        self.task, self.output_dir, self.facts = get_task(task), Path(output_dir), dict(facts or {})
        self.shown, self.student = shown, student
        self.camera: GradCAM | None = None
        self._cases: dict[tuple[str, str], list[Row]] = {}

    def _started(self, engine: Engine) -> None:
        self._cases.clear()

    def _iteration_completed(self, engine: Engine) -> None:
        output, batch = engine.state.output, engine.state.batch
        if not isinstance(output, list):
            raise TypeError("CaseReport needs a list of dicts: run the evaluator with decollate=True.")
        sources = batch if isinstance(batch, list) and len(batch) == len(output) else [{}] * len(output)
        for item, source in zip(output, sources, strict=True):
            key = case, filename = identify({**source, **item})
            if key in self._cases:
                logger.info("The case %s appeared again and is counted once.", case)
                continue
            try:
                self._cases[key] = self._rows(item, case)
            except ValueError as error:
                raise ValueError(f"Case {case}: {error}") from error
            if self.shown:
                save_arrays(preview_file(self.output_dir, case), self._preview(item, filename))

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
            if self.shown:
                from amkd_monai.report.page import write_report

                logger.info("report: %s", write_report([self.output_dir], self.output_dir / "report.html"))

    def _preview(self, item: Mapping[str, Any], filename: str) -> dict[str, np.ndarray]:
        if not self.task.is_classification:
            return mask_preview(filename, *(np.asarray(item[k][0]) for k in (CommonKeys.LABEL, CommonKeys.PRED)))
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


def identify(item: Mapping[str, Any]) -> tuple[str, str]:
    """Id and image file of a case; an id may be the name of the file, a file unknown. Without both a ValueError."""
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


def _stack(output: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Probabilities (B, C) and classes (B,), or of findings (B, 2, F) and labels (B, F), of decollated items."""
    pred = torch.stack([torch.as_tensor(item[CommonKeys.PRED]).float().cpu() for item in output])
    label = torch.stack([torch.as_tensor(item[CommonKeys.LABEL]).long().cpu().squeeze() for item in output])
    if pred.ndim == 3 and label.ndim == 1:  # numbers whose bits are the findings
        label = label[:, None] >> torch.arange(pred.shape[2]) & 1
    return pred.as_subclass(Tensor), label.as_subclass(Tensor)


class CalibrateClasses(Handler):
    """Calibrate a student of classes on validation by the temperature of least cross entropy (Guo et al., 2017).

    It brings answers nearer to ``frequencies``, those of the classes in the training batches, (classes,) or (2, F) of
    absent and present findings; None: to equal ones. Attach to the validation evaluator, before the handler that saves
    the student, whose buffers the temperature and the offsets are. Validation itself runs without, so a value never
    depends on an earlier epoch.
    """

    def __init__(self, student: nn.Module, frequencies: np.ndarray | None = None) -> None:
        self.student, self.frequencies = student, frequencies

    def _epoch_started(self, engine: Engine) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []
        self.student.temperature.fill_(1.0)
        self.student.offsets.zero_()

    def _iteration_completed(self, engine: Engine) -> None:
        self.outputs.append(_stack(engine.state.output))

    def _epoch_completed(self, engine: Engine) -> None:
        p, label = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        logits = p.clamp_min(1e-12).log()  # logits up to a constant per case
        with torch.enable_grad():
            targets = F.one_hot(label, p.shape[1]).movedim(-1, 1).float()
            fitted = fit_calibration(as_map(logits), as_map(targets), prior=self.frequencies)
        self.student.temperature.fill_(fitted.temperature)
        if fitted.offsets:
            offsets = self.student.offsets
            offsets.copy_(torch.tensor(fitted.offsets).view_as(offsets))
            offsets -= offsets[:1].clone()  # those of the first class, or of absence, are 0
        engine.state.metrics["temperature"] = fitted.temperature


class CalibrateMasks(Handler):
    """Calibrate a student of masks on validation, by a temperature and an offset for each foreground class.

    A student of few labels draws too little; an offset of its logits makes its masks right in the mean. Attach to the
    validation evaluator, before the handler that saves the student: both are folded into the weights of its last layer,
    which is linear up to its answers, while the student is saved, and taken out behind it. Scores of validation are of
    the uncalibrated student. ``groups`` are those of the validation split; fewer than
    :data:`~amkd_monai.engines.probes.LEAST_GROUPS` calibrate nothing, nor does a student of another kind.
    """

    def __init__(self, student: nn.Module, groups: Sequence[str], enabled: bool | str = True) -> None:
        self.student = student
        self.groups = len(set(groups))
        self.is_on = is_true(enabled) and isinstance(student, Student) and self.groups >= LEAST_GROUPS

    def _epoch_started(self, engine: Engine) -> None:
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def _forward_completed(self, engine: Engine) -> None:
        if not self.is_on:
            return
        both = (engine.state.output[key].as_subclass(Tensor) for key in (CommonKeys.PRED, CommonKeys.LABEL))
        logits, label = (values.movedim(1, -3).flatten(0, -4) for values in both)  # (B, C, H, W), slices of volumes too
        step = max(1, logits.shape[-1] // CALIBRATED_SIDE)
        some = (..., slice(step // 2, None, step), slice(step // 2, None, step))
        self.outputs.append((logits[some].to("cpu", copy=True), label[some].to("cpu", copy=True)))

    def _epoch_completed(self, engine: Engine) -> None:
        if self.is_on:
            logits, label = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
            some = torch.from_numpy(calibrated_on(len(label)))
            logits, label = logits[some].float(), label[some].long()
            targets = class_areas(label, logits.shape[1], (logits.shape[-2], logits.shape[-1]))
            with torch.enable_grad():
                fitted = fit_calibration(logits, targets, self.groups)
            head = self.student.head
            self.kept = {name: value.clone() for name, value in head.state_dict().items()}
            head.load_state_dict(fitted.folded(self.kept))
            offsets = {f"offset_{c}": value for c, value in enumerate(fitted.offsets) if c}
            engine.state.metrics |= {"temperature": fitted.temperature, **offsets}

    def _completed(self, engine: Engine) -> None:
        if self.is_on:
            self.student.head.load_state_dict(self.kept)


class EmptyReferences(Handler):
    """Report how often foreground is predicted where the reference is empty, which MONAI's mean Dice leaves out.

    ``engine.state.metrics`` gets ``val_empty_references``, the number of these cases, and ``val_false_positive_rate``,
    unless there is none. Attach before handlers that log metrics; output: dicts with one-hot ``pred`` and ``label``.
    """

    def _epoch_started(self, engine: Engine) -> None:
        self._seen: list[list[bool]] = []

    def _iteration_completed(self, engine: Engine) -> None:
        parts = (CommonKeys.LABEL, CommonKeys.PRED)
        self._seen += [[bool((case[part][1:] > 0).any()) for part in parts] for case in engine.state.output]

    def _epoch_completed(self, engine: Engine) -> None:
        wrong = [predicted for present, predicted in self._seen if not present]
        if wrong and len(wrong) == len(self._seen):
            remedy = "change the split, or see `python -m amkd_monai data check`"
            raise ValueError(f"All {len(wrong)} validation cases have an empty reference, so have no Dice: {remedy}.")
        if wrong:
            metrics = {"val_false_positive_rate": sum(wrong) / len(wrong), "val_empty_references": len(wrong)}
            engine.state.metrics |= metrics


class TrackEvaluation(MLFlowHandler):
    """MONAI's handler for evaluations whose metrics are complete when they end; attach it after other handlers."""

    def attach(self, engine: Engine) -> None:
        """Register the handler; metrics are logged before MONAI's own handlers close the run."""
        engine.add_event_handler(Events.COMPLETED, self.epoch_completed)
        super().attach(engine)


SAMPLES = 6  # training images kept with the teacher outputs


def _byte(values: Tensor) -> np.ndarray:
    return (values.float() * 255).round().clamp(0, 255).byte().cpu().numpy()


def write_teacher_pictures(engine: Engine, output_dir: Path) -> None:
    """Write ``teachers.npz`` of a training with teachers.

    Six labelled training samples without augmentation, of a 3D student slices of one patch: ``image`` (N, H, W, 3),
    ``label`` (N, H, W) class indices, ``student`` (N, H, W), ``answer_<teacher>`` (N, h, w) where it has outputs,
    ``weight_<teacher>`` (N, h, w); all uint8, outputs and weights with 255 for 1. Outputs are probabilities of any
    foreground, or of the true class (one cell); weights are the gate's, over all teachers.
    """
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
    save_arrays(output_dir / TEACHERS, {name: array[:: -(-slices // SAMPLES)] for name, array in arrays.items()})


def _shown(logits: Tensor, classes: Tensor | None) -> np.ndarray:
    """Probability of foreground (N, h, w), or of the true class."""
    p = logits.softmax(1)
    return _byte(1 - p[:, 0] if classes is None else p[torch.arange(len(p)), classes])
