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
from amkd_monai.data.decoded import DecodedImages
from amkd_monai.data.splits import Item
from amkd_monai.files import names
from amkd_monai.files.names import files_of
from amkd_monai.storage import content_hashes
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

    Left out are copies (equal bytes) of an image of any section, and pictures that look nearly like one of validation
    or test. Pictures that look alike are one group; groups, not images, are drawn equally often.

    Args:
        datalist: the sections of the run.
        folders: folders whose own files are taken: pictures, or NIfTI volumes for a task on volumes; None for none.
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
    others = [i for section in datalist.sections.values() for i in section]
    known = set(content_hashes([file for i in others for file in files_of(i["image"])], cache_dir))
    contents = content_hashes([i["image"] for i in items], cache_dir)
    items = [item for item, content in zip(items, contents, strict=True) if content not in known]
    copies = found - len(items)
    if not volumes:
        items = _unlike_held_out(items, [*datalist.validation, *datalist.test], cache_dir)
    near = found - copies - len(items)
    if not items:
        raise ValueError(f"All {found} images of {names.some(map(str, chosen))} are in this data set: give others.")
    if groups is not None:
        items = [{**item, "group": _group_of(item, groups)} for item in items]
    elif volumes:
        items = splits.group_identical_images(items)
    else:
        items = splits.group_near_duplicates(items, cache_dir=cache_dir)
    record = {
        "folders": [str(folder) for folder in chosen],
        "images": len(items),
        "groups": len({item["group"] for item in items}),
        "left_out": {"copies": copies, "like_validation_or_test": near},
    }
    logger.info("unlabelled images: %s", {key: value for key, value in record.items() if key != "folders"})
    return FurtherImages(items, record)


def _items(folder: Path, prefix: str, volumes: bool) -> list[Item]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: correct `unlabelled`.")
    kinds = {"pictures": names.PICTURE_SUFFIXES, "NIfTI volumes": names.VOLUME_SUFFIXES}
    what, other = ("NIfTI volumes", "pictures") if volumes else ("pictures", "NIfTI volumes")
    suffixes = kinds[what]
    if files := names.images_to_predict(folder, suffixes):
        return [{"image": str(file), "id": f"{prefix}/{name}"} for name, file in files.items()]
    below = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and names.image_files(child, suffixes)]
    hint = "give a folder of them"
    if below:
        hint = f"give the folders below it that hold images without labels, of {names.some(below)}"
    elif names.image_files(folder, kinds[other]):
        hint = f"it holds {other}, and this task is on {what}"
    raise FileNotFoundError(f"{folder} holds no {what}: {hint}.")


def _unlike_held_out(items: list[Item], held_out: list[Item], cache_dir: str | Path | None) -> list[Item]:
    """The items that do not look nearly like one of the held-out images."""
    paths = [item["image"] for item in [*held_out, *items]]
    hashes, indices = splits.perceptual_hashes(paths, cache_dir)
    pairs = ((indices[i], indices[j]) for i, j in splits.near_pairs(hashes, OVERLAP))
    near = {j - len(held_out) for i, j in pairs if i < len(held_out) <= j}
    return [item for number, item in enumerate(items) if number not in near]


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


def look_unlike(dataset: DecodedImages) -> str:
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
