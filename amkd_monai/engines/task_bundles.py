"""The tasks of a shared student: each is described by a bundle of its own, opened here with a view of the student."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from amkd_monai.data.datalist import find_dataset_dir
from amkd_monai.data.datasets import get_task
from amkd_monai.engines.runs import expand
from amkd_monai.errors import EXPECTED, is_own, root_cause
from amkd_monai.networks.shared_student import Head, SharedStudent
from amkd_monai.teachers.base import CROSS_FITTED_KINDS

logger = logging.getLogger("amkd_monai")

LOAD = "amkd_monai.engines.handlers.LoadStudent"
_OF_THE_WHOLE_RUN = {"@kept_student", LOAD, "ignite.handlers.ProgressBar", "StatsHandler", "TensorBoardStatsHandler"}
_OF_THE_WHOLE_RUN |= {"amkd_monai.engines.handlers.CalibrateMasks"}
"""Handlers of a bundle that act on its own student's file or on logs; the shared run has its own."""


class TaskBundle:
    """One task's bundle, opened; whatever its config needs of the student it takes from ``task_view``."""

    def __init__(self, name: str, parser: ConfigParser) -> None:
        self.name, self.parser = name, parser
        self.task = get_task(parser.get_parsed_content("task"))
        network = parser.config["network_def"]
        network = {k: self.get(f"network_def#{k}") for k in ("num_classes", "stride") if k in network}
        self.head = Head(self.task.kind, int(network["num_classes"]), int(network.get("stride", 4)))
        if self.head.classes != (labels := len(self.task.classes)):
            has = f"The head of '{name}' has {self.head.classes} classes, its labels have {labels}"
            raise ValueError(f"{has} ({', '.join(self.task.classes)}): set network_def#num_classes to {labels}.")

    def with_student(self, view: nn.Module) -> TaskBundle:
        """Give the bundle its student."""
        self.parser.globals["task_view"] = view
        return self

    def get(self, item: str) -> Any:
        """Return an item of the bundle's config; an expected error is told with the task's name."""
        try:
            return self.parser.get_parsed_content(item)
        except (RuntimeError, *EXPECTED) as error:
            cause = root_cause(error)
            if not is_own(cause):
                raise
            raise ValueError(f"Task '{self.name}': {cause}") from error


class TaskSet:
    """The tasks of a run: opened bundles by name, their numbers, and names of tasks that have no data (``missing``)."""

    def __init__(self, bundles: Mapping[str, TaskBundle], numbers: Mapping[str, int], missing: Sequence[str]) -> None:
        self.bundles, self.missing = dict(bundles), list(missing)
        self.numbers = {name: numbers[name] for name in bundles}
        self.heads = {name: bundle.head for name, bundle in bundles.items()}
        self.tasks = {name: bundle.task for name, bundle in bundles.items()}

    def around(self, student: SharedStudent) -> TaskSet:
        """Give every bundle its view of a student, which is on its device, and return the tasks."""
        for name, bundle in self.bundles.items():
            bundle.with_student(student.for_task(name))
        return self

    def all(self, item: str) -> dict[str, Any]:
        """Return an item of every bundle's config, {task: item}."""
        return {name: bundle.get(item) for name, bundle in self.bundles.items()}


def open_tasks(
    tasks: Mapping[str, Mapping[str, Any]],
    bundle_root: str | Path,
    output_dir: str | Path,
    cache_dir: str | Path,
    settings: Mapping[str, Any],
    only: Sequence[str] | None = None,
    dataset_dir: str | Path | None = None,
    configs: Sequence[str] = ("train",),
) -> TaskSet:
    """Open the bundles of the tasks whose data are there.

    Tasks without data are announced and left out. If none has data, all of them use generated phantoms.

    Args:
        tasks: {name: {"bundle": name or path of its bundle, and settings of that bundle that this run changes}}.
        bundle_root: the folder of the shared student's bundle; others lie next to it, or in ``bundles/`` of the current
            folder where it was copied away from them.
        output_dir: each task gets a folder in it, as in ``cache_dir``, which single runs share.
        cache_dir: likewise.
        settings: settings of all tasks, wherever a bundle has them; ``teachers`` may name their ``tasks``.
        only: names of the tasks of this run; None takes all.
        dataset_dir: folder that holds the data sets' folders; a task's own ``dataset_dir`` goes first.
        configs: configs of each bundle, later ones on top.
    """
    if unknown := sorted(set(only or ()) - set(tasks)):
        raise ValueError(f"There is no task '{unknown[0]}' in this run: it has {', '.join(tasks)}.")
    dataset_dir = Path(dataset_dir).expanduser() if dataset_dir else None
    if dataset_dir and not dataset_dir.is_dir():
        raise FileNotFoundError(f"There is no folder {dataset_dir}: give the folder that holds the data sets' folders.")
    common = {**settings, "gate_options": {**settings.get("gate_options", {}), "tasks": len(tasks)}}
    teachers = common.pop("teachers", [])
    parsers: dict[str, ConfigParser] = {}
    seen: dict[str, str] = {}
    found: dict[str, bool] = {}
    for name, entry in tasks.items():
        parser = parsers[name] = _parser(name, entry, Path(bundle_root), common, configs)
        task = get_task(parser.get_parsed_content("task"))
        if (other := seen.setdefault(task.name, name)) != name:
            raise ValueError(f"'{other}' and '{name}' are the task {task.name}: keep one, or name its own task.")
        place = parser.config.get("dataset_dir")
        if place is None and dataset_dir and (dataset_dir / task.folder).is_dir():
            place = str(dataset_dir / task.folder)
        found[name] = find_dataset_dir(task, place) is not None
        parser.update({"dataset_dir": place, "teachers": teachers_of(name, teachers)})
        parser.update({"output_dir": f"{output_dir}/{name}", "cache_dir": f"{cache_dir}/{task.name}"})
    chosen = [name for name in tasks if only is None or name in only]
    missing = [name for name in chosen if not found[name] and any(found[n] for n in chosen)]
    for name in missing:
        logger.warning("NO DATA FOUND for the task '%s': this run continues without it.", name)
    numbers = dict(zip(tasks, range(len(tasks)), strict=True))
    return TaskSet({n: TaskBundle(n, parsers[n]) for n in chosen if n not in missing}, numbers, missing)


def teachers_of(task: str, teachers: str | Sequence[str | Mapping[str, Any]]) -> str | list[str | dict[str, Any]]:
    """Return the teachers of one task: its row of the matrix of teachers and tasks; words are left as they are.

    A teacher without ``tasks`` belongs to all. In another task than its own an image teacher gives features alone.
    """
    if isinstance(teachers, str):
        return teachers
    row: list[str | dict[str, Any]] = []
    for teacher in teachers:
        if isinstance(teacher, str):
            row.append(teacher)
            continue
        description = {k: v for k, v in teacher.items() if k != "tasks"}
        if task in teacher.get("tasks", [task]):
            row.append(description)
        elif teacher.get("kind") not in CROSS_FITTED_KINDS:
            row.append({**description, "own_answers": False})
    return row


def open_inference(
    task: str, entry: Mapping[str, Any], bundle_root: str | Path, neck_channels: int, settings: Mapping[str, Any]
) -> TaskBundle:
    """Open the inference config of one task's bundle for the shared student's part in it.

    ``entry`` is as in the ``tasks`` of :func:`open_tasks`; ``settings`` are places and the like of the bundle's own
    inference.
    """
    parser = _parser(task, entry, Path(bundle_root), settings, ("inference",))
    load = {"_target_": LOAD, "student": "@network", "path": "$@ckpt_dir + '/model.pt'", "task": task}
    parser["handlers"] = [load, *parser["handlers"]]
    if "neck_channels" in parser.config["network_def"]:
        parser["network_def"]["neck_channels"] = neck_channels
    return TaskBundle(task, parser)


def _parser(
    name: str, entry: Mapping[str, Any], root: Path, common: Mapping[str, Any], configs: Sequence[str]
) -> ConfigParser:
    """Read a bundle's configs, put the settings of the run and of the task's entry on top, and give it the student."""
    bundle = str(entry.get("bundle", name))
    places = [Path(bundle)] if "/" in bundle else [root.resolve().parent / bundle, Path("bundles") / bundle]
    folder = next((place for place in places if (place / "configs").is_dir()), places[0])
    files = [folder / "configs" / f"{config}.json" for config in configs]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"The task '{name}' has no {absent[0]}: correct `bundle` in its entry in `tasks`.")
    parser = ConfigParser(globals={"task_view": None})
    parser.read_config([str(file) for file in files])
    changes = {k: v for k, v in common.items() if k in parser.config}
    changes |= {k: v for k, v in entry.items() if k != "bundle"}
    for key, value in changes.items():
        if key.split("#")[0] not in parser.config:
            raise ValueError(f"The task '{name}' has no setting '{key}': use those at the top of {files[0]}.")
        old = parser.get(key)
        part = isinstance(value, Mapping) and isinstance(old, Mapping) and "_target_" in old and "_target_" not in value
        parser.set({**old, **value} if part else value, key)  # part of an object leaves its other settings
    parser["bundle_root"], parser["network"] = str(folder), "$task_view"
    expand(parser)
    for section in (parser.config.get("validate", {}), parser.config):  # training configs, or one for inference
        if "handlers" in section:
            section["handlers"] = [h for h in section["handlers"] if not _OF_THE_WHOLE_RUN & set(h.values())]
    return parser
