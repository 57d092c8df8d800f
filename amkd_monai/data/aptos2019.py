"""APTOS 2019: grades 0 to 4 of diabetic retinopathy in fundus photographs.

Source: Kaggle, "APTOS 2019 Blindness Detection", https://www.kaggle.com/c/aptos2019-blindness-detection. Read are

- the original: `train.csv` (id_code, diagnosis) and `train_images/<id_code>.png`; `test.csv` has no grades;
- the re-split of the same images: three tables with grades (`train_1.csv` or `train.csv`, `valid.csv`, `test.csv`)
  and `train_images/`, `val_images/`, `test_images/`, each of which may hold a folder of its own name;
- class folders: `<class>/*.png`, or `train|valid|test/<class>/*.png`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from amkd_monai.data.duplicates import group_identical_images
from amkd_monai.data.layout import check_ids, given_sections, plain_items, report_conflicts
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, k_fold
from amkd_monai.files.names import files_by_id, read_table, some
from amkd_monai.tasks import get_task

logger = logging.getLogger("amkd_monai")

COLUMNS = ("id_code", "diagnosis")
TABLES = {
    "train": ("train_1.csv", "train.csv"),
    "validation": ("valid.csv", "val.csv", "validation.csv"),
    "test": ("test.csv",),
}
FOLDERS = {
    "train": ("train_images", "train"),
    "validation": ("val_images", "valid_images", "validation_images", "val", "valid", "validation"),
    "test": ("test_images", "test"),
}
CLASS_FOLDERS = {
    "0": 0, "nodr": 0, "normal": 0,
    "1": 1, "mild": 1,
    "2": 2, "moderate": 2,
    "3": 3, "severe": 3,
    "4": 4, "proliferate": 4, "proliferative": 4, "proliferatedr": 4, "proliferativedr": 4,
}  # fmt: skip
"""Grades by the names that class folders have, in lower case and letters and digits only."""
LAYOUT = "train.csv (id_code,diagnosis) with train_images/<id_code>.png, three such tables, or one folder per grade"


def find_items(root: Path) -> list[Item]:
    """List all graded images.

    Args:
        root: the folder of the data set.

    Returns:
        Items sorted by id, with "section" where the layout has sections. Byte-identical images share a group, whatever
        their grades; conflicts are announced.

    Raises:
        FileNotFoundError: `root` has no known layout, or a table names ids without an image.
        ValueError: a table lacks columns or holds something that is no grade, an image is in no table, or an id comes
            twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}: correct dataset_dir.")
    tables = {name: table for name, names in TABLES.items() if (table := _first_file(root, names)) is not None}
    if "validation" in tables and len(tables) == 3:
        items = [item for name, table in tables.items() for item in _table_items(root, table, name, name)]
    elif "train" in tables:
        items = _table_items(root, tables["train"], "train", None)
    else:
        items = _folder_items(root)
    if not items:
        raise FileNotFoundError(f"No APTOS 2019 data in {root}: expected {LAYOUT}{_level(root)}.")
    if twice := [name for name, count in Counter(item["id"] for item in items).items() if count > 1]:
        raise ValueError(f"{root} has id(s) in two places: {some(twice)}; keep one image of each id.")
    grouped = group_identical_images(items)
    report_conflicts(grouped, get_task("aptos2019").classes)
    return grouped


def inference_items(root: Path) -> list[Item]:
    """List images without grades: `test_images/` of an official layout, otherwise the folder's own image files.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no image in it.
    """
    root = Path(root)
    named = [root / name for section in ("test", "validation", "train") for name in FOLDERS[section]]
    nested = [folder / folder.name for folder in named]
    return plain_items([*named, *nested, root])


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Split by the sections of the layout if it has them, otherwise into folds stratified by grade."""
    if all("section" in item for item in items):
        return given_sections(items)
    logger.info("%s has no sections: fold %d of %d, stratified by grade.", root, how.fold, how.folds)
    return k_fold(items, how.folds, how.fold, seed=how.seed)


def _table_items(root: Path, table: Path, folder_of: str, section: str | None) -> list[Item]:
    folder = next((found for name in FOLDERS[folder_of] if (found := _nested(root / name)) is not None), None)
    if folder is None:
        raise FileNotFoundError(f"{table} has no folder of images beside it: expected {root / FOLDERS[folder_of][0]}.")
    rows, images = read_table(table, COLUMNS), files_by_id(folder)
    check_ids(rows, images, table, folder)
    items: list[Item] = []
    for name, row in rows.items():
        grade = row["diagnosis"].rstrip("0").removesuffix(".") if "." in row["diagnosis"] else row["diagnosis"]
        if grade not in ("0", "1", "2", "3", "4"):
            raise ValueError(f"{table} gives '{name}' the diagnosis '{row['diagnosis']}': grades are 0 to 4.")
        items.append({"image": str(images[name]), "label": int(grade), "id": name, "group": name})
        if section is not None:
            items[-1]["section"] = section
    return items


def _folder_items(root: Path) -> list[Item]:
    sections = {name: next((root / f for f in names if (root / f).is_dir()), None) for name, names in FOLDERS.items()}
    if all(folder is not None and _grades(folder) for folder in sections.values()):
        return [
            {**item, "section": name}
            for name, folder in sections.items()
            if folder is not None
            for item in _class_folder_items(folder)
        ]
    return _class_folder_items(root)


def _class_folder_items(folder: Path) -> list[Item]:
    return [
        {"image": str(file), "label": grade, "id": name, "group": name}
        for child, grade in _grades(folder).items()
        for name, file in files_by_id(child).items()
    ]


def _grades(folder: Path) -> dict[Path, int]:
    """The class folders within a folder, with their grades."""
    names = {child: "".join(c for c in child.name.lower() if c.isalnum()) for child in sorted(folder.iterdir())}
    return {child: CLASS_FOLDERS[name] for child, name in names.items() if child.is_dir() and name in CLASS_FOLDERS}


def _nested(folder: Path) -> Path | None:
    """The folder, or the one of the same name within it; None if there is none."""
    inner = folder / folder.name
    return inner if inner.is_dir() else folder if folder.is_dir() else None


def _first_file(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _level(root: Path) -> str:
    """Words that name the right folder if `root` is one level too high or too low."""
    if _first_file(root.parent, TABLES["train"]):
        return f"; you are one level too low, use {root.parent}"
    below = [child for child in sorted(root.iterdir()) if child.is_dir() and _first_file(child, TABLES["train"])]
    return f"; you are one level too high, use {below[0]}" if below else ""
