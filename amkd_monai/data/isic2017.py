"""ISIC 2017, part 3: melanoma, seborrheic keratosis and nevus in dermoscopic images.

Source: Codella et al., "Skin Lesion Analysis Toward Melanoma Detection", ISBI 2017, https://challenge.isic-archive.com.
Layout, for Training, Validation and Test_v2: `ISIC-2017_<section>_Data/ISIC_XXXXXXX.jpg` with a metadata table and
`_superpixels.png` files among the images, and `ISIC-2017_<section>_Part3_GroundTruth.csv` (image_id, melanoma,
seborrheic_keratosis) with floats; an image with 0.0, 0.0 is a nevus.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from amkd_monai.data.duplicates import group_identical_images
from amkd_monai.data.layout import check_ids, given_sections, plain_items, report_conflicts
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, k_fold
from amkd_monai.files.names import files_by_id, read_table, some
from amkd_monai.tasks import get_task

logger = logging.getLogger("amkd_monai")

OFFICIAL = {"train": "Training", "validation": "Validation", "test": "Test_v2"}
COLUMNS = ("image_id", "melanoma", "seborrheic_keratosis")
BESIDE = ("_superpixels", "_segmentation")
"""Endings of files that lie beside images and are none."""
LAYOUT = "ISIC-2017_Training_Data/ISIC_XXXXXXX.jpg and ISIC-2017_Training_Part3_GroundTruth.csv"


def find_items(root: Path) -> list[Item]:
    """List all images that a part 3 table names.

    Args:
        root: the folder that holds the official folders and tables.

    Returns:
        Items sorted by id, with their official "section"; byte-identical images share a group.

    Raises:
        FileNotFoundError: `root` has not the layout, or a table names ids without an image.
        ValueError: a table lacks columns, holds row numbers for ids, or labels that are not 0.0 or 1.0 or both 1.0; or
            an image is in no table.
    """
    root = Path(root)
    check_layout(root)
    items: list[Item] = []
    for section, name in OFFICIAL.items():
        table, folder = root / f"ISIC-2017_{name}_Part3_GroundTruth.csv", image_folder(root, name)
        if folder is None and not table.is_file():
            continue
        if folder is None or not table.is_file():
            missing = table if folder is not None else root / f"ISIC-2017_{name}_Data"
            raise FileNotFoundError(f"{missing} is missing: add it, or remove the rest of that section.")
        rows, images = read_table(table, COLUMNS), files_by_id(folder, beside=BESIDE)
        _check_official_ids(rows, table)
        check_ids(rows, images, table, folder)
        items += [
            {"image": str(images[i]), "label": _class_of(row, table), "id": i, "group": i, "section": section}
            for i, row in rows.items()
        ]
    grouped = group_identical_images(items)
    report_conflicts(grouped, get_task("isic2017").classes)
    return grouped


def inference_items(root: Path) -> list[Item]:
    """List images without labels: those of the last official section that is there, otherwise the folder's own.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no image in it.
    """
    root = Path(root)
    official = [f for name in reversed(OFFICIAL.values()) if (f := image_folder(root, name)) is not None]
    return plain_items([*official, root])


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Split as officially (2000/150/600) if all three sections are there, otherwise into folds stratified by class."""
    if {item["section"] for item in items} == set(OFFICIAL):
        return given_sections(items)
    logger.info(
        "%s lacks official sections: fold %d of %d of what there is, stratified by class.", root, how.fold, how.folds
    )
    return k_fold(
        [{k: v for k, v in item.items() if k != "section"} for item in items], how.folds, how.fold, seed=how.seed
    )


def check_layout(root: Path) -> None:
    """Raise one sentence that names the right folder if `root` is one level too high or too low.

    Raises:
        FileNotFoundError: no official folder of images lies in `root`.
    """
    if _has_layout(root):
        return
    fix = f"expected {LAYOUT}"
    if _has_layout(root.parent):
        fix += f"; you are one level too low, use {root.parent}"
    elif root.is_dir() and (below := [child for child in sorted(root.iterdir()) if _has_layout(child)]):
        fix += f"; you are one level too high, use {below[0]}"
    raise FileNotFoundError(f"No ISIC 2017 data in {root}: {fix}.")


def image_folder(root: Path, name: str) -> Path | None:
    """Folder of images of an official section, which may lie in a folder of the same name; None if there is none."""
    folder = root / f"ISIC-2017_{name}_Data"
    inner = folder / folder.name
    return inner if inner.is_dir() else folder if folder.is_dir() else None


def _has_layout(root: Path) -> bool:
    return any(image_folder(root, name) is not None for name in OFFICIAL.values())


def _check_official_ids(rows: dict[str, dict[str, str]], table: Path) -> None:
    """Some copies of the tables in circulation have row numbers in place of ids."""
    wrong = [name for name in rows if re.fullmatch(r"ISIC_\d{7}", name) is None]
    if wrong:
        numbers = " (row numbers)" if all(name.isdigit() for name in wrong) else ""
        raise ValueError(
            f"{table} has ids that are not ISIC_ and 7 digits{numbers}: {some(wrong, 3)}; use the official file."
        )


def _class_of(row: dict[str, str], table: Path) -> int:
    """0 nevus, 1 melanoma, 2 seborrheic keratosis, from two columns of floats."""
    flags = []
    for column in COLUMNS[1:]:
        if row[column] not in ("0", "0.0", "1", "1.0"):
            raise ValueError(f"{table} gives '{row['image_id']}' {column} '{row[column]}': expected 0.0 or 1.0.")
        flags.append(row[column].startswith("1"))
    if all(flags):
        raise ValueError(f"{table} calls '{row['image_id']}' melanoma and seborrheic keratosis: use the official file.")
    return 1 if flags[0] else 2 if flags[1] else 0
