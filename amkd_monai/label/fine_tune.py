"""Fine-tuning of a student on the labels that were saved in the studies, by the bundle's own training."""

import contextlib
import hashlib
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from amkd_monai.data import splits
from amkd_monai.data.datalist import Datalist
from amkd_monai.data.datasets import Task
from amkd_monai.data.splits import Item
from amkd_monai.engines.runs import RECORD
from amkd_monai.errors import report_plainly
from amkd_monai.files.names import file_id, group_in
from amkd_monai.label.student import ServedStudent
from amkd_monai.label.studies import read_label
from amkd_monai.storage import TEMPORARY_MARK, atomic_write_json, file_sha256, read_json
from amkd_monai.teachers.base import CROSS_FITTED_KINDS
from amkd_monai.teachers.plan import choose
from amkd_monai.weights import load_state_dict, load_strict

OF_THE_SERVER = {"model", "gpus", "local_rank", "client_id"}
"""What MONAI Label and its clients add to the options of a training."""

NUMBERS = {"max_epochs": 20, "learning_rate_scale": 0.25, "val_split": 0.2}
"""Options that are numbers above 0, whole ones where the default is."""

STEPS = 4  # steps of an epoch, at least: the batches of a few labels would be one or two


class FineTune(TrainTask):
    """Train a student further; the result replaces it only if it is better on the labels held out.

    With ``teachers`` "none" training is supervised. With "bundle" the student is also distilled from the teachers of
    ``train.json``, on the images without labels too; their outputs are cached. A run works in ``training/``, which the
    next one empties; only a better student leaves it, so that a run may be killed at any moment. The student before is
    kept as ``models/previous.pt``. ``cache`` is the folder for decoded images and teacher outputs.
    """

    def __init__(self, student: ServedStudent, cache: Path) -> None:
        super().__init__(f"Fine-tune {student.bundle.name} on the final labels")
        self.student, self.cache = student, cache
        self._record, self._training = student.bundle / "fine_tuning.json", student.bundle / "training"

    def config(self) -> dict[str, Any]:
        """Return the options with their defaults; a list offers choices, the first one is the default."""
        return {**NUMBERS, "teachers": ["none", "bundle"], "device": device_list()}

    def stats(self) -> dict[str, Any]:
        """Return the result of the last fine-tuning, if the student served is the one that it left."""
        result = read_json(self._record)
        is_present = self.student.model.is_file() and result.get("student") == self.student.identity()
        return result if is_present else {}

    def check(self, request: dict[str, Any], datastore: Datastore) -> tuple[dict[str, Any], Datalist]:
        """Return the options and the data of a training; raise a ValueError for what cannot work."""
        defaults = self.config()
        own = {key for key, value in request.items() if not isinstance(value, dict)}  # a dict: another model's options
        if unknown := own - defaults.keys() - OF_THE_SERVER:
            raise ValueError(f"Fine-tuning has no option '{min(unknown)}': use {', '.join(defaults)}.")
        options = {key: request.get(key, default) for key, default in defaults.items()}
        options = {k: v[0] if isinstance(v, list) and v else v for k, v in options.items()}  # choices sent back as such
        options |= {key: _positive(key, options[key], type(default)) for key, default in NUMBERS.items()}
        if options["val_split"] >= 1:
            raise ValueError(f"val_split is {options['val_split']}: give a part between 0 and 1.")
        if options["teachers"] not in ("none", "bundle"):
            raise ValueError(f"teachers is '{options['teachers']}': use none or bundle.")
        config = read_json(self.student.bundle / "configs" / "train.json")
        if options["teachers"] == "bundle" and not self._features(config):
            remedy = "add a foundation model's file, name others in its train.json (imagenet), or use none"
            raise ValueError(f"teachers is 'bundle', but {self.student.bundle.name} has none with features: {remedy}.")
        try:
            torch.device(name_to_device(str(options["device"])))
        except RuntimeError as error:
            raise ValueError(f"device is '{options['device']}': use one of {', '.join(device_list())}.") from error
        how = options["val_split"], options["teachers"] == "bundle", self.cache
        return options, saved_labels(self.student, datastore, *how)

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and return the metric of the held-out labels before and at the best epoch."""
        report_plainly()
        start = time.monotonic()
        (options, data), student, models = self.check(request, datastore), self.student, self._training / "models"
        shutil.rmtree(self._training, ignore_errors=True)
        for file in student.model.parent.glob(f".*{TEMPORARY_MARK}*"):  # left by a process that was killed
            file.unlink()
        models.mkdir(parents=True)
        if (record := student.model.with_name(RECORD)).is_file():
            shutil.copyfile(record, models / RECORD)
        workflow = self._workflow(data, options)
        get = workflow.parser.get_parsed_content
        before = _score(get, student.model)
        get("validate#evaluator").run()  # refuses what gives no score, and says that training starts from this student
        get("kept_student").best = -math.inf  # an epoch is compared as it is saved, calibrated, like the student before
        workflow.run()
        workflow.finalize()
        is_better = (after := _score(get, models / "model.pt")) > before
        result = {
            "model": student.bundle.name,
            "student": file_sha256(models / "model.pt") if is_better else student.identity(),
            **{part: len(getattr(data, part)) for part in ("train", "validation", "unlabelled")},
            "total_epochs": options["max_epochs"],
            "metric": data.task.primary_metric,
            "metric_before": before,
            "best_metric": after,
            "total_time": round(time.monotonic() - start, 1),
        }
        atomic_write_json(self._record, result)  # ignored until its student is there
        if is_better:
            student.replace(models / "model.pt", models / RECORD)
        return result

    def _features(self, config: dict[str, Any]) -> bool:
        """Whether a teacher of a config gives features, all that is distilled here."""
        described, _ = choose(config["teachers"], self.student.task, config.get("weights_dir"))
        return any(teacher["kind"] not in CROSS_FITTED_KINDS for teacher in described)

    def _workflow(self, data: Datalist, options: dict[str, Any]) -> ConfigWorkflow:
        folder, models = self.student.bundle, str(self._training / "models")
        file, meta = (str(folder / "configs" / name) for name in ("train.json", "metadata.json"))
        config = read_json(Path(file))
        values = {
            "bundle_root": str(folder),
            "purpose": "serving",
            **{"ckpt_dir": models, "resume_dir": models},
            **{"output_dir": str(self._training / "eval"), "cache_dir": str(self.cache)},
            "device": name_to_device(options["device"]),
            "datalist": data,
            **{"max_epochs": options["max_epochs"], "val_interval": 1, "keep": "best"},
            "teachers": config["teachers"] if options["teachers"] == "bundle" else [],
            "admission": {"mode": "none"},
            "encoder_weights": "random",
            **({} if data.task.is_classification else {"mask_codes": "auto"}),  # saved labels hold class indices
            **{"recipe#min_steps": STEPS, "recipe#warmup_steps": STEPS},
        }
        for rate in ("learning_rate", "encoder_learning_rate"):
            values[f"recipe#{rate}"] = config["recipe"][rate] * options["learning_rate_scale"]
        workflow = ConfigWorkflow(file, meta, logging_file=False, workflow_type="train", **values)
        workflow.initialize()
        workflow.parser["as_served"] = {**workflow.parser["validate"]["evaluator"], "val_handlers": []}
        return workflow


def _score(get: Callable[[str], Any], file: Path) -> float:
    """The metric of the held-out labels, by the content of a workflow, of a file of weights as it would be served."""
    load_strict(get("network"), load_state_dict(file), file)
    evaluator = get("as_served")
    evaluator.run()
    return float(evaluator.state.metrics[evaluator.state.key_metric_name])


def saved_labels(
    student: ServedStudent, datastore: Datastore, validation_part: float, with_unlabelled: bool, cache: Path
) -> Datalist:
    """List the images with a final label that a student can learn from.

    No section cuts a group: by the pattern of the bundle, a DICOM patient, copies, and pictures that look alike, whose
    hashes ``cache`` keeps. Which ones are held out depends on names alone, so that an image keeps its section when
    labels are added, up to the rounding of the part. Each class is split by itself; of findings, the images with each
    and those without it are, the rarest first. Teachers use images without a label too. Too few are a ValueError.
    """
    task, items = student.task, []
    for entry in datastore.datalist():
        image, label = entry["image"], entry["label"]
        if student.takes(image) and label.endswith(".json") == task.is_classification:  # else of another model
            if not task.is_classification:
                items.append(_item(task, image, label=label))
            elif (number := read_label(Path(label), task)) is not None:
                items.append(_item(task, image, label=number))
    items = splits.group_patients(items)
    alike = splits.near_duplicates(items, cache_dir=cache) if task.dimensions == 2 else splits.identical(items)
    items = sorted(splits.joined(items, alike), key=lambda i: hashlib.sha256(i["group"].encode()).digest())
    strata = defaultdict[Hashable, dict[str, None]](dict)
    for item in items:
        for stratum in _strata(task, item["label"]):
            strata[stratum][item["group"]] = None
    held_out = set[str]()
    for members in sorted(strata.values(), key=len):
        wanted = max(1, round(validation_part * len(members))) if len(members) > 1 else 0
        missing = wanted - len(held_out & members.keys())
        held_out.update([member for member in members if member not in held_out][: max(0, missing)])
    train, validation = ([item for item in items if (item["group"] in held_out) is held] for held in (False, True))
    if not _is_enough(task, train, validation):
        needed = {"classification": "two images of each of two classes", "segmentation": "two"}
        said = needed.get(task.kind, "two images with and two without one of its findings")
        count = len({item["group"] for item in items})  # images that look alike teach and test nothing new
        raise ValueError(f"Final labels of {count} different image(s) are too few for {task.name}: save {said}.")
    images = sorted(datastore.get_unlabeled_images()) if with_unlabelled else ()
    unlabelled = [_item(task, file) for file in student.suitable(datastore, images).values()]
    return Datalist(task, Path(items[0]["image"]).parent, "saved labels", train, validation, [], unlabelled)


def _strata(task: Task, label: Any) -> list[Hashable]:
    """What an image with a label is one of: its class, the presence or absence of each finding, or all masks."""
    if task.has_findings:
        return [(n, label >> n & 1) for n in range(len(task.classes))]
    return [label if task.is_classification else None]


def _is_enough(task: Task, train: list[Item], validation: list[Item]) -> bool:
    """Whether held-out labels can be scored and others can teach what they score."""
    found = ({s for item in section for s in _strata(task, item["label"])} for section in (train, validation))
    both = set[Hashable].intersection(*found)
    if not task.has_findings:
        return len(both) > task.is_classification
    return any({(n, 0), (n, 1)} <= both for n in range(len(task.classes)))


def _item(task: Task, image: str, **label: Any) -> Item:
    name = file_id(Path(image))
    return {"image": image, "id": name, "group": group_in(name, task.layout.groups) or name, **label}


def _positive(name: str, value: Any, kind: type) -> Any:
    """Return a finite number above 0 of a kind; clients send numbers as text, too."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = kind(value)
        if not isinstance(value, bool) and math.isfinite(number) and number > 0 and number == float(value):
            return number
    raise ValueError(f"{name} is {value!r}: give a {'whole ' if kind is int else ''}number above 0.")
