"""Fine-tuning of a student on the labels that were saved in the studies, by the bundle's own training."""

from __future__ import annotations

import difflib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from amkd_monai.atomic import atomic_write_json
from amkd_monai.data.datalist import Datalist
from amkd_monai.engines.runs import RECORD
from amkd_monai.errors import report_plainly
from amkd_monai.label.saved_labels import saved_labels
from amkd_monai.label.student import ServedStudent
from amkd_monai.weights import load_state_dict, load_strict, state_hash

OF_THE_SERVER = {"model", "gpus", "local_rank", "client_id"}
"""What MONAI Label and its clients add to the options of a training."""

STEPS = 4
"""Steps of an epoch, at least: the batches of a few labels would be one or two."""


class FineTune(TrainTask):
    """Train a student further; the result replaces it only if it is better on the labels held out.

    With ``teachers`` "none" training is supervised. With "bundle" the teachers of ``train.json`` teach their features,
    on the images without labels too; what they say is cached. A run works in ``training/``, which the next one empties;
    only a better student leaves it, so that a run may be killed at any moment. The student before is kept as
    ``models/previous.pt``.

    Args:
        student: the opened bundle.
        cache: folder for decoded images and teachers' targets.
    """

    def __init__(self, student: ServedStudent, cache: Path) -> None:
        super().__init__(f"Fine-tune {student.bundle.name} on the final labels")
        self.student, self.cache = student, cache
        self._record, self._training = student.bundle / "fine_tuning.json", student.bundle / "training"

    def config(self) -> dict[str, Any]:
        """Return the options with their defaults; a list offers choices, the first one is the default."""
        return {
            "max_epochs": 20,
            "learning_rate_scale": 0.25,
            "val_split": 0.2,
            "teachers": ["none", "bundle"],
            "device": device_list(),
        }

    def stats(self) -> dict[str, Any]:
        """Return the result of the last fine-tuning, if the student served is the one that it left."""
        if not self._record.is_file() or not self.student.model.is_file():
            return {}
        result: dict[str, Any] = json.loads(self._record.read_text(encoding="utf-8"))
        return result if result.get("student") == self.student.identity() else {}

    def check(self, request: dict[str, Any], datastore: Datastore) -> tuple[dict[str, Any], Datalist]:
        """Return the options and the data of a training.

        Raises:
            ValueError: too few labels, or an option that is unknown or cannot be used.
        """
        defaults = self.config()
        own = {key for key, value in request.items() if not isinstance(value, dict)}  # a dict: another model's options
        for key in sorted(own - defaults.keys() - OF_THE_SERVER):
            close = difflib.get_close_matches(key, defaults, 1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(defaults)}."
            raise ValueError(f"Fine-tuning has no option '{key}': {hint}")
        options = {key: _chosen(request.get(key, default)) for key, default in defaults.items()}
        options["max_epochs"] = _positive("max_epochs", options["max_epochs"], int)
        options["learning_rate_scale"] = _positive("learning_rate_scale", options["learning_rate_scale"], float)
        options["val_split"] = _positive("val_split", options["val_split"], float)
        if options["teachers"] not in ("none", "bundle"):
            raise ValueError(f"teachers is '{options['teachers']}': use none or bundle.")
        try:
            torch.device(name_to_device(str(options["device"])))
        except RuntimeError as error:
            raise ValueError(f"device is '{options['device']}': use one of {', '.join(device_list())}.") from error
        distilled = options["teachers"] == "bundle"
        return options, saved_labels(self.student, datastore, options["val_split"], with_unlabelled=distilled)

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and return the metric of the held-out labels before and at the best epoch.

        Raises:
            ValueError: too few labels, or an option that cannot be used.
        """
        report_plainly()
        start = time.monotonic()
        options, data = self.check(request, datastore)
        if self._training.exists():
            shutil.rmtree(self._training)
        self.student.remove_leftovers()
        self.student.copy_record(self._training / "models")
        workflow = self._workflow(data, options)
        parser = workflow.parser
        load_strict(parser.get_parsed_content("network"), load_state_dict(self.student.model), self.student.model)
        best = parser.get_parsed_content("best_student")
        parser.get_parsed_content("validate#evaluator").run()  # the student as it is: the value to beat
        before = best.best
        workflow.run()
        workflow.finalize()
        is_better, trained = best.best > before, self._training / "models" / "model.pt"
        result = {
            "model": self.student.bundle.name,
            "student": state_hash(load_state_dict(trained)) if is_better else self.student.identity(),
            "train": len(data.train),
            "validation": len(data.validation),
            "unlabelled": len(data.unlabelled),
            "total_epochs": options["max_epochs"],
            "metric": data.task.primary_metric,
            "metric_before": before,
            "best_metric": best.best,
            "total_time": round(time.monotonic() - start, 1),
        }
        atomic_write_json(self._record, result)  # says nothing until its student is there
        if is_better:
            self.student.replace(trained, trained.with_name(RECORD))
        return result

    def _workflow(self, data: Datalist, options: dict[str, Any]) -> ConfigWorkflow:
        folder = self.student.bundle
        config = json.loads((folder / "configs" / "train.json").read_text(encoding="utf-8"))
        scale, recipe = options["learning_rate_scale"], config["recipe"]
        values = {
            "bundle_root": str(folder),
            "purpose": "serving",
            "output_dir": str(self._training / "eval"),
            "ckpt_dir": str(self._training / "models"),
            "cache_dir": str(self.cache),
            "resume_dir": str(self._training / "models"),
            "device": name_to_device(options["device"]),
            "datalist": data,
            "max_epochs": options["max_epochs"],
            "val_interval": 1,
            "teachers": config["teachers"] if options["teachers"] == "bundle" else [],
            "admission": {"mode": "none"},
            "encoder_weights": "random",
            "recipe#min_steps": STEPS,
            "recipe#warmup_steps": STEPS,
            "recipe#learning_rate": recipe["learning_rate"] * scale,
            "recipe#encoder_learning_rate": recipe["encoder_learning_rate"] * scale,
        }
        workflow = ConfigWorkflow(
            workflow_type="train",
            config_file=str(folder / "configs" / "train.json"),
            meta_file=str(folder / "configs" / "metadata.json"),
            logging_file=False,
            **values,
        )
        workflow.initialize()
        return workflow


def _positive(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """Return a finite number above 0, whole where ``kind`` is int; clients send numbers as text, too.

    Raises:
        ValueError: it is something else.
    """
    try:
        number = kind(value)
        if not isinstance(value, bool) and math.isfinite(number) and number > 0 and number == float(value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}: give a {'whole ' if kind is int else ''}number above 0.")


def _chosen(value: Any) -> Any:
    """The option itself, or the first of the choices that a client sent back untouched."""
    return value[0] if isinstance(value, list) and value else value
