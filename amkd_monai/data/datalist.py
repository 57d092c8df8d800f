"""The datalist of a run: data, source, and the section of each sample."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amkd_monai.data.datasets import Named, Task, get_task, is_phantom
from amkd_monai.data.datasets.described import Described
from amkd_monai.data.splits import Item, SplitOptions, few_labels, without
from amkd_monai.data.splits import split_hash as hash_of_split
from amkd_monai.files.names import DataProblems, read_text, some
from amkd_monai.storage import atomic_write_json, exclusive_lock
from amkd_monai.terminal import logger

OTHER = "other data"  # the source of a datalist of :func:`labelled_folder`
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
        task, root: what is asked, and the data set's folder.
        source: how it was found: "argument", "environment", "data folder" or "phantoms".
        train, validation, test: items with "image", "label", "id", "group".
        unlabelled: items without "label"; they take part in distillation only.
        stand_in: what the data are and what they stand in for, shown with every result; empty if they do not.
        seen: test items that took part in the training of the student that is scored, by id, with where.
    """

    task: Task
    root: Path
    source: str
    train: list[Item]
    validation: list[Item]
    test: list[Item]
    unlabelled: list[Item] = field(default_factory=list)
    stand_in: str = ""
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def sections(self) -> dict[str, list[Item]]:
        """The sections by name."""
        return {name: getattr(self, name) for name in ("train", "validation", "test", "unlabelled")}

    def checked(self, on_bad_sample: str) -> Datalist:
        """Return the same; unusable items of any section are DataProblems if ``on_bad_sample`` is "stop"."""
        problems = [item["problem"] for items in self.sections.values() for item in items if "problem" in item]
        if problems and on_bad_sample == "stop":
            raise DataProblems(problems)
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of ids and groups per section, independent of paths."""
        return hash_of_split(**self.sections)

    @property
    def is_phantom(self) -> bool:
        """Whether the data are generated."""
        return is_phantom(self.root)

    def write_split(self, folder: str | Path) -> None:
        """Write ids and groups of each section to ``split_<task>_<hash>.json``."""
        members = {n: [[i["id"], i["group"]] for i in items] for n, items in self.sections.items()}
        path = Path(folder) / f"split_{self.task.name}_{self.hash[:12]}.json"
        atomic_write_json(path, {"task": self.task.name, "hash": self.hash, **members})

    def describe(self) -> dict[str, Any]:
        """Return facts for a run record."""
        where = {**self.task.identity, "source": self.source, "root": str(self.root), "phantom": self.is_phantom}
        counts = {name: len(items) for name, items in self.sections.items()}
        groups = {name: len({item["group"] for item in items}) for name, items in self.sections.items()}
        return {**where, "stand_in": self.stand_in, "counts": counts, "groups": groups, "split_hash": self.hash}


def stand_in_note(folder: str | Path) -> str:
    """Return the first line of a data set's ``STAND-IN.txt``: what the data are and stand in for, or "" without one."""
    marker = Path(folder) / "STAND-IN.txt"
    if not marker.is_file():
        return ""
    if not (note := read_text(marker).partition("\n")[0].strip()):
        raise ValueError(f"{marker} has no first line: name the data and what they stand in for.")
    return note


def find_dataset_dir(task: Named, dataset_dir: str | Path | None = None) -> tuple[Path, str] | None:
    """Find a data set and say how: argument, ``$AMKD_DATA_ROOT/<folder>``, ``data/<folder>``; None without any.

    Raises:
        FileNotFoundError: a folder that is named does not exist.
    """
    folder = get_task(task).folder
    if dataset_dir:
        if not (given := Path(dataset_dir).expanduser()).is_dir():
            raise FileNotFoundError(f"There is no folder {given}: correct dataset_dir, or leave it out for phantoms.")
        return given, "argument"
    if variable := os.environ.get("AMKD_DATA_ROOT"):
        if not (root := Path(variable).expanduser()).is_dir():
            raise FileNotFoundError(f"AMKD_DATA_ROOT names {root}, which does not exist: correct or unset it.")
        if (root / folder).is_dir():
            return root / folder, "environment"
        logger.warning("There is no folder %s in AMKD_DATA_ROOT=%s.", folder, root)
    if (Path("data") / folder).is_dir():
        return Path("data") / folder, "data folder"
    return None


def resolve_dataset_dir(
    task: Named, dataset_dir: str | Path | None = None, cache_dir: str | Path = "data"
) -> tuple[Path, str]:
    """Find a data set as :func:`find_dataset_dir` does, else write phantoms into ``cache_dir``, loudly."""
    if found := find_dataset_dir(task, dataset_dir):
        return found
    chosen, phantoms = get_task(task), Path(cache_dir) / "phantoms"
    with exclusive_lock(phantoms / f"{chosen.folder}.lock", wait_s=600):
        written = chosen.write_phantom(phantoms)
    logger.warning(PHANTOM_NOTICE.format(task=chosen.name, root=written, folder=chosen.folder))
    return written, "phantoms"


def datalist(
    task: Named,
    dataset_dir: str | Path | None = None,
    cache_dir: str | Path = "data",
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    folds: int | None = None,
    fold: int = 0,
    labelled: int | None = None,
    split_hash: str | None = None,
    options: Mapping[str, Any] | None = None,
    stand_in: str | None = None,
    other_data: str | Path | None = None,
) -> Datalist:
    """Find, check and split a data set.

    Args:
        task: its name or the path of its description, see :func:`amkd_monai.data.datasets.get_task`.
        dataset_dir: the data set's folder; None searches for it.
        cache_dir: where phantoms are made if there are no data.
        seed: seed of the split.
        fractions: shares of train, validation and test, where the data set is split at random.
        folds: number of folds, in place of official sections and random ones; None: as the data set has it.
        fold: the fold that is the test section.
        labelled: keep only so many training items labelled; the others become unlabelled.
        split_hash: refuse any other split than the one of this hash.
        options: further options of the data set's ``find_items``, e.g. ``{"normals": False}``.
        stand_in: what the data are and what they stand in for; None reads ``STAND-IN.txt`` in the folder.
        other_data: labelled data to test on in place of the data set, see :func:`labelled_folder`.

    Raises:
        FileNotFoundError: no such folder or layout.
        ValueError: a data set that contradicts itself, a section that is empty, or another split than ``split_hash``.
    """
    if other_data is not None:
        return labelled_folder(task, other_data, cache_dir, options)
    root, source = resolve_dataset_dir(task, dataset_dir, cache_dir)
    items = find_items(task, root, cache_dir, options)
    train, validation, test = get_task(task).layout.split(root, items, SplitOptions(fractions, folds, fold, seed))
    for name, section in (("train", train), ("validation", validation)):
        if not section:
            raise ValueError(f"The {name} section of {root} is empty ({len(items)} items in all): change the split.")
    train, unlabelled = (train, []) if labelled is None else few_labels(train, labelled, seed)
    note = stand_in or stand_in_note(root)
    result = Datalist(get_task(task), root, source, train, validation, test, unlabelled, note)
    seen: dict[str, str] = {}
    for name, section in result.sections.items():
        for group in {item["group"] for item in section}:
            if name != (other := seen.setdefault(group, name)):
                raise ValueError(f"The group '{group}' is in the sections {other} and {name}: change the split.")
    if split_hash is not None and result.hash != split_hash:
        hashes = f"split {result.hash[:12]}, not {split_hash[:12]}"
        remedy = "give its own data and settings, such as dataset_dir; docs/runs.md tells how to evaluate on other data"
        raise ValueError(f"The data in {root} are not split like those of the run ({hashes}): {remedy}.")
    return result


def labelled_folder(
    task: Named, folder: str | Path, cache_dir: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> Datalist:
    """List all that is labelled in a folder, in the layout of the task's data set or in a common one, as test section.

    Options that the common one does not know are announced. A folder without labelled images is a FileNotFoundError.
    """
    root, chosen = Path(folder).expanduser(), get_task(task)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}: give a folder of labelled data.")
    layout, given = chosen.layout, dict(options or {})
    if not (layout.form_of(root) and (root / layout.file).exists()):
        channels = max(1, len(chosen.channels))
        layout = Described("labelled", chosen.classes, chosen.kind, chosen.dimensions == 3, channels=channels)
        known = inspect.signature(layout.find_items).parameters
        if unknown := given.keys() - known.keys():
            logger.warning("The option(s) %s of %s do not apply to %s.", some(unknown), chosen.name, root)
        given = {name: value for name, value in given.items() if name in known}
    items = [without(item, "section") for item in layout.find_items(root, cache_dir, **given)]
    return Datalist(chosen, root, OTHER, [], [], items, stand_in=stand_in_note(root))


def find_items(
    task: Named, root: Path, cache_dir: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> list[Item]:
    """List the items of a data set with options of its own, see ``Described.find_items``.

    Raises:
        ValueError: the data set has no such option.
    """
    task, find = get_task(task), get_task(task).layout.find_items
    known = inspect.signature(find).parameters.keys() - {"root", "cache_dir"}
    if unknown := set(options or {}) - known:
        raise ValueError(f"{task.name} has no data option {min(unknown)}: it has {', '.join(sorted(known)) or 'none'}.")
    return find(root, cache_dir, **(options or {}))


def inference_datalist(
    task: Named, dataset_dir: str | Path | None = None, cache_dir: str | Path = "data"
) -> list[Item]:
    """List the images to predict, {"image", "id"}: those of an official layout, or of a plain folder."""
    root, _ = resolve_dataset_dir(task, dataset_dir, cache_dir)
    return get_task(task).layout.inference_items(root)
