"""MSD Heart (Task02_Heart): left atrium in MRI, `Task02_Heart/{dataset.json,imagesTr,labelsTr,imagesTs}`.

Source: Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022,
http://medicaldecathlon.com. The archive holds macOS `._la_*.nii.gz` files next to the volumes, and two
training images (la_005, la_026) were seen to be byte-identical while their labels differ.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from amkd_monai.data.duplicates import group_identical_images
from amkd_monai.data.layout import check_layout, mark_problem, plain_items, volume_problem
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, k_fold
from amkd_monai.files.names import VOLUME_SUFFIXES, file_id, read_text
from amkd_monai.tasks import TASKS

logger = logging.getLogger("amkd_monai")

LAYOUT = "dataset.json with the folders imagesTr/ and labelsTr/ beside it"


VALIDATION_FRACTION = 0.1
"""Share of the cases outside the test fold that choose the checkpoint; labelled volumes are few."""


def find_items(root: Path) -> list[Item]:
    """List the training volumes and labels that `dataset.json` names; headers and file lengths are checked.

    Args:
        root: the folder that holds `dataset.json`.

    Returns:
        Items sorted by id; byte-identical images share a group, any other volume is its own group.

    Raises:
        FileNotFoundError: `root` has not the layout, or a listed file is missing.
        ValueError: a `dataset.json` that cannot be used, or two volumes with one id.
    """
    root = Path(root)
    check_layout(root, "MSD Heart", LAYOUT, _has_layout, ("imagesTr", "labelsTr", "imagesTs"), _json_is_missing)
    items: dict[str, Item] = {}
    for entry in _training_list(root / "dataset.json"):
        image, label = (root / entry[key].replace("\\", "/") for key in ("image", "label"))
        if image.name.startswith("."):
            continue
        for file in (image, label):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is listed in {root / 'dataset.json'} but missing: unpack the archive again."
                )
        name = file_id(image)
        if name in items:
            raise ValueError(f"{root / 'dataset.json'} lists the volume '{name}' twice: keep one entry.")
        items[name] = {"image": str(image), "label": str(label), "id": name, "group": name}
        mark_problem(items[name], volume_problem(image, [label]))
    return group_identical_images(items.values())


def inference_items(root: Path) -> list[Item]:
    """List volumes without labels: `imagesTs`, else `imagesTr`, else the folder's own NIfTI files.

    The folders are read, not `dataset.json`, whose "test" list may be empty.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no such folder or no volume in it.
    """
    root = Path(root)
    return plain_items((root / "imagesTs", root / "imagesTr", root), "volumes", VOLUME_SUFFIXES)


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Split by cross-validation, as 20 labelled volumes are too few for one fixed test section."""
    return k_fold(items, how.folds, how.fold, VALIDATION_FRACTION, how.seed)


def _json_is_missing(root: Path) -> str:
    alone = (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir()
    return "dataset.json alone is missing, copy it from the archive" if alone else ""


def _has_layout(folder: Path) -> bool:
    return (folder / "dataset.json").is_file()


def _training_list(file: Path) -> list[dict[str, str]]:
    """Read the "training" entries of a `dataset.json`, each with "image" and "label"."""
    try:
        content = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: copy it again from the archive.") from error
    entries = content.get("training") if isinstance(content, dict) else None
    if not entries or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("image", "label"))
        for entry in entries
    ):
        raise ValueError(
            f'{file} has no list "training" of entries with "image" and "label": copy it again from the archive.'
        )
    _warn_about_other_labels(content, file)
    return entries


def _warn_about_other_labels(content: dict[str, Any], file: Path) -> None:
    """All decathlon tasks share one layout: say so when the labels are those of another one."""
    labels = content.get("labels")
    expected = TASKS["msd_heart"].classes
    found = tuple(str(labels[key]).lower() for key in sorted(labels)) if isinstance(labels, dict) else expected
    if found != expected:
        logger.warning("%s names the classes %s, expected %s: is this the heart task?", file, found, expected)
