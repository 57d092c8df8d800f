"""The datalist of a run: which data, where from, and which sample is in which section."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from amkd_monai.atomic import atomic_write_json, exclusive_lock
from amkd_monai.data import (
    aptos2019,
    busi,
    covid,
    covid_volumes,
    isic2017,
    isic2017_lesion,
    kvasir_seg,
    msd_heart,
)
from amkd_monai.data.phantoms import write_phantom
from amkd_monai.data.phantoms.tools import is_phantom
from amkd_monai.data.splits import Item, SplitOptions, few_labels
from amkd_monai.data.splits import split_hash as hash_of_split
from amkd_monai.data.stand_in import stand_in_note
from amkd_monai.files.names import DataProblems
from amkd_monai.tasks import Task, get_task

logger = logging.getLogger("amkd_monai")

MODULES: dict[str, ModuleType] = {
    "aptos2019": aptos2019,
    "busi": busi,
    "covid": covid,
    "covid_volumes": covid_volumes,
    "isic2017": isic2017,
    "isic2017_lesion": isic2017_lesion,
    "kvasir_seg": kvasir_seg,
    "msd_heart": msd_heart,
}
"""Each data set's module has ``find_items``, ``split`` and ``inference_items``."""

PHANTOM_NOTICE = """
==================================================================================================
 NO DATA FOUND for '{task}': this run uses generated PHANTOMS in {root}.
 It is a demonstration, not a result. To use real data, unpack {folder} and give
 --dataset_dir PATH/{folder}, or set AMKD_DATA_ROOT to its parent, or put it into data/.
=================================================================================================="""


@dataclass(frozen=True)
class Datalist:
    """The sections of a run; no group is in two of them.

    Attributes:
        task: what is asked.
        root: the data set's folder.
        source: how it was found: "argument", "environment", "data folder" or "phantoms".
        train, validation, test: items with "image", "label", "id", "group".
        unlabelled: items without "label"; they take part in distillation only.
        stand_in: what the data are and what they stand in for, to be said beside every result; empty if they do not.
    """

    task: Task
    root: Path
    source: str
    train: list[Item]
    validation: list[Item]
    test: list[Item]
    unlabelled: list[Item] = field(default_factory=list)
    stand_in: str = ""

    @property
    def sections(self) -> dict[str, list[Item]]:
        """The sections by name."""
        return {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
            "unlabelled": self.unlabelled,
        }

    def checked(self, on_bad_sample: str) -> Datalist:
        """Return the same, after a look at what the layout found wrong in any section.

        Raises:
            DataProblems: items cannot be used, and ``on_bad_sample`` is "stop".
        """
        problems = [item["problem"] for items in self.sections.values() for item in items if "problem" in item]
        if problems and on_bad_sample == "stop":
            raise DataProblems(problems)
        return self

    @property
    def hash(self) -> str:
        """SHA-256 over who is where, whatever the paths."""
        return hash_of_split(self.train, self.validation, self.test, self.unlabelled)

    @property
    def is_phantom(self) -> bool:
        """Whether the data are generated."""
        return is_phantom(self.root)

    def write_split(self, folder: str | Path) -> None:
        """Write who is in which section to ``split_<task>_<hash>.json``."""
        members = {n: [[i["id"], i["group"]] for i in items] for n, items in self.sections.items()}
        path = Path(folder) / f"split_{self.task.name}_{self.hash[:12]}.json"
        atomic_write_json(path, {"task": self.task.name, "hash": self.hash, **members})

    def describe(self) -> dict[str, Any]:
        """Return facts for a run record."""
        return {
            "task": self.task.name,
            "source": self.source,
            "root": str(self.root),
            "phantom": self.is_phantom,
            "stand_in": self.stand_in,
            "counts": {name: len(items) for name, items in self.sections.items()},
            "groups": {name: len({item["group"] for item in items}) for name, items in self.sections.items()},
            "split_hash": self.hash,
        }


def resolve_dataset_dir(
    task: str, dataset_dir: str | Path | None = None, cache_dir: str | Path = "data"
) -> tuple[Path, str]:
    """Find a data set: argument, ``$AMKD_DATA_ROOT/<folder>``, ``data/<folder>``, else phantoms, loudly.

    Returns:
        The folder and how it was found.

    Raises:
        FileNotFoundError: the argument names a folder that is not there; it is never replaced by phantoms.
        ValueError: unknown task.
    """
    folder = get_task(task).folder
    if found := find_dataset_dir(task, dataset_dir):
        return found
    phantoms = Path(cache_dir) / "phantoms"
    with exclusive_lock(phantoms / f"{folder}.lock", wait_s=600):
        written = write_phantom(task, phantoms)
    logger.warning(PHANTOM_NOTICE.format(task=task, root=written, folder=folder))
    return written, "phantoms"


def find_dataset_dir(task: str, dataset_dir: str | Path | None = None) -> tuple[Path, str] | None:
    """Find a data set as :func:`resolve_dataset_dir` does; None where only phantoms are left.

    Raises:
        FileNotFoundError: the argument or the environment names a folder that is not there.
        ValueError: unknown task.
    """
    folder = get_task(task).folder
    if dataset_dir:
        given = Path(dataset_dir).expanduser()
        if not given.is_dir():
            raise FileNotFoundError(f"There is no folder {given}: correct dataset_dir, or leave it out for phantoms.")
        return given, "argument"
    if root := os.environ.get("AMKD_DATA_ROOT"):
        root = str(Path(root).expanduser())
        if not Path(root := str(Path(root).expanduser())).is_dir():
            raise FileNotFoundError(f"AMKD_DATA_ROOT names {root}, which is not there: correct or unset it.")
        if (Path(root) / folder).is_dir():
            return Path(root) / folder, "environment"
        logger.warning("There is no folder %s in AMKD_DATA_ROOT=%s.", folder, root)
    if (Path("data") / folder).is_dir():
        return Path("data") / folder, "data folder"
    return None


def datalist(
    task: str,
    dataset_dir: str | Path | None = None,
    cache_dir: str | Path = "data",
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    folds: int = 5,
    fold: int = 0,
    labelled: int | None = None,
    split_hash: str | None = None,
    options: Mapping[str, Any] | None = None,
    stand_in: str | None = None,
) -> Datalist:
    """Find, check and split a data set.

    Args:
        task: a key of ``amkd_monai.tasks.TASKS``.
        dataset_dir: the data set's folder; None searches for it.
        cache_dir: where phantoms are made if there are no data.
        seed: seed of the split.
        fractions: shares of train, validation and test, where the data set is split at random.
        folds: number of folds, where it is cross-validated.
        fold: the fold that is the test section.
        labelled: keep only so many training items labelled; the others become unlabelled.
        split_hash: refuse any other split than the one of this hash.
        options: further options of the data set's ``find_items``, e.g. ``{"normals": False}``.
        stand_in: where other data stand in for the data set, which they are; None takes the first line of
            ``STAND-IN.txt`` in the folder, if it is there.

    Raises:
        FileNotFoundError: no such folder or layout.
        ValueError: a data set that contradicts itself, a section that is empty, or another split than ``split_hash``.
    """
    root, source = resolve_dataset_dir(task, dataset_dir, cache_dir)
    module = MODULES[task]
    items = find_items(task, root, cache_dir, options)
    train, validation, test = module.split(root, items, SplitOptions(tuple(fractions), folds, fold, seed))
    for name, section in (("train", train), ("validation", validation)):
        if not section:
            raise ValueError(f"The {name} section of {root} is empty ({len(items)} items in all): change the split.")
    unlabelled: list[Item] = []
    if labelled is not None:
        train, unlabelled = few_labels(train, labelled, seed)
    stand_in = stand_in or stand_in_note(root)
    result = Datalist(get_task(task), root, source, train, validation, test, unlabelled, stand_in)
    _check_groups(result)
    if split_hash is not None and result.hash != split_hash:
        raise ValueError(
            f"The data in {root} are split otherwise than those of the run (split {result.hash[:12]}, not "
            f"{split_hash[:12]}): give the run's own data and settings, such as dataset_dir; docs/runs.md tells how a "
            "student is evaluated on other data."
        )
    return result


def find_items(
    task: str, root: Path, cache_dir: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> list[Item]:
    """List the items of a data set with options of its own.

    Raises:
        ValueError: the data set has no such option, or contradicts itself.
        FileNotFoundError: no such layout.
    """
    find = MODULES[task].find_items
    known = inspect.signature(find).parameters.keys() - {"root"}
    if unknown := set(options or {}) - known:
        raise ValueError(f"{task} has no data option {min(unknown)}: it has {', '.join(sorted(known)) or 'none'}.")
    kept = {"cache_dir": cache_dir} if "cache_dir" in known else {}
    items: list[Item] = find(root, **kept, **(options or {}))
    return items


def _check_groups(result: Datalist) -> None:
    seen: dict[str, str] = {}
    for name, items in result.sections.items():
        for group in {item["group"] for item in items}:
            other = seen.setdefault(group, name)
            if name != other:
                raise ValueError(f"The group '{group}' is in the sections {other} and {name}: change the split.")


def inference_datalist(task: str, dataset_dir: str | Path | None = None, cache_dir: str | Path = "data") -> list[Item]:
    """List the images to predict, {"image", "id"}: an official layout's, or those of a plain folder.

    Raises:
        FileNotFoundError: there is no such folder or no image in it.
    """
    root, _ = resolve_dataset_dir(task, dataset_dir, cache_dir)
    items: list[Item] = MODULES[task].inference_items(root)
    return items
