"""The layout of described data: folders of images and masks, datalists, nnU-Net's folders, class folders, tables."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    has_suffix,
    image_files,
    label_files,
    natural,
    originals,
    some,
    table_rows,
    warn_of_deeper,
    without_suffix,
)
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid
from amkd_monai.storage import read_json, read_text
from amkd_monai.terminal import logger

IMAGES = ("images", "imagesTr", "image", "imgs", "Imgs", "frames")
LABELS = ("masks", "labels", "labelsTr", "mask", "label", "annotations", "segmentations", "GT")
ENDINGS = ("", "_mask", "_seg", "_segmentation", "_label", "_labels", "_gt", "-mask", "-seg", "-label")
SECTIONS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""Names of folders, and of lists and cells in datalists and tables, by section; the case does not matter."""
COLUMNS = {
    "image": ("image", "path", "file", "filename", "image_path", "image_id", "image index", "id_code", "id"),
    "label": (
        *("label", "class", "diagnosis", "target", "mask", "mask_path", "segmentation", "label_path"),
        *("findings", "finding labels"),
    ),
    "group": (
        *("group", "patient", "patient_id", "patient id", "patientid"),
        *("subject", "subject_id", "subject id", "subjectid", "case_id"),
    ),
    "section": ("section", "split", "set", "subset"),
    "fold": ("fold",),
}
"""Columns of a table by the names they usually have, the image's first."""

FOLDS = 5
NO_FINDING, NO_FINDINGS = "none", ("none", "nofinding", "nofindings")
"""A label of an image without findings, and ways to write it."""
NO_LABEL = ("", "nan", "null", "n/a")
"""Cells of a label that say nothing, in lower case."""
BINARY = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
"""Cells that say whether something is there."""


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
    form: str = ""  # one of `READERS`
    # of "pairs": images and masks, of several the first two that are there; () for the usual names
    folders: Sequence[Sequence[str]] = ()
    normals: str = ""  # which of `folders` holds images without a lesion, which can be left out
    strata: bool = False  # all of `folders` are read; an item's "class" is the name of its folder of images
    # by section, the folder of images and that of masks, or the table; each may be several names, of which one is
    # there. They go before anything else; a section without masks is left out.
    official: Mapping[str, Sequence[str | Sequence[str]]] = field(default_factory=dict)
    file_lists: Sequence[str] = ()  # files of ids, training and test, which fix the sections if they are there
    # bits in which the perceptual hashes of one group differ at most, see
    # :func:`~amkd_monai.data.splits.group_near_duplicates`; None: a group has byte-identical images only
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
    def masks(self) -> bool:
        """Whether labels are masks."""
        return self.kind == "segmentation"

    def check(self, root: Path) -> None:
        """Raise a FileNotFoundError that names the right folder if ``root`` is one level too high or too low."""
        if self.form_of(root):
            return
        fix = f"expected {self.expected}"
        for table in sorted(root.glob("[!.]*.[ct]sv")) if root.is_dir() and not self.official else ():
            for what in sorted({"image", "label"} - self.columns_of(table).keys()):
                usual = ", ".join(self.columns.get(what) or COLUMNS[what])
                usual += f" or all of {', '.join(self.classes)}" if what == "label" and not self.masks else ""
                fix += f"; {table.name} has no column of the {what} ({usual})"
        if root.is_dir() and (below := [child for child in sorted(root.iterdir()) if self.form_of(child)]):
            fix += f"; you are one level too high, use {below[0]}"
        elif (above := self.form_of(root.parent)) and (above != "classes" or image_files(root)):
            fix += f"; you are one level too low, use {root.parent}"
        if any(root.rglob("*.dcm")):
            fix += "; of DICOM, pictures images/<case>.dcm with masks/<case>.png, or the slices of one series in "
            fix += "images/<case>/ with masks/<case>.nii.gz"
        raise FileNotFoundError(f"No {self.title} data in {root}: {fix}.")

    def form_of(self, root: Path) -> str:
        """Return the form of a folder, "" where it has none."""
        holds: dict[str, Callable[[], Any]] = {
            "nnunet": lambda: (root / "dataset.json").is_file() and channel_files(root / "imagesTr"),
            "datalist": lambda: self.datalists_in(root),
            "pairs": lambda: self.masks and self.pairs_in(root),
            "table": lambda: self.tables_in(root),
            "classes": lambda: not self.masks and any(image_files(f, SUFFIXES) for _, f in _class_folders(root)),
        }
        return next((form for form in ([self.form] if self.form else holds) if form in holds and holds[form]()), "")

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
        if not normals:
            self = replace(self, folders=[pair for pair in self.folders if pair[0] != self.normals])
        if folders is not None:
            if isinstance(folders, str) or len(folders) != 2:
                raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
            if absent := [root / name for name in folders if not (root / name).is_dir()]:
                raise FileNotFoundError(f"There is no folder {absent[0]}: correct `folders` or dataset_dir.")
            self = replace(self, form="pairs", folders=[folders], official={})
        self = replace(self, mask_ending=mask_ending or self.mask_ending)
        distance = self.duplicate_distance if duplicate_distance is None else duplicate_distance
        self.check(root)
        listed = map(self._grouped, READERS[self.form_of(root)](self, root))
        items = [self._completed(item) for item in _named(listed, root)]
        if not items:
            raise FileNotFoundError(f"No images in {root}: expected {self.expected}.")
        if not self.groups:
            items = splits.group_patients(items)
        usable = [item for item in items if "problem" not in item]
        of_class = defaultdict[object, set[str]](set)
        for item in usable if self.kind == "classification" else ():
            of_class[item["label"]].add(item["group"])
        one_each = all(len(groups) == 1 and min(groups).startswith(splits.PATIENT) for groups in of_class.values())
        if len(of_class) > 1 and one_each:
            what = f"Each class in {root} is of one DICOM patient or study, as folders of series are"
            raise ValueError(f"{what}: give each class images of several patients.")
        if distance is None:
            usable = sorted(usable, key=lambda item: item["id"])
            grouped = splits.joined(usable, splits.identical(usable))
        elif self.volumes:
            raise ValueError("duplicate_distance compares pictures, not volumes: leave it out.")
        else:
            grouped = splits.group_near_duplicates(usable, distance, cache_dir)
        if not self.masks and all(item["group"] == item["id"] for item in usable):
            report_conflicts(grouped, self.text_of)
        others = [item for item in items if "problem" in item]
        return sorted([*grouped, *others], key=lambda item: natural(item["id"]))

    def inference_items(self, root: Path) -> list[Item]:
        """List the images to predict: unlabelled ones of a datalist, those of the usual folders, tables and classes."""
        if files := self.datalists_in(root):
            file = files[0]
            further = [entry["image"] for _, entry in _entries(file) if "label" not in entry and entry["image"]]
            unlabelled = [_resolved(image, file.parent) for image in further]
            items = [{"image": i, "id": _stem(i)} for i in unlabelled if all(Path(f).exists() for f in files_of(i))]
            if items:
                return sorted(map(self._to_predict, _named(items, root)), key=lambda item: natural(item["id"]))
        for place in ("imagesTs", "."):
            found = channel_files(root / place) if place != "." or self.channels > 1 else {}
            items = [{"image": [found[c][n] for n in sorted(found[c])], "id": c} for c in sorted(found, key=natural)]
            if items:
                return list(map(self._to_predict, items))
        if self.strata and (folders := [root / images for images, _ in self.folders if (root / images).is_dir()]):
            return [item for folder in folders for item in listed_images(folder, self.predict_in, self.volumes)]
        if self.form_of(root) in ("classes", "table") and not self.official:
            return [{"image": i["image"], "id": i["id"]} for i in self.find_items(root) if "problem" not in i]
        return [self._to_predict(item) for item in listed_images(root, self.predict_in, self.volumes)]

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
        items, how = [splits.without(item, "fold") for item in items], replace(how, fold=0) if folds else how
        not_tested = sum(how.fractions[:2]) or 1
        is_official = how.folds is None and {"train", "test"} <= named
        number = None if is_official else how.folds or (FOLDS if self.validation_fraction else None)
        if number is None and how.fold:
            raise ValueError(f"fold is {how.fold}, but {root} is not split into folds: give `folds`, too.")
        if is_official:
            train, validation, test = _official_sections(items)
            if not validation:
                share = how.fractions[0] / not_tested
                train, validation, _ = splits.random_split(train, (share, 1 - share, 0), how.seed)
            return train, validation, test
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
            ids = {without_suffix(line.strip()) for line in read_text(file).splitlines() if line.strip()}
            if wrong := ids - known or ids & sections.keys():
                what = f"names ids of {files[0].name}, too" if wrong <= known else "names ids without an image"
                raise ValueError(f"File list {file} {what}: {some(wrong)}. Correct it.")
            if not ids:
                raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
            sections |= dict.fromkeys(ids, section)
        if unlisted := known - sections.keys():
            logger.warning("Left out, in neither file list in %s: %s.", root, some(unlisted))
        return [{**item, "section": sections[item["id"]]} for item in items if item["id"] in sections]

    def pairs_in(self, root: Path) -> list[tuple[dict[str, str], Path, Path]]:
        """Return section and folders of images and of masks in a folder, in those of sections where they are there."""
        official = [({"section": s}, _there(root, i), _there(root, m)) for s, (i, m) in self.official.items()]
        if there := [(section, i, m) for section, i, m in official if i and m]:
            return there
        if self.strata:
            chosen = [({"class": i}, root / i, root / m) for i, m in self.folders if (root / i).is_dir()]
            return chosen if len(chosen) > 1 else []
        names = self.folders or [(i, m) for i in IMAGES for m in LABELS]
        found = [
            next(((s, place / i, place / m) for i, m in names if (place / i).is_dir() and (place / m).is_dir()), None)
            for s, place in _places(root)
        ]
        in_sections = [pair for pair in found[1:] if pair]
        return in_sections or [pair for pair in found[:1] if pair]

    def datalists_in(self, root: Path) -> list[Path]:
        """Return the datalist in a folder: the file named, else each JSON with labelled entries."""
        files = [root / self.file] if self.file else sorted(root.glob("[!.]*.json"))
        files = [f for f in files if f.is_file() and (self.file or any("label" in entry for _, entry in _entries(f)))]
        return files if self.form in ("", "datalist") else []

    def tables_in(self, root: Path) -> list[tuple[dict[str, str], Path | None, Path | None]]:
        """Return section, table and folder of images of each official section of which one is there.

        Without an official table that is the file named, else all with a column of images and one of labels, of several
        each with the section of its name.
        """
        official = [({"section": s}, _there(root, table), _there(root, i)) for s, (i, table) in self.official.items()]
        if any(table for _, table, _ in official):
            return [found for found in official if any(found[1:])]
        named = [root / self.file] if self.file else sorted(root.glob("[!.]*.[ct]sv"))
        fits = [] if self.official else [file for file in named if file.is_file()]
        fits = [file for file in fits if {"image", "label"} <= self.columns_of(file).keys()]
        return [({"section": _section(file.stem)} if len(fits) > 1 else {}, file, None) for file in fits]

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
        number = names.get(text)
        if number is None and text.isdecimal() and int(text) < len(self.classes) and not any(map(str.isdecimal, names)):
            number = int(text)
        return number

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
        if self.volumes:
            return self._checked(item, files, [])
        if len(files) != self.channels:
            raise ValueError(f"{files[0]} is one of {len(files)} channels, not of {self.channels}: complete the case.")
        return item

    def _grouped(self, item: Item) -> Item:
        """Return an item with the group that is in its name, before names of several folders get those of these."""
        found = re.search(self.groups, item["id"]) if self.groups else None
        if self.groups and not (found and found.groups() and found[1]):
            return {
                "problem": f"The pattern {self.groups} finds no group in the name '{item['id']}': correct one.",
                **item,
            }
        return {**item, "group": found[1]} if found else item

    def _completed(self, item: Item) -> Item:
        """Return an item with its group, and with the first thing that is wrong with it under "problem"."""
        item = {**item, "group": item.get("group") or item["id"]}
        images, masks = files_of(item["image"]), label_files(item) if self.masks else []
        files = [*images, *masks]
        known = [file for file in files if has_suffix(file, SUFFIXES) or Path(file).is_dir()]
        gone = [file for file in files if not (Path.exists if file in images else Path.is_file)(Path(file))]
        if wrong := [file for file in known if is_volume(file) != self.volumes]:
            kinds = ("volume", 2) if is_volume(wrong[0]) else ("picture", 3)
            what = f"{wrong[0]} is a {kinds[0]}, but {self.title} has {kinds[1]} dimensions"
            item["problem"] = f"{what}: take it out, or make a task of its own for such files."
        elif "problem" in item:
            pass
        elif not self.volumes and len(images) != self.channels:
            problem = f"{images[0]} is one of {len(images)} channel(s), {self.title} has {self.channels}"
            item["problem"] = f"{problem}: give each case a file for each of `channels`, or take it out."
        elif gone:
            item["problem"] = f"{gone[0]} is not there: correct its path or remove its case."
        elif self.masks or (label := self.label_of(item["label"])) is not None:
            return self._checked(item if self.masks else {**item, "label": label}, images, masks)
        else:
            names = (
                f"{'some, joined by |, or none,' if self.kind == 'multilabel' else 'one'} of {', '.join(self.classes)}"
            )
            item["problem"] = f"{images[0]} has the label {item['label']!r}: use {names}."
        return item

    def _checked(self, item: Item, images: Sequence[str], masks: Sequence[str]) -> Item:
        """Return an item, with what is wrong with the headers of its files, if anything is, under "problem"."""
        image, *others = images
        try:
            if self.volumes:
                grid, count = case_grid(images)
                if count != self.channels:
                    raise ValueError(
                        f"{image} gives {count} channel(s), not {self.channels}: give all, or take it out."
                    )
                if masks[1:]:
                    raise ValueError(f"{masks[0]} and {masks[1]} are masks of one volume: keep one of them.")
                for file in masks:
                    check_grid(file, volume_grid(file), grid)
                return item
            (size, tag), *frames = map(picture_frame, (image, *others, *masks))
            for file, (found, own) in zip((*others, *masks), frames, strict=True):
                if found != size and not ((tag >= 5) != (own >= 5) and found == size[::-1]):
                    same = f"{file} has another size than {image}: all channels of an image need one size."
                    raise ValueError(other_size(file, found, size) if file in masks else same)
        except ValueError as error:
            return {**item, "problem": str(error)}
        return item


def _pairs(layout: Described, root: Path) -> Iterator[Item]:
    """Images and masks of one name in two folders, in the data set's folder or in those of sections.

    Where masks have an ending, several of one image end in it and a number, such as ``_mask`` and ``_mask_1``.
    """
    pairs = layout.pairs_in(root)
    read = [folder for _, *folders in pairs for folder in folders]
    usual = [place / name for _, place in _places(root) for name in (*IMAGES, *LABELS) if not layout.official]
    for folder in usual if not layout.folders else ():
        if folder not in read and folder.is_dir() and (left := image_files(folder, SUFFIXES)):
            logger.warning("%d file(s) in %s are left out: %s are read.", len(left), folder, some(map(str, read)))
    for section, *folders in pairs:
        warn_of_deeper(folders[0], series := series_folders(folders[0]))
        images, found = [*originals(folders[0], SUFFIXES), *series], image_files(folders[1], SUFFIXES)
        ids, masks = {file_id(image) for image in images}, defaultdict[str, list[str]](list)
        given = [layout.mask_ending] if layout.mask_ending else ENDINGS
        ending = max(given, key=lambda end: sum(file_id(mask).removesuffix(end) in ids for mask in found))
        of_mask = re.compile(rf"(.+){re.escape(ending)}(?:_\d+)?" if ending else "(.+)")
        for mask in found:
            if match := of_mask.fullmatch(file_id(mask)):
                masks[match[1]].append(str(mask))
        if folders[0] == folders[1] and ending:
            images = [image for image in images if not of_mask.fullmatch(file_id(image))]
        for image in images:
            item, files = {"image": str(image), "id": file_id(image), **section}, masks.get(file_id(image), [])
            if len({file_id(Path(file)) for file in files}) < len(files):
                yield {**item, "problem": f"{files[0]} and {files[1]} have the same name: keep one of them."}
            elif files:
                files.sort(key=natural)
                yield {**item, "label": files if len(files) > 1 else files[0]}
            else:
                yield {**item, "problem": f"{image} lacks a mask of the same name in {folders[1]}: add it."}
        for name in sorted(masks.keys() - {file_id(image) for image in images}, key=natural):
            problem = f"{masks[name][0]} lacks an image of its name, {folders[0] / name}: add it or remove the mask."
            yield {"image": str(folders[0] / name), "id": name, **section, "problem": problem}


def _datalist(layout: Described, root: Path) -> Iterator[Item]:
    """The labelled entries of a datalist, with paths relative to it."""
    file, *others = layout.datalists_in(root)
    if others:
        names = some(found.name for found in (file, *others))
        raise ValueError(f'{root} holds several datalists, {names}: keep one, or name it by "file" in the layout.')
    entries = _entries(file)
    sections, labelled = ({s for s, entry in entries if key in entry} for key in ("image", "label"))
    for key, listed in _object(file).items():
        if not _section(key) and isinstance(listed, list) and any(isinstance(e, dict) and "label" in e for e in listed):
            logger.warning("%d entries of %s in %s are left out: that is no section.", len(listed), key, file)
    if not any("label" in entry for _, entry in entries):
        raise ValueError(f'{file} has no list "training" of "image" and "label": copy or write it again.')
    for section, entry in entries:
        place = {"section": section} if len(sections) > 1 else {}
        if entry["image"] is None:
            raise ValueError(f'{file} has an entry without "image": {entry}. Complete it.')
        if "label" not in entry:
            if section == "train" or section in labelled:
                (image, *_), problem = files_of(entry["image"]), f"has no label in {file}: add it, or remove the entry."
                path = str(file.parent / image)
                yield {"image": path, "id": _stem(path), **place, "problem": f"{image} {problem}"}
            continue
        label = _resolved(entry["label"], file.parent) if layout.masks else entry["label"]
        item = {"image": _resolved(entry["image"], file.parent), "label": label, "id": _stem(entry["image"]), **place}
        if not layout.masks and isinstance(label, list) and not any(has_suffix(f, SUFFIXES) for f in files_of(label)):
            item["label"] = "|".join(map(str, label)) or NO_FINDING
            if not all(isinstance(name, str) for name in label):
                item["problem"] = f"{file} gives '{item['id']}' the label {label}: write the names of its findings."
        known = {key.lower(): value for key, value in entry.items()}
        item |= next(({"group": str(known[key])} for key in COLUMNS["group"] if known.get(key) not in (None, "")), {})
        yield item if entry.get("fold") is None else _of_fold(item, entry["fold"], file)


def _nnunet(layout: Described, root: Path) -> Iterator[Item]:
    """nnU-Net's raw folder: one file per case and channel, such as ``case_0000.nii.gz``, and one label per case."""
    names = names_of_channels(root)
    for section, images, labels in (("train", "imagesTr", "labelsTr"), ("test", "imagesTs", "labelsTs")):
        if not (root / labels).is_dir() or not (root / images).is_dir():
            continue
        found, masks = channel_files(root / images), {file_id(f): str(f) for f in image_files(root / labels, SUFFIXES)}
        needed = 1 if all(set(of_case) == {0} for of_case in found.values()) else len(names)
        for case in sorted(found.keys() | masks.keys()):
            files = found.get(case, {})
            item: Item = {"image": [files[c] for c in sorted(files)], "id": case, "section": section}
            item["image"] = item["image"][0] if needed == len(files) == 1 else item["image"]
            if missing := [f"{case}_{c:04d}" for c in range(needed) if c not in files]:
                item["image"] = next(iter(files.values()), str(root / images / case))
                item["problem"] = f"{root / images} lacks {', '.join(missing)}: add the channel(s), or remove the case."
            elif case not in masks:
                item["problem"] = f"{root / labels} lacks a label of the case {case}: add it, or remove its images."
            yield item | ({"label": masks[case]} if case in masks else {})


def _classes(layout: Described, root: Path) -> Iterator[Item]:
    """A folder of pictures per class, in the data set's folder or in those of sections."""
    for section, folder in _class_folders(root):
        warn_of_deeper(folder)
        for file in originals(folder, SUFFIXES):
            yield {"image": str(file), "label": folder.name, "id": file_id(file), **section}


def _table(layout: Described, root: Path) -> Iterator[Item]:
    """The rows of tables; images lie beside them, in one of the usual folders or in that of the section.

    Ids are written with their suffix or without. All images in the folder of a section stand in its table. An official
    table of another section than training that lacks a column, as of labels that are kept back, is left out.
    """
    tables = layout.tables_in(root)
    sections = [section.get("section", "train") for section, *_ in tables]
    if "" in sections or len(set(sections)) < len(sections):
        names = some(table.name for _, table, _ in tables if table)
        raise ValueError(f"{root} holds several tables of images, {names}: keep one, or train.csv, val.csv, test.csv.")
    for section, table, folder in tables:
        columns = layout.columns_of(table) if table else {}
        if table and (lost := sorted(({"image", "label"} | layout.columns.keys()) - columns.keys())):
            header = table_rows(table)[0]
            wanted = {str(name) for what in lost for name in np.ravel(layout.columns.get(what, what))}
            names = some(wanted - {name for name in wanted if name.lower() in map(str.lower, header)})
            fault = f"{table} needs the column(s) {names}: it has {', '.join(header) or 'none'}."
            if section.get("section", "train") == "train":
                raise ValueError(fault)
            logger.warning("%s Its images are left out.", fault)
            continue
        if table is None or (layout.official and folder is None):
            missing = root / np.ravel(layout.official[section["section"]][1 if folder else 0])[0]
            raise FileNotFoundError(f"{missing} is missing: add it, or remove the rest of that section.")
        places, listed = [str(folder.relative_to(root))] if folder else [".", *IMAGES], set[str]()
        for row in table_rows(table)[1]:
            if not any(row.values()):
                continue
            of = {what: row[name] for what, name in columns.items() if isinstance(name, str)}
            image = _found(root, of["image"], places)
            item = {"image": str(image), "id": _stem(of["image"]), "group": of.get("group"), **section}
            listed.add(image.name)
            label = of["label"] if "label" in of else _single(layout, [row[name] for name in columns["label"]])
            if label.lower() in NO_LABEL:
                several = f"not 0 or 1 for each of {', '.join(columns['label'])}"
                several += "" if layout.kind == "multilabel" else ", 1 for one at most, else 0"
                cells = "no label" if "label" in of else several
                yield {**item, "problem": f"{table} gives '{of['image']}' {cells}: complete or remove the line."}
                continue
            item["label"] = str(_found(root, label, [".", *LABELS])) if layout.masks else label
            if "section" in of:
                found = _section(of["section"])
                unknown = {"problem": f"{table} gives '{image}' no section: write {', '.join(SECTIONS)}."}
                item |= {"section": found} if found else unknown
            yield _of_fold(item, of["fold"], table) if of.get("fold") else item
        for file in originals(folder) if folder else ():
            if file.name not in listed:
                problem = f"{file} is an image that {table} does not name: remove it."
                yield {"image": str(file), "id": file_id(file), **section, "problem": problem}


def _of_fold(item: Item, fold: object, file: Path) -> Item:
    """An item with its fold, as a datalist or a table gives it."""
    if not str(fold).removesuffix(".0").isdecimal():
        raise ValueError(f"{file} gives '{item['id']}' the fold {fold!r}: number the folds from 0.")
    return {**item, "fold": int(float(str(fold)))}


def _single(layout: Described, cells: Sequence[str]) -> str:
    """The class whose cell is 1, the first class where none is; "" for other cells, or several. Or the findings."""
    values = [BINARY.get(cell) for cell in cells]
    if layout.kind == "multilabel":
        present = [name for name, value in zip(layout.classes, values, strict=True) if value]
        return "" if None in values else "|".join(present) or NO_FINDING
    if None in values or values.count(1) > 1:
        return ""
    return layout.classes[1 + values.index(1) if 1 in values else 0]


def _there(root: Path, names: str | Sequence[str]) -> Path | None:
    """The first of some names that is there, within a folder that holds one of its own name the inner one."""
    names = [names] if isinstance(names, str) else names
    path = next((root / name for name in names if (root / name).exists()), None)
    return path / path.name if path and (path / path.name).is_dir() else path


READERS: dict[str, Callable[[Described, Path], Iterator[Item]]] = {
    "pairs": _pairs,
    "datalist": _datalist,
    "nnunet": _nnunet,
    "classes": _classes,
    "table": _table,
}


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, empty without the file or of another content."""
    content: Any = read_json(file)
    return content if isinstance(content, dict) else {}


def _entries(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a datalist with their sections; one without a path of an image has the image None."""
    found = []
    for key, entries in _object(file).items():
        for entry in entries if isinstance(entries, list) and _section(key) else ():
            entry = {"image": None, **entry} if isinstance(entry, dict) else {"image": entry}
            if entry.get("label") is None or str(entry["label"]).lower() in NO_LABEL:
                entry.pop("label", None)
            entry["image"] = _resolved(entry["image"], Path()) if files_of(entry["image"]) else None
            if not (entry["image"] and _stem(entry["image"]).startswith(".")):  # archives hold copies by macOS
                found.append((_section(key), entry))
    return found


def names_of_values(root: Path) -> tuple[dict[int, str], dict[str, list[int]]]:
    """Names of mask values, sorted, and regions of several values, by nnU-Net's or the decathlon's dataset.json."""
    file = root / "dataset.json"
    labels = _object(file).get("labels")
    pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in labels.items()] if isinstance(labels, dict) else []
    of = [([int(v) for v in value] if isinstance(value, list) else [int(value)], str(name)) for value, name in pairs]
    single = {values[0]: name for values, name in of if len(values) == 1}
    regions = {name: values for values, name in of if len(values) > 1}
    every = sorted({value for values, _ in of for value in values})
    return {value: single.get(value, f"label {value}") for value in every}, regions


def names_of_channels(root: Path) -> list[str]:
    """Names of channels in their order, by nnU-Net's or the decathlon's dataset.json; empty without."""
    file = root / "dataset.json"
    about = _object(file)
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


def _class_folders(root: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """Section and folder of each class."""
    for section, place in _places(root):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            named = folder.name in (*IMAGES, *LABELS) or folder.name.startswith(".") or _section(folder.name)
            if folder.is_dir() and not named:
                yield section, folder


def _named(items: Iterable[Item], root: Path) -> list[Item]:
    """Make ids unique: names, else paths; what still has the id of another has a problem."""
    listed = list(items)
    paths = [Path(os.path.relpath(files_of(item["image"])[0], root)) for item in listed]
    ids = ["_".join([*(part for part in p.parts[:-1] if part not in ("..", ".")), file_id(p)]) for p in paths]
    if len(set(ids)) > len({item["id"] for item in listed}):
        listed = [{**item, "id": name} for item, name in zip(listed, ids, strict=True)]
    seen: dict[str, str] = {}
    result: list[Item] = []
    for item in listed:
        image, name = files_of(item["image"])[0], item["id"]
        if other := seen.get(name):
            twice = f"{image} is listed twice" if other == image else f"{other} and {image} have the same name"
            item = {**item, "problem": item.get("problem", f"{twice}: keep one of them.")}
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
    sections: dict[str, list[Item]] = {name: [] for name in SECTIONS}
    for item in sorted(items, key=lambda item: str(item["id"])):
        sections[item["section"]].append(splits.without(item, "section"))
    taken: set[str] = set()
    for name in reversed(SECTIONS):
        if lost := [item["id"] for item in sections[name] if item["group"] in taken]:
            logger.warning("Left out of %s, as the same images lie in a later section: %s.", name, some(lost))
        sections[name] = [item for item in sections[name] if item["group"] not in taken]
        taken |= {item["group"] for item in sections[name]}
    return sections["train"], sections["validation"], sections["test"]


def report_conflicts(items: Iterable[Item], name_of: Callable[[int], str]) -> None:
    """Warn of identical images with different classes; they stay, in one group."""
    members: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[item["group"]].append(item)
    groups = [group for group in members.values() if len({item["label"] for item in group}) > 1]
    listed = "; ".join(", ".join(f"{item['id']} ({name_of(item['label'])})" for item in group) for group in groups)
    if groups:
        logger.warning("%d group(s) of identical images have conflicting labels: %s.", len(groups), listed)
