"""MSD Heart (Task02_Heart): left atrium in MRI, `Task02_Heart/{dataset.json,imagesTr,labelsTr,imagesTs}`.

Source: Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022,
http://medicaldecathlon.com. The archive holds macOS `._la_*.nii.gz` files next to the volumes, and two
training images (la_005, la_026) were seen to be byte-identical while their labels differ.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amkd_monai.data.splits import Item, Sections, group_identical_images, k_fold
from amkd_monai.tasks import TASKS

logger = logging.getLogger("amkd_monai")

VOLUME_SUFFIXES = (".nii.gz", ".nii")
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
        ValueError: a `dataset.json` that cannot be used, two volumes with one id, a damaged volume, or a
            label of another shape than its image.
    """
    root = Path(root)
    _check_layout(root)
    items: dict[str, Item] = {}
    for entry in _training_list(root / "dataset.json"):
        image, label = (root / entry[key] for key in ("image", "label"))
        if image.name.startswith("."):
            continue
        for file in (image, label):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is listed in {root / 'dataset.json'} but missing: unpack the archive again."
                )
        image_shape, label_shape = _shape(image), _shape(label)
        if image_shape != label_shape:
            raise ValueError(
                f"Label {label} has shape {label_shape} but its image has {image_shape}: replace one by the "
                "file of the original archive."
            )
        name = _volume_id(image)
        if name in items:
            raise ValueError(f"{root / 'dataset.json'} lists the volume '{name}' twice: keep one entry.")
        items[name] = {"image": str(image), "label": str(label), "id": name, "group": name}
    return group_identical_images(items.values())


def inference_items(root: Path) -> list[Item]:
    """List volumes without labels: `imagesTs`, else `imagesTr`, else the folder's own NIfTI files.

    The folders are read, not `dataset.json`, whose "test" list may be empty.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no such folder or no volume in it.
        ValueError: two files with one id.
    """
    root = Path(root)
    for folder in (root / "imagesTs", root / "imagesTr", root):
        if folder.is_dir() and (files := _volumes_by_id(folder)):
            return [{"image": str(file), "id": name} for name, file in files.items()]
    raise FileNotFoundError(
        f"No volumes to predict in {root}: expected {' or '.join(VOLUME_SUFFIXES)} files in it or in its "
        "folder imagesTs/ or imagesTr/."
    )


def split(
    root: Path,
    items: list[Item],
    *,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    folds: int = 5,
    fold: int = 0,
    seed: int = 0,
) -> Sections:
    """Split by cross-validation, as 20 labelled volumes are too few for one fixed test section.

    Args:
        root: not used.
        items: what `find_items` returned.
        fractions: not used.
        folds: number of folds.
        fold: the fold that becomes the test section.
        seed: seed of the folds.

    Returns:
        Train, validation and test items.
    """
    return k_fold(items, folds, fold, VALIDATION_FRACTION, seed)


def _check_layout(root: Path) -> None:
    """Raise one sentence that names the right folder if `root` is one level too high or too low."""
    if _has_layout(root):
        return
    fix = f"expected {LAYOUT}"
    if _has_layout(root.parent) and root.name in ("imagesTr", "labelsTr", "imagesTs"):
        fix += f"; you are one level too low, use {root.parent}"
    elif (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir():
        fix += "; dataset.json alone is missing, copy it from the archive"
    elif root.is_dir():
        below = [child for child in sorted(root.iterdir()) if _has_layout(child)]
        if below:
            fix += f"; you are one level too high, use {below[0]}"
    raise FileNotFoundError(f"No MSD Heart data in {root}: {fix}.")


def _has_layout(folder: Path) -> bool:
    return (folder / "dataset.json").is_file()


def _training_list(file: Path) -> list[dict[str, str]]:
    """Read the "training" entries of a `dataset.json`, each with "image" and "label"."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: copy it again from the archive.") from error
    entries = content.get("training") if isinstance(content, dict) else None
    if not entries or not all(isinstance(entry, dict) and {"image", "label"} <= entry.keys() for entry in entries):
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


def _volumes_by_id(folder: Path) -> dict[str, Path]:
    """Map id to NIfTI file, sorted by id; hidden files (such as macOS `._*`) are ignored."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.name.endswith(VOLUME_SUFFIXES) or not file.is_file():
            continue
        name = _volume_id(file)
        if name in files:
            raise ValueError(f"{files[name]} and {file} have the same id '{name}': keep one of them.")
        files[name] = file
    return dict(sorted(files.items()))


def _volume_id(file: Path) -> str:
    """`imagesTr/la_003.nii.gz` -> `la_003`."""
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _shape(file: Path) -> tuple[int, ...]:
    """Shape from the header, after a check that the file is not cut short."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        volume = nibabel.load(file)
        voxels_end = volume.dataobj.offset + math.prod(volume.shape) * volume.get_data_dtype().itemsize
        whole = _is_whole(file, voxels_end)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a NIfTI volume: replace it by an intact copy.") from error
    if not whole:
        raise ValueError(f"{file} ends before its last voxel: replace it by an intact copy.")
    return volume.shape


def _is_whole(file: Path, length: int) -> bool:
    """Whether `file` holds at least `length` bytes once it is uncompressed.

    A gzip file ends with its uncompressed length, so an intact file is seldom read to the end: only when
    that number differs, as it does after a cut and in files of several gzip members.
    """
    if file.suffix != ".gz":
        return file.stat().st_size >= length
    with file.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        if int.from_bytes(stream.read(4), "little") == length % 2**32:
            return True
    with gzip.open(file) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(2**22), b"")) >= length
