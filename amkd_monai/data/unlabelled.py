"""`--unlabelled FOLDER`: images without labels, used for distillation only."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.data import splits
from amkd_monai.data.datalist import Datalist
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.splits import Item
from amkd_monai.files import cases, names
from amkd_monai.files.dicom import patient_and_study
from amkd_monai.files.dicom_picture import SUFFIX, is_dicom_picture
from amkd_monai.files.names import files_of
from amkd_monai.storage import content_hashes, fingerprint
from amkd_monai.terminal import logger

OVERLAP = 46
"""Bits of 256 in which a further image differs at most from one of the validation or test section to be left out.

More than :data:`~amkd_monai.data.splits.NEAR`: copies that are shifted or rescaled by some pixels differ by up to 46,
and to leave out an image too many costs less than to train on a test image."""
COMPARED = 200  # images of each kind whose look is compared, evenly spaced
UNLIKE = 2.0  # standard deviations between labelled images by which the mean of the further ones may differ


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

    Args:
        datalist: the sections of the run.
        folders: folders whose own files are taken: pictures, also of DICOM (``.dcm``), or for a task on volumes NIfTI
            files and folders of one DICOM series, which the folder itself may be; None for none.
        teachers: of the run; further images are of no use where it is empty.
        cache_dir: keeps hashes.
        groups: regular expression whose first group is the name of an image's group, searched in the file's name, such
            as ``(.*)_\d+`` for slices of volumes.

    Raises:
        FileNotFoundError: a folder that is not there or holds no image of the task's kind.
        ValueError: no teachers, an expression that does not fit a name, or images that are all left out.
    """
    if not folders:
        return FurtherImages()
    if not teachers:
        raise ValueError("unlabelled images teach nothing without teachers: leave `unlabelled` out, or name teachers.")
    if datalist.task.channels and datalist.task.dimensions == 2:
        raise ValueError("unlabelled folders hold one file an image, this task has several channels: leave it out.")
    chosen = [names.expanded(folder) for folder in ([folders] if isinstance(folders, (str, os.PathLike)) else folders)]
    volumes = datalist.task.dimensions == 3
    items = [item for number, folder in enumerate(chosen) for item in _items(folder, f"unlabelled{number}", volumes)]
    found = len(items)
    others = [i for section in datalist.sections.values() for i in section if "problem" not in i]
    known = set(content_hashes([file for i in others for file in files_of(i["image"])], cache_dir))
    contents = content_hashes([i["image"] for i in items], cache_dir)
    items = [item for item, content in zip(items, contents, strict=True) if content not in known]
    copies = found - len(items)
    held_out = [i for i in (*datalist.validation, *datalist.test) if "problem" not in i]
    items = _unlike_held_out(items, held_out, cache_dir)
    near = found - copies - len(items)
    patients = _patients([*held_out, *items])
    theirs = {patients[file] for item in held_out for file in files_of(item["image"]) if file in patients}
    items = [item for item in items if patients.get(item["image"]) not in theirs]
    if not items:
        why = "are in this data set, look like its validation and test images, or are of their patients: give others"
        raise ValueError(f"All {found} images of {names.some(map(str, chosen))} {why}.")
    if groups is not None:
        items = [{**item, "group": _group_of(item, groups)} for item in items]
    else:
        items = [{**item, "group": patients.get(item["image"], item["id"])} for item in items]
        items = splits.group_near_duplicates(items, cache_dir=cache_dir)
    record = {
        "folders": [str(folder) for folder in chosen],
        "images": len(items),
        "groups": len({item["group"] for item in items}),
        "left_out": {
            "copies": copies,
            "like_validation_or_test": near,
            "of_their_patients": found - copies - near - len(items),
        },
    }
    logger.info("unlabelled images: %s", {key: value for key, value in record.items() if key != "folders"})
    return FurtherImages(items, record)


def _items(folder: Path, prefix: str, volumes: bool) -> list[Item]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: correct `unlabelled`.")
    kinds = {"pictures": (*names.PICTURE_SUFFIXES, SUFFIX), "volumes": names.VOLUME_SUFFIXES}
    what, other = ("volumes", "pictures") if volumes else ("pictures", "volumes")
    suffixes = kinds[what]
    files = names.images_to_predict(folder, suffixes)
    for series in [folder, *cases.series_folders(folder)] if volumes else ():
        if series != folder or cases.is_series(folder):
            name = names.file_id(series)
            files[f"{name}_" if name in files else name] = series
    if files:
        return [{"image": str(file), "id": f"{prefix}/{name}"} for name, file in files.items()]
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    below = [c.name for c in children if names.image_files(c, suffixes) or (volumes and cases.series_folders(c))]
    hint = "give a folder of them"
    if below:
        hint = f"give the folders below it that hold images without labels, of {names.some(below)}"
    elif names.image_files(folder, kinds[other]):
        hint = f"it holds {other}, and this task is on {what}"
    raise FileNotFoundError(f"{folder} holds no {what}: {hint}.")


def _unlike_held_out(items: list[Item], held_out: list[Item], cache_dir: str | Path | None) -> list[Item]:
    """The items that do not look nearly like one of the held-out images."""
    paths = [files_of(item["image"])[0] for item in [*held_out, *items]]
    hashes, indices = splits.perceptual_hashes(paths, cache_dir)
    pairs = ((indices[i], indices[j]) for i, j in splits.near_pairs(hashes, OVERLAP))
    near = {j - len(held_out) for i, j in pairs if i < len(held_out) <= j}
    return [item for number, item in enumerate(items) if number not in near]


def _patients(items: list[Item]) -> dict[str, str]:
    """The patient of each DICOM image by its path, in a form that tells no name; the study if all have one patient."""
    paths = [file for item in items for file in files_of(item["image"])]
    found = {p: patient_and_study(Path(p)) for p in paths if Path(p).is_dir() or is_dicom_picture(p)}
    known = len({patient for patient, _ in found.values()}) > 1
    named = {path: patient if known and patient else study for path, (patient, study) in found.items()}
    return {path: f"patient {fingerprint(name)[:16]}" for path, name in named.items() if name}


def _group_of(item: Item, expression: str) -> str:
    name = Path(item["image"]).name
    try:
        found = re.search(expression, name)
        of = found[1] if found else None
    except (re.error, IndexError) as error:
        raise ValueError(f"unlabelled_groups is {expression!r} ({error}): give an expression with a group.") from error
    if of is None:
        raise ValueError(f"unlabelled_groups, {expression!r}, does not fit the name {name}: correct it.")
    return f"{item['id'].partition('/')[0]}/{of}"


def look_unlike(dataset: DecodedDataset) -> str:
    """Say whether unlabelled samples look unlike the labelled ones, by grey level and contrast; empty if not."""
    labelled, further = np.flatnonzero(dataset.has_label), np.flatnonzero(~dataset.has_label)
    if not len(further) or len(labelled) < 2:
        return ""
    shown = [of[np.unique(np.linspace(0, len(of) - 1, COMPARED).astype(int))] for of in (labelled, further)]
    for name, figure in (("mean grey level", np.mean), ("contrast", np.std)):
        known, new = (np.array([figure(dataset.images[i]) for i in indices]) for indices in shown)
        if abs(new.mean() - known.mean()) > UNLIKE * max(float(known.std()), 1.0):
            figures = f"their {name} is {new.mean():.0f} of 255, that of the labelled ones {known.mean():.0f}"
            return f"The unlabelled images look unlike the labelled ones: {figures}. Check modality and window."
    return ""
