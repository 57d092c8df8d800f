"""The layout of described data: folders of images and masks, datalists, nnU-Net's folders, class folders, tables."""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data import splits
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions
from amkd_monai.files.cases import case_grid, is_volume, series_folders, to_predict
from amkd_monai.files.masks import other_size
from amkd_monai.files.names import (
    PICTURE_SUFFIXES,
    SUFFIXES,
    VOLUME_SUFFIXES,
    channel_files,
    file_id,
    files_of,
    group_in,
    has_suffix,
    image_files,
    is_channel,
    label_files,
    left_out,
    natural,
    originals,
    some,
    table_rows,
    warn_of_deeper,
)
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid
from amkd_monai.storage import read_json, read_text
from amkd_monai.terminal import logger

IMAGES = ("images", "imagesTr", "image", "imgs", "Imgs", "frames")
LABELS = ("masks", "labels", "labelsTr", "mask", "label", "annotations", "segmentations", "GT")
ENDINGS = ("", "_mask", "_seg", "_segmentation", "_label", "_labels", "_gt", "-mask", "-seg", "-label")
SECTIONS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test", "testing")}
"""Names of folders, and of lists and cells in datalists and tables, by section; the case does not matter."""
COLUMNS = {
    what: tuple(names.split(", "))
    for what, names in {
        "image": "image, path, file, filename, image_path, image_id, image index, id_code, id",
        "label": "label, class, diagnosis, target, mask, mask_path, segmentation, label_path, findings, finding labels",
        "group": "group, patient, patient_id, patient id, patientid, subject, subject_id, subject id, subjectid"
        ", case_id",
        "section": "section, split, set, subset",
        "fold": "fold",
    }.items()
}
"""Columns of a table by the names they usually have, the image's first."""

FOLDS = 5
NO_FINDING, NO_FINDINGS = "none", ("none", "nofinding", "nofindings")
"""A label of an image without findings, and ways to write it."""
NO_LABEL = ("", "nan", "null", "n/a")  # cells of a label that say nothing, in lower case
BINARY = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}  # cells that say whether something is there


Found = tuple[dict[str, str], Any, Any]
"""Section or class, folder of images, and folder of masks or table; None where there is none."""


@dataclass(frozen=True)
class Described:
    """How the files of a data set lie in its folder and are divided; what the attributes leave open is found there.

    A folder without the layout, or that contradicts itself, is a FileNotFoundError or ValueError. Images that cannot be
    used (without a mask, listed but gone, of another size or number of dimensions, without all channels, of a repeated
    name) are items with a "problem", so that all of them are named at once.
    """

    title: str = ""  # name of the data set, for messages
    classes: Sequence[str] = ()  # names by label value; class folders and tables may use names or values
    kind: str = "segmentation"  # of the task, see :class:`~amkd_monai.data.datasets.Task`
    volumes: bool = False  # images are NIfTI volumes or folders of DICOM slices, not pictures
    form: str = ""  # one of `FORMS`
    # of "pairs": images and masks, of several the first two that are there; () for the usual names
    folders: Sequence[Sequence[str]] = ()
    normals: str = ""  # which of `folders` holds images without a lesion, which can be left out
    strata: bool = False  # all of `folders` are read; an item's "class" is the name of its folder of images
    # by section, the folder of images and that of masks, or the table; each may be several names, of which one is
    # there. They go before anything else; a section without masks is left out.
    official: Mapping[str, Sequence[str | Sequence[str]]] = field(default_factory=dict)
    file_lists: Sequence[str] = ()  # files of ids, training and test, which fix the sections if they are there
    # bits in which the perceptual hashes of one group differ at most, see
    # :func:`~amkd_monai.data.splits.near_duplicates`; None: a group has byte-identical images only
    duplicate_distance: int | None = None
    mask_ending: str = ""  # what the names of masks end with before the suffix, such as ``_mask``
    file: str = ""  # the datalist or the table
    # names of the table's columns by "image", "label", "group", "section"; several of "label" hold 1 for the class of
    # their place, from 1 on, and 0 otherwise; of findings one each, with 1 and 0
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # further names of classes
    groups: str = ""  # regular expression of which the first group, in an image's name, is the item's group
    channels: int = 1  # files that make an image, in the order in which nnU-Net numbers or a datalist lists them
    # part of the items outside the test fold that validates, where a data set without sections of its own is
    # cross-validated; None: it is split at random
    validation_fraction: float | None = None
    expected: str = (  # the layout in words, for messages
        "images/ and masks/ (or labels/), a JSON datalist, nnU-Net's imagesTr/, labelsTr/ and dataset.json, a folder "
        "per class, or a table (CSV)"
    )
    predict_in: Sequence[str] = ("imagesTs", *IMAGES)  # may hold the images to predict; the root is looked at last

    @property
    def options(self) -> set[str]:
        """What may be given to :meth:`find_items` of this data set."""
        return {"folders", "mask_ending", "duplicate_distance", *(["normals"] if self.normals else [])}

    @property
    def masks(self) -> bool:
        """Whether labels are masks."""
        return self.kind == "segmentation"

    def check(self, root: Path) -> str:
        """Return the form of a folder; without any, a FileNotFoundError names the right folder above or below."""
        if form := self.form_of(root):
            return form
        fix = f"expected {self.expected}"
        for table in sorted(root.glob("[!.]*.[ct]sv")) if root.is_dir() and not self.official else ():
            for what in sorted({"image", "label"} - self.columns_of(table).keys()):
                usual = ", ".join(self.columns.get(what) or COLUMNS[what])
                usual += f" or all of {', '.join(self.classes)}" if what == "label" and not self.masks else ""
                fix += f"; {table.name} has no column of the {what} ({usual})"
        if root.is_dir() and (below := [child for child in sorted(root.iterdir()) if self.form_of(child)]):
            one = f"you are one level too high, use {below[0]}"
            several = f"{len(below)} folders in it have that, use {below[0]} or another, or collect their files in one"
            fix += f"; {one if len(below) == 1 else several}"
        elif (above := self.form_of(root.parent)) and (above != "classes" or any(_images_in(root))):
            fix += f"; you are one level too low, use {root.parent}"
        raise FileNotFoundError(f"No {self.title} data in {root}: {fix}.")

    def form_of(self, root: Path) -> str:
        """Return the form of a folder, "" where it has none."""
        return next((form for form, (find, _) in FORMS.items() if self.form in ("", form) and find(self, root)), "")

    def rows(self, root: Path) -> list[Item]:
        """List what the form of a folder says of each image; labels of images are as they are written.

        Items have "image" and "id", where they are told "label", "group", "section" and "fold", else a "problem".
        """
        find, read = FORMS[self.check(root)]
        return list(read(self, root, find(self, root)))

    def find_items(
        self,
        root: Path,
        cache_dir: str | Path | None = None,
        folders: Sequence[str] | None = None,
        mask_ending: str = "",
        duplicate_distance: int | None = None,
        normals: bool = True,
    ) -> list[Item]:
        """List all labelled images in natural order; of pictures only headers are read.

        ``folders``, that of images and that of masks, relative to ``root``, may be one folder. ``mask_ending`` and
        ``duplicate_distance`` (of pictures only) replace the attributes. ``normals`` says whether images without a
        lesion are listed, where they lie in a folder of their own. ``cache_dir`` keeps perceptual hashes.
        """
        layout = self if normals else replace(self, folders=[f for f in self.folders if f[0] != self.normals])
        if folders is not None:
            if isinstance(folders, str) or len(folders) != 2:
                raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
            if absent := [root / name for name in folders if not (root / name).is_dir()]:
                raise FileNotFoundError(f"There is no folder {absent[0]}: correct `folders` or dataset_dir.")
            layout = replace(layout, form="pairs", folders=[folders], official={})
        layout = replace(layout, mask_ending=mask_ending or self.mask_ending)
        distance = self.duplicate_distance if duplicate_distance is None else duplicate_distance
        return layout.items_of(layout.rows(root), root, cache_dir, distance)

    def items_of(
        self, rows: Iterable[Item], root: Path, cache_dir: str | Path | None = None, distance: int | None = None
    ) -> list[Item]:
        """Turn :meth:`rows` into items in natural order, with unique ids, labels, groups and problems.

        Images whose perceptual hashes differ in at most ``distance`` bits are one group; None: byte-identical ones.
        """
        items = [self._completed(item) for item in _named(map(self._grouped, rows), root)]
        if not items:
            raise FileNotFoundError(f"No images in {root}: expected {self.expected}.")
        items = items if self.groups else splits.group_patients(items)
        others, usable = ([item for item in items if ("problem" in item) is wrong] for wrong in (True, False))
        if self.kind == "classification":
            of_class = defaultdict[object, set[str]](set)
            for item in usable:
                of_class[item["label"]].add(item["group"])
            if len(of_class) > 1 and all(len(g) == 1 and min(g).startswith(splits.PATIENT) for g in of_class.values()):
                what = f"Each class in {root} is of one DICOM patient or study, as folders of series are"
                raise ValueError(f"{what}: give each class images of several patients.")
        if distance is not None and self.volumes:
            raise ValueError("duplicate_distance compares pictures, not volumes: leave it out.")
        alike = splits.identical(usable) if distance is None else splits.near_duplicates(usable, distance, cache_dir)
        grouped = splits.joined(usable, alike)
        if not self.masks and all(item["group"] == item["id"] for item in usable):
            report_conflicts(grouped, self.text_of)
        return sorted([*grouped, *others], key=lambda item: natural(item["id"]))

    def inference_items(self, root: Path) -> list[Item]:
        """List the images to predict: unlabelled ones of a datalist, those of the usual folders, tables and classes."""
        items: list[Item] = []
        if self.form in ("", "datalist") and (files := _datalists_in(self, root)):
            further = [_resolved(e["image"], files[0].parent) for _, e in _entries(files[0]) if "label" not in e]
            there = [image for image in further if image and all(Path(file).exists() for file in files_of(image))]
            items = _named([{"image": image, "id": _stem(image)} for image in there], root)
        for place in ("imagesTs", *(["."] if self.channels > 1 else [])):
            found = {} if items else channel_files(root / place)
            items += [{"image": [of_case[c] for c in sorted(of_case)], "id": case} for case, of_case in found.items()]
        if not items and not self.official and not self.strata and self.form_of(root) in ("classes", "table"):
            return [{"image": i["image"], "id": i["id"]} for i in self.find_items(root) if "problem" not in i]
        strata = [root / images for images, _ in self.folders if self.strata and (root / images).is_dir()]
        for folder in () if items else strata or [root]:
            items += listed_images(folder, self.predict_in, self.volumes)
        return sorted(map(self._to_predict, items), key=lambda item: natural(item["id"]))

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Keep the sections or folds that the data name; without a test section, it is drawn from the training one."""
        if any((root / name).is_file() for name in self.file_lists):
            items = self._listed(root, items)
        sections, folds = {i.get("section") for i in items}, {i["fold"] for i in items if "fold" in i}
        if folds:
            if how.folds is not None:
                raise ValueError(f"The data in {root} name their own folds: leave `folds` out, or the column of folds.")
            if how.fold not in folds:
                raise ValueError(f"There is no fold {how.fold} in {root}: choose one of {sorted(folds)}.")
            after = sorted(folds)[(sorted(folds).index(how.fold) + 1) % len(folds)]
            held = {how.fold: "validation"} if "test" in sections else {how.fold: "test", after: "validation"}
            logger.info("Folds of %s: %s.", root, ", ".join(f"{fold} is {name}" for fold, name in held.items()))
            items = [{**i, "section": held.get(i["fold"], "train")} if "fold" in i else i for i in items]
        elif sections == {"train", "validation"} and self.validation_fraction is None:
            logger.info("No test section in %s: a part of the training section is used for it.", root)
            train = [item for item in items if item["section"] == "train"]
            drawn = splits.random_split(train, (1 - how.fractions[2], 0, how.fractions[2]), how.seed)[2]
            ids = {item["id"] for item in drawn}
            items = [{**item, "section": "test"} if item["id"] in ids else item for item in items]
        named = {item.get("section") for item in items} - {None}
        if loose := [item["id"] for item in items if "section" not in item and named]:
            what = "fold" if folds else "section"
            raise ValueError(f"{some(loose)} in {root} belong to no {what}, others do: give all of them one.")
        if named and "train" not in named and how.folds is None:
            where = f"{len(folds)} fold(s)" if folds else f"the section(s) {', '.join(sorted(map(str, named)))}"
            raise ValueError(f"The data in {root} have {where}, which leave none for training: add such images.")
        items = [splits.without(item, "fold") for item in items]
        not_tested = sum(how.fractions[:2]) or 1
        is_official = how.folds is None and {"train", "test"} <= named
        number = None if is_official else how.folds or (FOLDS if self.validation_fraction else None)
        if number is None and how.fold and not folds:
            raise ValueError(f"fold is {how.fold}, but {root} is not split into folds: give `folds`, too.")
        if is_official:
            train, validation, test = _official_sections(items)
            share = how.fractions[0] / not_tested
            rest = (train, validation) if validation else splits.random_split(train, (share, 1 - share, 0), how.seed)
            return rest[0], rest[1], test
        items = [splits.without(item, "section") for item in items]
        if number is None:
            logger.info("No official split in %s: splitting at random by %s.", root, tuple(how.fractions))
            return splits.random_split(items, how.fractions, how.seed)
        logger.info("The test section of %s is fold %d of %d.", root, how.fold, number)
        share = self.validation_fraction or how.fractions[1] / not_tested
        return splits.k_fold(items, number, how.fold, share, how.seed)

    def _listed(self, root: Path, items: list[Item]) -> list[Item]:
        """The items that the file lists name, one id a line, with their sections."""
        files, known = [root / name for name in self.file_lists], {item["id"] for item in items}
        sections = dict[str, str]()
        for section, file in zip(("train", "test"), files, strict=True):
            if not file.is_file():
                raise FileNotFoundError(f"File list {file} is missing: give both {files[0]} and {files[1]}, or none.")
            ids = {line.strip() for line in read_text(file).splitlines() if line.strip()}
            ids = {Path(name).stem if has_suffix(name, PICTURE_SUFFIXES) else name for name in ids}
            if wrong := ids - known or ids & sections.keys():
                what = f"names ids of {files[0].name}, too" if wrong <= known else "names ids without an image"
                raise ValueError(f"File list {file} {what}: {some(wrong)}. Correct it.")
            if not ids:
                raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
            sections |= dict.fromkeys(ids, section)
        if unlisted := known - sections.keys():
            logger.warning("Left out, in neither file list in %s: %s.", root, some(unlisted))
        return [{**item, "section": sections[item["id"]]} for item in items if item["id"] in sections]

    def official_in(self, root: Path) -> list[Found]:
        """Return what is there of each official section."""
        return [({"section": s}, _there(root, i), _there(root, m)) for s, (i, m) in self.official.items()]

    def columns_of(self, table: Path) -> dict[str, str | Sequence[str]]:
        """Return the columns of a table that are there by what they hold: those named, else those of usual names."""
        header = {name.lower(): name for name in table_rows(table)[0]}
        result: dict[str, str | Sequence[str]] = {}
        for what, usual in COLUMNS.items():
            if isinstance(named := self.columns.get(what, ""), str):
                names = [header[name] for name in ([named.lower()] if named else usual) if name in header]
                result |= {what: names[0]} if names else {}
            elif {name.lower() for name in named} <= header.keys():
                result[what] = [header[name.lower()] for name in named]
        return result

    def class_of(self, label: object) -> int | None:
        """Return the class of a label in a table, datalist or folder name, by name or else by value; None without."""
        names = {named(name): number for number, name in enumerate(self.classes)}
        names |= {named(alias): names[named(name)] for alias, name in self.aliases.items()}
        text = named(str(label).strip().removesuffix(".0"))
        is_value = text.isdecimal() and int(text) < len(self.classes) and not any(map(str.isdecimal, names))
        return names.get(text, int(text) if is_value else None)

    def text_of(self, label: int) -> str:
        """Return the name of an image's class, or those of its findings joined by "|"."""
        if self.kind == "classification":
            return self.classes[label]
        return "|".join(name for number, name in enumerate(self.classes) if label >> number & 1) or NO_FINDING

    def label_of(self, label: object) -> int | None:
        """Return the class of a label, or the number whose bits are the findings, names joined by "|" or "none"."""
        if self.kind != "multilabel":
            return self.class_of(label)
        if named(str(label)) in NO_FINDINGS:
            return 0
        numbers = [self.class_of(part) for part in str(label).split("|")]
        return None if None in numbers else sum({1 << number for number in numbers if number is not None})

    def _to_predict(self, item: Item) -> Item:
        """Return an item to predict, of a volume with what is wrong; a picture of other channels is a ValueError."""
        files = files_of(item["image"])
        item = {**item, "image": files[0] if len(files) == 1 else files}
        if not self.volumes:
            if len(files) != self.channels:
                raise ValueError(f"{files[0]} is one of {len(files)} channels, not {self.channels}: complete the case.")
            return item
        try:
            self._check_headers(files, [])
        except ValueError as error:
            item["problem"] = str(error)
        return item

    def _grouped(self, item: Item) -> Item:
        """Return an item with the group that is in its name, before names of several folders get those of these."""
        if group := group_in(item["id"], self.groups):
            return {**item, "group": group}
        wrong = f"The pattern {self.groups} finds no group in the name '{item['id']}': correct one."
        return {"problem": wrong, **item} if self.groups else item

    def _completed(self, item: Item) -> Item:
        """Return an item with its group and class, and with the first thing that is wrong with it under "problem"."""
        item = {**item, "group": item.get("group") or item["id"]}
        try:
            return item | self._checked(item)
        except ValueError as error:
            return {**item, "problem": str(error)}

    def _checked(self, item: Item) -> Item:
        """Return the label of an item if it is a class; what is wrong with the item is a ValueError."""
        images, masks = files_of(item["image"]), label_files(item) if self.masks else []
        for file in (*images, *masks):
            if (has_suffix(file, SUFFIXES) or Path(file).is_dir()) and is_volume(file) != self.volumes:
                kinds = ("volume", 2) if is_volume(file) else ("picture", 3)
                what = f"{file} is a {kinds[0]}, but {self.title} has {kinds[1]} dimensions"
                raise ValueError(f"{what}: take it out, or make a task of its own for such files.")
        if "problem" in item:
            raise ValueError(item["problem"])
        if not self.volumes and len(images) != self.channels:
            what = f"{images[0]} is one of {len(images)} channel(s), {self.title} has {self.channels}"
            raise ValueError(f"{what}: give each case a file for each of `channels`, or take it out.")
        if gone := [*(f for f in images if not Path(f).exists()), *(f for f in masks if not Path(f).is_file())]:
            raise ValueError(f"{gone[0]} is not there: correct its path or remove its case.")
        label = None if self.masks else self.label_of(item["label"])
        if label is None and not self.masks:
            one = "some, joined by |, or none," if self.kind == "multilabel" else "one"
            raise ValueError(f"{images[0]} has the label {item['label']!r}: use {one} of {', '.join(self.classes)}.")
        self._check_headers(images, masks)
        return {} if self.masks else {"label": label}

    def _check_headers(self, images: Sequence[str], masks: Sequence[str]) -> None:
        """Raise a ValueError if the headers of the files of one case do not fit each other."""
        image, *others = images
        if self.volumes:
            grid, count = case_grid(images)
            if count != self.channels:
                raise ValueError(f"{image} gives {count} channel(s), not {self.channels}: give all, or take it out.")
            if masks[1:]:
                raise ValueError(f"{masks[0]} and {masks[1]} are masks of one volume: keep one of them.")
            for file in masks:
                check_grid(file, volume_grid(file), grid)
            return
        (size, tag), *frames = map(picture_frame, (image, *others, *masks))
        for file, (found, own) in zip((*others, *masks), frames, strict=True):
            if found != size and not ((tag >= 5) != (own >= 5) and found == size[::-1]):
                same = f"{file} has another size than {image}: all channels of an image need one size."
                raise ValueError(other_size(file, found, size) if file in masks else same)


def _images_in(folder: Path) -> Iterator[Path]:
    """The visible images of a folder, by their names; none if it is not there."""
    return (file for file in folder.glob("[!.]*") if has_suffix(file, SUFFIXES) and file.is_file())


def _raw_in(layout: Described, root: Path) -> list[Found]:
    """The folders of nnU-Net's layout, if one has channels."""
    kinds = (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs"))
    found = [({"section": section}, root / images, root / labels) for section, images, labels in kinds]
    is_raw = (root / "dataset.json").is_file() and any(map(is_channel, _images_in(root / "imagesTr")))
    return [(section, i, m) for section, i, m in found if is_raw and i.is_dir() and m.is_dir()]


def _pairs_in(layout: Described, root: Path) -> list[Found]:
    """The folders of images and of masks in a folder, those of sections where they are there."""
    if not layout.masks:
        return []
    if there := [(section, i, m) for section, i, m in layout.official_in(root) if i and m]:
        return there
    if layout.strata:
        chosen = [({"class": i}, root / i, root / m) for i, m in layout.folders if (root / i).is_dir()]
        return chosen if len(chosen) > 1 else []
    found: dict[Path, Found] = {}
    names = layout.folders or [(i, m) for i in IMAGES for m in LABELS]
    for (section, place), (i, m) in itertools.product(_places(root), names):
        if (place / i).is_dir() and (place / m).is_dir():
            found.setdefault(place, (section, place / i, place / m))
    return [pair for place, pair in found.items() if place != root] or [*found.values()]


def _pairs(layout: Described, root: Path, found: list[Found], raw: bool = False) -> Iterator[Item]:
    """Images and masks of one name in two folders, in the data set's folder or in those of sections.

    Where masks have an ending, several of one image end in it and a number, such as ``_mask`` and ``_mask_1``. An image
    is one file or, ``raw`` as nnU-Net has them, one file per channel, such as ``case_0000.nii.gz``.
    """
    read = [folder for _, *folders in found for folder in folders]
    for folder in [place / name for _, place in _places(root) for name in (*IMAGES, *LABELS)]:
        if not (layout.folders or layout.official or folder in read):
            left_out(folder, [file.name for file in _images_in(folder)])
    for section, images, labels in found:
        if raw:
            cases, endings = [*channel_files(images).items()], [""]
        else:
            warn_of_deeper(images, series := series_folders(images))
            cases = [(file_id(file), {0: str(file)}) for file in (*originals(images, SUFFIXES), *series)]
            endings = [layout.mask_ending] if layout.mask_ending else [*ENDINGS]
        files, ids = image_files(labels, SUFFIXES), {name for name, _ in cases}
        ending = max(endings, key=lambda end: sum(file_id(mask).removesuffix(end) in ids for mask in files))
        of_mask = re.compile(rf"(.+){re.escape(ending)}(?:_\d+)?" if ending else "(.+)")
        masks = defaultdict[str, list[str]](list)
        for mask in files:
            if match := of_mask.fullmatch(file_id(mask)):
                masks[match[1]].append(str(mask))
        if images == labels and ending:
            cases = [case for case in cases if not of_mask.fullmatch(case[0])]
        needed = 1 if all(set(of_case) == {0} for _, of_case in cases) else len(names_of_channels(root))
        for name, of_case in cases:
            channels, own = [of_case[number] for number in sorted(of_case)], sorted(masks.get(name, []), key=natural)
            lost = [f"{name}_{number:04d}" for number in range(needed) if number not in of_case]
            item: Item = {"image": channels if len(channels) > 1 and not lost else channels[0], "id": name, **section}
            if lost:
                item["problem"] = f"{images} lacks {', '.join(lost)}: add the channel(s), or remove the case."
            elif len({file_id(Path(file)) for file in own}) < len(own):
                item["problem"] = f"{own[0]} and {own[1]} have the same name: keep one of them."
            elif own:
                item["label"] = own if len(own) > 1 else own[0]
            else:
                item["problem"] = f"{channels[0]} lacks a mask of the same name in {labels}: add it."
            yield item
        for name in sorted(masks.keys() - {name for name, _ in cases}, key=natural):
            problem = f"{masks[name][0]} lacks an image of its name, {images / name}: add it or remove the mask."
            yield {"image": str(images / name), "id": name, **section, "problem": problem}


def _class_folders(layout: Described, root: Path) -> list[tuple[dict[str, str], Path]]:
    """Section and folder of each class, if one has images."""
    places = [(s, f) for s, place in _places(root) if place.is_dir() for f in sorted(place.iterdir()) if f.is_dir()]
    found = [
        (s, f) for s, f in places if f.name not in (*IMAGES, *LABELS) and not _section(f.name) and f.name[0] != "."
    ]
    return found if not layout.masks and any(any(_images_in(folder)) for _, folder in found) else []


def _classes(layout: Described, root: Path, found: list[tuple[dict[str, str], Path]]) -> Iterator[Item]:
    """A folder of pictures per class, in the data set or its sections; folders per case are refused."""
    names = [[file_id(f) for f in _images_in(folder) if has_suffix(f, PICTURE_SUFFIXES)] for _, folder in found]
    masks = [[name for name in of if name in LABELS or name.endswith(ENDINGS[1:])] for of in names]
    known = any(layout.class_of(folder.name) is not None for _, folder in found)
    if not known and all(of and len(own) - len(of) == 1 for of, own in zip(masks, names, strict=True)):
        each = f"{found[0][1]} and the other folders in {root} hold one image with its mask"
        raise ValueError(f"{each}: put these into images/ and masks/, each with the name of its case.")
    for section, folder in found:
        warn_of_deeper(folder)
        for file in originals(folder, SUFFIXES):
            yield {"image": str(file), "label": folder.name, "id": file_id(file), **section}


def _datalists_in(layout: Described, root: Path) -> list[Path]:
    """The datalist in a folder: the file named, else each JSON with labelled entries."""
    files = [root / layout.file] if layout.file else sorted(root.glob("[!.]*.json"))
    return [f for f in files if f.is_file() and (layout.file or any("label" in entry for _, entry in _entries(f)))]


def _datalist(layout: Described, root: Path, found: list[Path]) -> Iterator[Item]:
    """The labelled entries of a datalist, with paths relative to it."""
    file = found[0]
    if found[1:]:
        names = some(other.name for other in found)
        raise ValueError(f'{root} holds several datalists, {names}: keep one, or name it by "file" in the layout.')
    for key, listed in _object(file).items():
        if not _section(key) and isinstance(listed, list) and any(isinstance(e, dict) and "label" in e for e in listed):
            logger.warning("%d entries of %s in %s are left out: that is no section.", len(listed), key, file)
    entries = _entries(file)
    sections, labelled = ({s for s, entry in entries if key in entry} for key in ("image", "label"))
    if not labelled:
        raise ValueError(f'{file} has no list "training" of "image" and "label": copy or write it again.')
    for section, entry in entries:
        if entry["image"] is None:
            raise ValueError(f'{file} has an entry without "image": {entry}. Complete it.')
        if section == "train" or section in labelled:
            image = _resolved(entry["image"], file.parent)
            item = _item(layout, entry, image, lambda label: _resolved(label, file.parent), file, "no label")
            yield item | ({"section": section} if len(sections) > 1 else {})


def _item(layout: Described, of: Item, image: Any, found: Callable[[Any], Any], file: Path, lacks: str) -> Item:
    """The item of a line of a table or an entry of a datalist, ``file``, with a problem where it ``lacks`` a label.

    ``of`` has "image", "label", "group", "section" and "fold" as they are written, ``found`` finds masks.
    """
    item: Item = {"image": image, "id": _stem(of["image"]), "group": of.get("group")}
    label, section, fold = of.get("label", ""), of.get("section"), of.get("fold")
    if section is not None:
        unknown = f"{file} gives '{of['image']}' no section: write {', '.join(SECTIONS)}."
        item |= {"section": _section(section)} if _section(section) else {"problem": unknown}
    if fold not in (None, ""):
        if not str(fold).removesuffix(".0").isdecimal():
            raise ValueError(f"{file} gives '{item['id']}' the fold {fold!r}: number the folds from 0.")
        item["fold"] = int(float(str(fold)))
    if isinstance(label, str) and label.lower() in NO_LABEL:
        return item | {"problem": f"{files_of(image)[0]} has {lacks}: complete or remove '{of['image']}' in {file}."}
    if layout.masks or not isinstance(label, list) or any(has_suffix(name, SUFFIXES) for name in files_of(label)):
        item["label"] = found(label) if layout.masks else label
    else:
        item["label"] = "|".join(map(str, label)) or NO_FINDING
    if (layout.masks and not files_of(label)) or (isinstance(label, list) and len(files_of(label)) < len(label)):
        item["problem"] = f"{file} gives '{item['id']}' the label {label}: write names of findings, or of masks."
    return item


def _tables_in(layout: Described, root: Path) -> list[Found]:
    """Section, folder of images and table of each official section of which one is there.

    Without an official table that is the file named, else all with a column of images and one of labels, of several
    each with the section of its name.
    """
    official = [found for found in layout.official_in(root) if any(found[1:])]
    if any(table for _, _, table in official):
        return official
    named = [root / layout.file] if layout.file else sorted(root.glob("[!.]*.[ct]sv"))
    fits = [] if layout.official else [file for file in named if file.is_file()]
    fits = [file for file in fits if {"image", "label"} <= layout.columns_of(file).keys()]
    return [({"section": _section(file.stem)} if len(fits) > 1 else {}, None, file) for file in fits]


def _table(layout: Described, root: Path, tables: list[Found]) -> Iterator[Item]:
    """The rows of tables; images lie beside them, in one of the usual folders or in that of the section.

    Ids are written with their suffix or without. All images in the folder of a section stand in its table. An official
    table of another section than training that lacks a column, as of labels that are kept back, is left out.
    """
    sections = [section.get("section", "train") for section, *_ in tables]
    if "" in sections or len(set(sections)) < len(sections):
        names = some(table.name for *_, table in tables if table)
        raise ValueError(f"{root} holds several tables of images, {names}: keep one, or train.csv, val.csv, test.csv.")
    for section, folder, table in tables:
        columns, (header, rows) = (layout.columns_of(table), table_rows(table)) if table else ({}, ([], []))
        if table and (lost := ({"image", "label"} | layout.columns.keys()) - columns.keys()):
            wanted = {str(name) for what in lost for name in np.ravel(layout.columns.get(what, what))}
            names = some(name for name in wanted if name.lower() not in map(str.lower, header))
            fault = f"{table} needs the column(s) {names}: it has {', '.join(header) or 'none'}."
            if section.get("section", "train") == "train":
                raise ValueError(fault)
            logger.warning("%s Its images are left out.", fault)
            continue
        if table is None or (layout.official and folder is None):
            missing = root / np.ravel(layout.official[section["section"]][1 if folder else 0])[0]
            raise FileNotFoundError(f"{missing} is missing: add it, or remove the rest of that section.")
        places, listed = [str(folder.relative_to(root))] if folder else [".", *IMAGES], set[str]()
        several = () if isinstance(columns["label"], str) else columns["label"]
        lacks = f"not 0 or 1 for each of {', '.join(several)}" if several else "no label"
        lacks += ", 1 for one at most, else 0" if several and layout.kind != "multilabel" else ""
        for row in filter(lambda row: any(row.values()), rows):
            of = {what: row[name] for what, name in columns.items() if isinstance(name, str)}
            of |= {"label": _single(layout, [row[name] for name in several])} if several else {}
            image = _found(root, of["image"], places)
            listed.add(image.name)
            item = _item(layout, of, str(image), lambda name: str(_found(root, name, [".", *LABELS])), table, lacks)
            yield section | item
        for file in originals(folder) if folder else ():
            if file.name not in listed:
                problem = f"{file} is an image that {table} does not name: remove it."
                yield {"image": str(file), "id": file_id(file), **section, "problem": problem}


def _single(layout: Described, cells: Sequence[str]) -> str:
    """The class whose cell is 1, the first class where none is; "" for other cells, or several. Or the findings."""
    values, several = [BINARY.get(cell) for cell in cells], layout.kind == "multilabel"
    if None in values or (values.count(1) > 1 and not several):
        return ""
    if several:
        return "|".join(name for name, value in zip(layout.classes, values, strict=True) if value) or NO_FINDING
    return layout.classes[1 + values.index(1) if 1 in values else 0]


def _there(root: Path, names: str | Sequence[str]) -> Path | None:
    """The first of some names that is there, within a folder that holds one of its own name the inner one."""
    names = [names] if isinstance(names, str) else names
    path = next((root / name for name in names if (root / name).exists()), None)
    return path / path.name if path and (path / path.name).is_dir() else path


FORMS: dict[str, tuple[Callable[..., Sequence[Any]], Callable[..., Iterator[Item]]]] = {
    "nnunet": (_raw_in, partial(_pairs, raw=True)),
    "datalist": (_datalists_in, _datalist),
    "pairs": (_pairs_in, _pairs),
    "table": (_tables_in, _table),
    "classes": (_class_folders, _classes),
}
"""What finds each form in a folder, and what reads it; the first one that is there counts."""


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, empty without the file or of another content."""
    content: Any = read_json(file)
    return content if isinstance(content, dict) else {}


def _entries(file: Path) -> list[tuple[str, Item]]:
    """The entries of a datalist with their sections; one without a path of an image has the image None."""
    found = []
    for key, entries in _object(file).items():
        for entry in entries if isinstance(entries, list) and _section(key) else ():
            told = {name.lower(): value for name, value in entry.items()} if isinstance(entry, dict) else {}
            image = (entry.get("image") if isinstance(entry, dict) else entry) or None
            of: Item = {"image": _resolved(image, Path()) if files_of(image) else None}
            if told.get("label") is not None and str(told["label"]).lower() not in NO_LABEL:
                groups = [str(told[name]) for name in COLUMNS["group"] if told.get(name) not in (None, "")]
                of |= {"label": told["label"], "fold": told.get("fold"), "group": groups[0] if groups else None}
            if not (of["image"] and _stem(of["image"]).startswith(".")):  # archives hold copies by macOS
                found.append((_section(key), of))
    return found


def names_of_values(root: Path) -> tuple[dict[int, str], dict[str, list[int]]]:
    """Names of mask values, sorted, and regions of several values, by nnU-Net's or the decathlon's dataset.json."""
    labels = _object(root / "dataset.json").get("labels")
    pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in labels.items()] if isinstance(labels, dict) else []
    of = [([int(v) for v in value] if isinstance(value, list) else [int(value)], str(name)) for value, name in pairs]
    single = {values[0]: name for values, name in of if len(values) == 1}
    regions = {name: values for values, name in of if len(values) > 1}
    every = sorted({value for values, _ in of for value in values})
    return {value: single.get(value, f"label {value}") for value in every}, regions


def names_of_channels(root: Path) -> list[str]:
    """Names of channels in their order, by nnU-Net's or the decathlon's dataset.json; empty without."""
    about = _object(root / "dataset.json")
    named = about.get("channel_names", about.get("modality"))
    return [str(named[number]) for number in sorted(named, key=natural)] if isinstance(named, dict) else []


def _section(name: str) -> str:
    """The section of a folder, list or cell, "" where its name is none."""
    return next((section for section, names in SECTIONS.items() if name.strip().lower() in names), "")


def _places(root: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """The folder itself and its folders of sections, with the section of each."""
    yield {}, root
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir() and (section := _section(folder.name)):
            yield {"section": section}, folder


def _named(items: Iterable[Item], root: Path) -> list[Item]:
    """Make ids unique: names, else paths; what still has the id of another has a problem."""
    listed = list(items)
    paths = [Path(os.path.relpath(files_of(item["image"])[0], root)) for item in listed]
    ids = ["_".join([*(part for part in p.parts[:-1] if part not in ("..", ".")), file_id(p)]) for p in paths]
    if len(set(ids)) > len({item["id"] for item in listed}):
        listed = [{**item, "id": name} for item, name in zip(listed, ids, strict=True)]
    seen, result = dict[str, str](), list[Item]()
    for item in listed:
        image, name = files_of(item["image"])[0], item["id"]
        if other := seen.get(name):
            twice = f"{image} is listed twice" if other == image else f"{other} and {image} have the same name"
            item = {"problem": f"{twice}: keep one of them.", **item}
        while name in seen:
            name += "'"
        seen[name] = image
        result.append({**item, "id": name})
    return result


def _stem(image: Any) -> str:
    return file_id(Path(files_of(image)[0].replace("\\", "/")))


def _resolved(value: Any, base: Path) -> Any:
    """Paths relative to a folder, in a text or a list; anything else as it is."""
    if isinstance(value, list):
        return [_resolved(part, base) for part in value]
    return str(base / value.replace("\\", "/")) if isinstance(value, str) else value


def _found(root: Path, name: str, folders: Sequence[str]) -> Path:
    """The file of a cell, in the folder itself or one of the usual ones, with its suffix or without."""
    name = name.replace("\\", "/")
    places = [root / folder / f"{name}{suffix}" for folder in folders for suffix in ("", *SUFFIXES)]
    there = next((place for kind in (Path.is_file, Path.is_dir) for place in places if name and kind(place)), None)
    if there is None or there.name == Path(name).name:
        return there or root / folders[0] / name
    if twins := [p.name for s in SUFFIXES if (p := there.parent / f"{Path(name).name}{s}") != there and p.is_file()]:
        raise ValueError(f"{name} can be {there} or {twins[0]}: write the names in the table with their endings.")
    return there


def named(name: str) -> str:
    """Return a name as labels are compared: lower case, without signs."""
    return "".join(c for c in name.lower() if c.isalnum()) or name


def listed_images(root: Path, places: Sequence[str], volumes: bool) -> list[Item]:
    """List the images to predict, {"image", "id"}: those of the first of some folders that has any, the root's last."""
    for folder in (root / name for name in (*places, ".")):
        folder = folder / folder.name if (folder / folder.name).is_dir() else folder
        if files := to_predict(folder, volumes) if folder.is_dir() else {}:
            return [{"image": str(files[name]), "id": name} for name in sorted(files, key=natural)]
    what, suffixes = ("volumes", VOLUME_SUFFIXES) if volumes else ("images", PICTURE_SUFFIXES)
    expected = f"{' or '.join(suffixes)} in {' or '.join(['it', *places])}"
    raise FileNotFoundError(f"No {what} to predict in {root}: expected {expected}.")


def _official_sections(items: Iterable[Item]) -> Sections:
    """Split items by their "section", which is dropped; a group stays in the latest section that has it.

    What would leak from test into validation or training, or from validation into training, is left out there.
    """
    sections, taken = {name: list[Item]() for name in SECTIONS}, set[str]()
    for item in sorted(items, key=lambda item: str(item["id"])):
        sections[item["section"]].append(splits.without(item, "section"))
    for name in reversed(SECTIONS):
        if lost := [item["id"] for item in sections[name] if item["group"] in taken]:
            logger.warning("Left out of %s, as the same images lie in a later section: %s.", name, some(lost))
        sections[name] = [item for item in sections[name] if item["group"] not in taken]
        taken |= {item["group"] for item in sections[name]}
    return sections["train"], sections["validation"], sections["test"]


def report_conflicts(items: Iterable[Item], name_of: Callable[[int], str]) -> None:
    """Warn of identical images with different classes; they stay, in one group."""
    members = defaultdict[str, list[Item]](list)
    for item in items:
        members[item["group"]].append(item)
    groups = [group for group in members.values() if len({item["label"] for item in group}) > 1]
    listed = "; ".join(", ".join(f"{item['id']} ({name_of(item['label'])})" for item in group) for group in groups)
    if groups:
        logger.warning("%d group(s) of identical images have conflicting labels: %s.", len(groups), listed)
