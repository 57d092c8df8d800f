"""Fine-tuning of a student on the labels that were saved in the studies, by the bundle's own training."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from amkd_monai.atomic import atomic_path, atomic_write_json
from amkd_monai.data.datalist import Datalist
from amkd_monai.errors import report_plainly
from amkd_monai.label.saved_labels import saved_labels
from amkd_monai.label.student import ServedStudent
from amkd_monai.weights import load_state_dict, load_strict

STEPS = 4
"""Steps of an epoch, at least: the batches of a few labels would be one or two."""


class FineTune(TrainTask):
    """Train a student further; the result replaces it only if it is better on the labels held out.

    With ``teachers`` "none" training is supervised. With "bundle" the teachers of ``train.json`` teach their features,
    on the images without labels too; what they say is cached. The student before is kept as ``models/previous.pt``.

    Args:
        student: the opened bundle.
        cache: folder for decoded images and teachers' targets.
    """

    def __init__(self, student: ServedStudent, cache: Path) -> None:
        super().__init__(f"Fine-tune {student.bundle.name} on the final labels")
        self.student, self.cache = student, cache
        self._record = student.bundle / "fine_tuning.json"

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
        """Return the result of the last fine-tuning."""
        result: dict[str, Any] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        return result

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and return the metric of the held-out labels before and at the best epoch.

        Raises:
            ValueError: too few labels, or an option that cannot be used.
        """
        report_plainly()
        start = time.monotonic()
        options = {key: _chosen(request.get(key, default)) for key, default in self.config().items()}
        if options["teachers"] not in ("none", "bundle"):
            raise ValueError(f"teachers is '{options['teachers']}': use none or bundle.")
        distilled = options["teachers"] == "bundle"
        data = saved_labels(self.student, datastore, float(options["val_split"]), with_unlabelled=distilled)
        previous = self.student.model.with_name("previous.pt")
        shutil.copyfile(self.student.model, previous)
        workflow = self._workflow(data, options, distilled)
        parser = workflow.parser
        load_strict(parser.get_parsed_content("network"), load_state_dict(self.student.model), self.student.model)
        best = parser.get_parsed_content("best_student")
        parser.get_parsed_content("validate#evaluator").run()  # the student as it is: the value to beat
        before = best.best
        workflow.run()
        workflow.finalize()
        if best.best <= before:  # validation has written the old student, for classes with another temperature
            with atomic_path(self.student.model) as temporary:
                shutil.copyfile(previous, temporary)
        result = {
            "model": self.student.bundle.name,
            "train": len(data.train),
            "validation": len(data.validation),
            "unlabelled": len(data.unlabelled),
            "total_epochs": int(options["max_epochs"]),
            "metric": data.task.primary_metric,
            "metric_before": before,
            "best_metric": best.best,
            "total_time": round(time.monotonic() - start, 1),
        }
        atomic_write_json(self._record, result)
        return result

    def _workflow(self, data: Datalist, options: dict[str, Any], distilled: bool) -> ConfigWorkflow:
        folder = self.student.bundle
        config = json.loads((folder / "configs" / "train.json").read_text())
        scale, recipe = float(options["learning_rate_scale"]), config["recipe"]
        values = {
            "bundle_root": str(folder),
            "output_dir": str(folder / "eval"),
            "ckpt_dir": str(self.student.model.parent),
            "cache_dir": str(self.cache),
            "resume_dir": str(self.cache),
            "device": name_to_device(options["device"]),
            "datalist": data,
            "max_epochs": int(options["max_epochs"]),
            "val_interval": 1,
            "teachers": config["teachers"] if distilled else [],
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


def _chosen(value: Any) -> Any:
    """The option itself, or the first of the choices that a client sent back untouched."""
    return value[0] if isinstance(value, list) else value
