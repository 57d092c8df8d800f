"""The datalist of a run: data, source, the section of each sample, and further images (`--unlabelled FOLDER`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from amkd_monai.data import splits
from amkd_monai.data.datasets import Named, Task, get_task, is_phantom
from amkd_monai.data.datasets.described import Described, names_of_channels, names_of_values
from amkd_monai.data.splits import Item, SplitOptions
from amkd_monai.files import cases, names
from amkd_monai.files.names import files_of, some
from amkd_monai.storage import atomic_write_json, content_hashes, exclusive_lock
from amkd_monai.terminal import logger

OVERLAP = 46
"""Bits of 256 in which a further image differs at most from one of the validation or test section to be left out.

More than :data:`~amkd_monai.data.splits.NEAR`: copies that are shifted or rescaled by some pixels differ by up to 46,
and to leave out an image too many costs less than to train on a test image."""
OTHER = "other data"  # the source of a datalist of :func:`labelled_folder`
PHANTOM_NOTICE = """
==================================================================================================
 NO DATA FOUND for '{task}': this run uses generated PHANTOMS in {root}.
 It is a demonstration, not a result. To use real data, unpack {folder} and give
 --dataset_dir PATH/{folder}, or set AMKD_DATA_ROOT to its parent, or put it into data/.
=================================================================================================="""


@dataclass(frozen=True)
class Datalist:
    """The sections of a run; no group is in two of them. Items have "image", "label", "id" and "group"."""

    task: Task
    root: Path  # the data set's folder
    source: str  # how it was found: "argument", "environment", "data folder", "phantoms" or OTHER
    train: list[Item]
    validation: list[Item]
    test: list[Item]
    unlabelled: list[Item] = field(default_factory=list)  # without "label"; they take part in distillation only
    stand_in: str = ""  # what the data are and what they stand in for, shown with every result
    seen: dict[str, str] = field(default_factory=dict)
    """Test items that took part in the training of the student that is scored, by id, with where."""

    @property
    def sections(self) -> dict[str, list[Item]]:
        """The sections by name."""
        return {name: getattr(self, name) for name in ("train", "validation", "test", "unlabelled")}

    def checked(self, on_bad_sample: str) -> Datalist:
        """Return the same; unusable items of any section are DataProblems if ``on_bad_sample`` is "stop"."""
        problems = [item["problem"] for items in self.sections.values() for item in items if "problem" in item]
        if problems and on_bad_sample == "stop":
            raise names.DataProblems(problems)
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of ids and groups per section, independent of paths."""
        return splits.split_hash(**self.sections)

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
    if not (note := names.read_text(marker).partition("\n")[0].strip()):
        raise ValueError(f"{marker} has no first line: name the data and what they stand in for.")
    return note


def find_dataset_dir(task: Named, dataset_dir: str | Path | None = None) -> tuple[Path, str] | None:
    """Find a data set and say how: argument, ``$AMKD_DATA_ROOT/<folder>``, ``data/<folder>``; None without any.

    A named folder that is not there is a FileNotFoundError.
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
    """Find a data set as :func:`find_dataset_dir` does, else write phantoms into ``cache_dir``, loudly.

    ``task`` is its name or the path of its description, see :func:`amkd_monai.data.datasets.get_task`.
    """
    if found := find_dataset_dir(task, dataset_dir):
        return found
    chosen, phantoms = get_task(task), Path(cache_dir) / "phantoms"
    if chosen.phantom is None:
        raise FileNotFoundError(f"There are no data of '{chosen.name}' in {chosen.folder}: give dataset_dir.")
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

    ``task`` and ``dataset_dir`` are as for :func:`resolve_dataset_dir`, ``seed``, ``fractions``, ``folds`` and ``fold``
    as in :class:`~amkd_monai.data.splits.SplitOptions`. ``labelled`` keeps only so many training items labelled; the
    others become unlabelled. ``split_hash`` refuses any other split than the one of this hash. ``options`` are those of
    the data set's ``find_items``, e.g. ``{"normals": False}``. ``stand_in`` says what the data are and what they stand
    in for; None reads ``STAND-IN.txt`` in the folder. ``other_data`` are labelled data to test on in place of the data
    set, see :func:`labelled_folder`. No such folder or layout is a FileNotFoundError; a data set that contradicts
    itself, or an empty section, a ValueError.
    """
    if other_data is not None:
        return labelled_folder(task, other_data, cache_dir, options)
    root, source = resolve_dataset_dir(task, dataset_dir, cache_dir)
    items = find_items(task, root, cache_dir, options)
    train, validation, test = get_task(task).layout.split(root, items, SplitOptions(fractions, folds, fold, seed))
    for name, section in (("train", train), ("validation", validation)):
        if not section:
            raise ValueError(f"The {name} section of {root} is empty ({len(items)} items in all): change the split.")
    train, unlabelled = (train, []) if labelled is None else splits.few_labels(train, labelled, seed)
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
        layout = replace(chosen, layout=Described("labelled")).layout
        if unknown := given.keys() - layout.options:
            logger.warning("The option(s) %s of %s do not apply to %s.", some(unknown), chosen.name, root)
        given = {name: value for name, value in given.items() if name not in unknown}
    _check_order(chosen, root)
    layout = replace(layout, groups="")  # a pattern of the names of the data set; nothing is split here
    items = [splits.without(item, "section") for item in layout.find_items(root, cache_dir, **given)]
    return Datalist(chosen, root, OTHER, [], [], items, stand_in=stand_in_note(root))


def find_items(
    task: Named, root: Path, cache_dir: str | Path | None = None, options: Mapping[str, Any] | None = None
) -> list[Item]:
    """List the items of a data set with options of its own, see ``Described.find_items``.

    Other options are a ValueError.
    """
    task = get_task(task)
    if unknown := set(options or {}) - task.layout.options:
        known = ", ".join(sorted(task.layout.options))
        raise ValueError(f"{task.name} has no data option {min(unknown)}: it has {known}.")
    _check_order(task, root)
    return task.layout.find_items(root, cache_dir, **(options or {}))


def _check_order(task: Task, root: Path, labelled: bool = True) -> None:
    """Raise a ValueError if dataset.json gives classes or channels of the task's names in another order."""
    codes = task.mask_codes if isinstance(task.mask_codes, Mapping) else {}
    of_class = {codes.get(str(value), value): name for value, name in names_of_values(root)[0].items()}
    classes = [name for number, name in sorted((n, name) for n, name in of_class.items() if isinstance(n, int))]
    named = [("channels", names_of_channels(root), task.channels), ("classes", classes, task.classes)]
    for what, given, own in named if labelled and task.layout.masks else named[:1]:
        given, wanted = ([name.lower() for name in names] for names in (given, own))
        if given != wanted and sorted(given) == sorted(wanted):
            remedy = "write the files again in that order, or correct their names"
            raise ValueError(f"{root / 'dataset.json'} has the {what} {given}, {task.name} has {wanted}: {remedy}.")
        if given and given != wanted and what == "classes":
            logger.warning("dataset.json in %s names the classes %s, the task %s.", root, given, wanted)


def inference_datalist(
    task: Named, dataset_dir: str | Path | None = None, cache_dir: str | Path = "data"
) -> list[Item]:
    """List the images to predict, {"image", "id"}: those of an official layout, or of a plain folder."""
    root, _ = resolve_dataset_dir(task, dataset_dir, cache_dir)
    _check_order(get_task(task), root, labelled=False)
    return get_task(task).layout.inference_items(root)


@dataclass(frozen=True)
class FurtherImages:
    """Items without label, {"image", "id", "group"}, and facts for the run record."""

    items: list[Item] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of ids and groups."""
        return splits.split_hash(unlabelled=self.items)


def further_images(
    datalist: Datalist,
    folders: str | Sequence[str] | None,
    teachers: Sequence[object],
    cache_dir: str | Path | None = None,
    groups: str | None = None,
) -> FurtherImages:
    r"""List the images of folders for a run's training section, without those of its other sections.

    Left out are copies (equal bytes) of an image of any section, images that look nearly like one of validation or
    test, and DICOM of their patients. Images that look alike or are of one patient, by DICOM, are one group; groups,
    not images, are drawn equally often.

    ``folders`` (None for none) hold the files themselves: pictures, also of DICOM (``.dcm``), or for a task on volumes
    NIfTI files and folders of one DICOM series, which the folder itself may be. Without ``teachers`` such images are of
    no use. ``cache_dir`` keeps hashes. ``groups`` is a regular expression whose first group is the name of an image's
    group, searched in the file's name, such as ``(.*)_\d+`` for slices of volumes. A folder that is not there or holds
    no image of the task's kind is a FileNotFoundError; no teachers, an expression that does not fit a name, or images
    that are all left out are a ValueError.
    """
    if not folders:
        return FurtherImages()
    if not teachers:
        raise ValueError("unlabelled images teach nothing without teachers: leave `unlabelled` out, or name teachers.")
    if datalist.task.channels and datalist.task.dimensions == 2:
        raise ValueError("unlabelled folders hold one file an image, this task has several channels: leave it out.")
    given = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    chosen = [Path(folder).expanduser() for folder in given]
    volumes = datalist.task.dimensions == 3
    items = [item for number, folder in enumerate(chosen) for item in _items(folder, f"unlabelled{number}", volumes)]
    found, left_out = len(items), dict[str, int]()

    def keep(why: str, kept: list[Item]) -> list[Item]:
        left_out[why] = len(items) - len(kept)
        return kept

    others = [i for section in datalist.sections.values() for i in section if "problem" not in i]
    held_out = [i for i in (*datalist.validation, *datalist.test) if "problem" not in i]
    known = set(content_hashes([file for i in others for file in files_of(i["image"])], cache_dir))
    contents = content_hashes([i["image"] for i in items], cache_dir)
    items = keep("copies", [i for i, content in zip(items, contents, strict=True) if content not in known])
    pairs = splits.near_duplicates([*held_out, *items], OVERLAP, cache_dir)
    near = {j - len(held_out) for i, j in pairs if i < len(held_out) <= j}
    items = keep("like_validation_or_test", [item for number, item in enumerate(items) if number not in near])
    patients = splits.patients_of([*held_out, *items])
    theirs = {patients[file] for item in held_out for file in files_of(item["image"]) if file in patients}
    items = keep("of_their_patients", [item for item in items if patients.get(item["image"]) not in theirs])
    if not items:
        why = "are in this data set, look like its validation and test images, or are of their patients: give others"
        raise ValueError(f"All {found} images of {some(map(str, chosen))} {why}.")
    if groups is not None:
        items = [{**item, "group": _group_of(item, groups)} for item in items]
    else:
        items = [{**item, "group": patients.get(item["image"], item["id"])} for item in items]
        items = splits.joined(items, splits.near_duplicates(items, cache_dir=cache_dir))
    counts = {"images": len(items), "groups": len({item["group"] for item in items}), "left_out": left_out}
    logger.info("unlabelled images: %s", counts)
    return FurtherImages(items, {"folders": [str(folder) for folder in chosen], **counts})


def _items(folder: Path, prefix: str, volumes: bool) -> list[Item]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: correct `unlabelled`.")
    files = cases.to_predict(folder, volumes)
    if volumes and cases.is_series(folder):
        name = names.file_id(folder)
        files[f"{name}_" if name in files else name] = folder
    if files:
        return [{"image": str(file), "id": f"{prefix}/{name}"} for name, file in files.items()]
    held = some(names.printable(child.name) for child in folder.iterdir()) or "nothing"
    wanted = f"volumes ({', '.join(names.VOLUME_SUFFIXES)}, folders of a series)"
    wanted = wanted if volumes else f"pictures ({', '.join(names.PICTURE_SUFFIXES)})"
    raise FileNotFoundError(f"{folder} holds {held}: give a folder that itself holds {wanted} without labels.")


def _group_of(item: Item, expression: str) -> str:
    name = Path(item["image"]).name
    try:
        of = names.group_in(name, expression)
    except re.error as error:
        raise ValueError(f"unlabelled_groups is {expression!r} ({error}): give an expression with a group.") from error
    if not of:
        raise ValueError(f"unlabelled_groups, {expression!r}, finds no group in the name {name}: correct it.")
    return f"{item['id'].partition('/')[0]}/{of}"
