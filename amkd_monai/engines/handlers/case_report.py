"""Handler that scores every case of an evaluation and writes the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data.utils import affine_to_spacing
from monai.utils import CommonKeys, ImageMetaKey
from torch import Tensor

from amkd_monai.atomic import atomic_write_json
from amkd_monai.metrics.segmentation import METRICS, STATUSES, case_metrics
from amkd_monai.metrics.summary import Row, format_table, jsonable, summarise, write_case_csv
from amkd_monai.tasks import get_task

logger = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3
"""Largest difference (mm) between the affines of a prediction and its label on one grid."""

CaseKey = tuple[str, str]
"""Id and image file: tells a repeated case from two cases of one id, which is an error."""


class CaseReport:
    """Score each case at its native resolution; when the run ends, write and log the report.

    Attach it to an evaluator whose ``engine.state.output`` is, after decollating and postprocessing, a list
    of dicts with ``pred`` and ``label``: label maps of shape (1, H, W) or (1, H, W, D) of the size the image
    has on disk (``Invertd`` undoes resizing, ``AsDiscreted(argmax=True)`` makes the map). Written into
    ``output_dir``:

    - ``per_case.csv``: the rows of :py:func:`~amkd_monai.metrics.segmentation.case_metrics` with the ``id``
      first;
    - ``metrics.json``: task, unit, tolerance and the summary of the rows, with ``facts`` merged in.

    The summary also goes into ``engine.state.metrics``: ``dice_mean``, ``dice_ci_low``, ``dice_ci_high`` and
    so on, ``cases_missed`` etc. with the number of rows of each status, and ``false_positive_rate`` where a reference
    is empty.

    The id of a case is the ``id`` of its batch item or else the name of its image file without the extension.
    In a distributed run the rows of all ranks are gathered and rank 0 writes; a case that the sampler
    repeated, to give all ranks equally many, is counted once.

    Args:
        task: name of the task, which gives classes, dimensions, NSD tolerance and unit.
        output_dir: folder of the report, made if it is missing.
        spacing_from_meta: take the voxel size (mm) of volumes from the affine of the label; if False
            distances are in voxels. Distances in 2D images are always in pixels.
        facts: what else ``metrics.json`` shall say, for example the data source and the hash of the split.

    Raises:
        ValueError: if there is no such task, or if facts would overwrite a result.
    """

    def __init__(
        self,
        task: str,
        output_dir: str | Path,
        spacing_from_meta: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = get_task(task)
        self.output_dir = Path(output_dir)
        self.in_mm = spacing_from_meta and self.task.dimensions == 3
        self.facts = dict(facts or {})
        self._cases: dict[CaseKey, list[Row]] = {}
        if clash := sorted(self.facts.keys() & self._describe({}).keys()):
            raise ValueError(f"facts must not hold {', '.join(clash)}: the report writes it itself.")

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        engine.add_event_handler(Events.STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.report)

    def reset(self, engine: Engine) -> None:
        """Forget the cases of an earlier run of the same evaluator."""
        self._cases = {}

    def collect(self, engine: Engine) -> None:
        """Score the cases of one batch.

        Raises:
            TypeError: if the output is not a list of dicts.
            ValueError: if a case has no id, or its label map is of the wrong shape or on another grid than
                its label.
        """
        output, batch = engine.state.output, engine.state.batch
        if not isinstance(output, list) or not all(isinstance(item, Mapping) for item in output):
            raise TypeError("CaseReport needs a list of dicts: run the evaluator with decollate=True.")
        sources = batch if isinstance(batch, list) and len(batch) == len(output) else [{}] * len(output)
        for item, source in zip(output, sources, strict=True):
            key = case, _ = identify({**source, **item})
            if key in self._cases:
                logger.info("The case %s came again and is counted once.", case)
                continue
            self._cases[key] = [{"id": case, **row} for row in self._score(item, case)]

    def report(self, engine: Engine) -> None:
        """Gather the rows of all ranks, put the summary into ``engine.state.metrics``, write and log it.

        Raises:
            ValueError: if there was no case, or if two files give the same id.
        """
        cases = _gather(self._cases)
        rows = [row for key in sorted(cases) for row in cases[key]]
        summary, flat = self._summarise(rows)
        engine.state.metrics |= flat
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        write_case_csv(self.output_dir / "per_case.csv", rows)
        atomic_write_json(self.output_dir / "metrics.json", jsonable(self._describe(summary) | self.facts))
        logger.info("%s", self._table(summary))

    def _summarise(self, rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, float]]:
        """The summary of all rows, and what of it goes into ``engine.state.metrics``."""
        summary = summarise(rows, METRICS)
        flat: dict[str, float] = {}
        for metric, values in summary["metrics"].items():
            flat |= {f"{metric}_{name}": value for name, value in values.items()}
        flat |= {f"cases_{status}": summary["status"].get(status, 0) for status in STATUSES}
        if summary["empty_references"]:
            flat["false_positive_rate"] = summary["false_positive_rate"]
        return summary, flat

    def _table(self, summary: Mapping[str, Any]) -> str:
        return format_table(summary, f"{self.task.name}, HD95 in {self._unit}")

    def _score(self, item: Mapping[str, Any], case: str) -> list[Row]:
        try:
            return case_metrics(
                self._label_map(item, CommonKeys.PRED),
                self._label_map(item, CommonKeys.LABEL),
                num_classes=len(self.task.classes),
                spacing=self._spacing(item),
                nsd_tolerance=self.task.nsd_tolerance,
                class_names=self.task.classes[1:],
            )
        except ValueError as error:
            raise ValueError(f"Case {case}: {error}") from error

    def _label_map(self, item: Mapping[str, Any], key: str) -> Tensor:
        if key not in item:
            raise ValueError(f"the output of the evaluator has no '{key}'.")
        array = item[key]
        if array.ndim != self.task.dimensions + 1 or array.shape[0] != 1:
            raise ValueError(
                f"'{key}' must be one label map of shape (1, ...) with {self.task.dimensions} axes, "
                f"got shape {tuple(array.shape)}."
            )
        return array[0]  # (1, H, W[, D]) -> (H, W[, D])

    def _spacing(self, item: Mapping[str, Any]) -> list[float]:
        if self.in_mm:
            return _voxel_size(item[CommonKeys.PRED], item[CommonKeys.LABEL])
        return [1.0] * self.task.dimensions

    @property
    def _unit(self) -> str:
        return self.task.unit if self.in_mm or self.task.dimensions == 2 else "voxels"

    def _describe(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "unit": self._unit,
            "nsd_tolerance": self.task.nsd_tolerance,
            "summary": dict(summary),
        }


def identify(item: Mapping[str, Any]) -> CaseKey:
    """The id of a case and its image file; the id may be the name of the file, the file may be unknown."""
    image = item.get(CommonKeys.IMAGE)
    filename = getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ)
    case = item.get("id")
    if case is None and filename is None:
        raise ValueError("A case has neither an 'id' nor a file name in the meta data of its image.")
    if case is None:
        case = PurePath(str(filename).removesuffix(".gz")).stem  # volume.nii.gz -> volume
    return str(case), str(filename)


def _voxel_size(pred: Tensor, label: Tensor) -> list[float]:
    """Voxel size (mm) along the axes of a label (1, H, W, D), whose grid the prediction must share."""
    affine = getattr(label, "affine", None)
    if affine is None:
        raise ValueError("the label has no affine: load it with LoadImaged or set spacing_from_meta to False.")
    other = getattr(pred, "affine", affine)
    if not torch.allclose(other.to(affine), affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise ValueError("prediction and label lie on different grids: invert the transforms of the prediction.")
    return [float(size) for size in affine_to_spacing(affine, r=3)]


def _gather(cases: dict[CaseKey, list[Row]]) -> dict[CaseKey, list[Row]]:
    """The cases of all ranks, those that several ranks have once."""
    if not (dist.is_available() and dist.is_initialized()):
        return cases
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, cases)
    return {key: rows for of_rank in reversed(gathered) for key, rows in of_rank.items()}
