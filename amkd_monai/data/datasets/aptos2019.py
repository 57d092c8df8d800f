"""APTOS 2019: grades 0 to 4 of diabetic retinopathy in fundus photographs.

Source: Kaggle, "APTOS 2019 Blindness Detection", https://www.kaggle.com/c/aptos2019-blindness-detection. Read are

- the original: `train.csv` (id_code, diagnosis) and `train_images/<id_code>.png`; `test.csv` has no grades;
- the re-split of the same images: three tables with grades (`train_1.csv` or `train.csv`, `valid.csv`, `test.csv`)
  and `train_images/`, `val_images/`, `test_images/`, each of which may hold a folder of its own name;
- class folders: `<class>/*.png`, or `train|valid|test/<class>/*.png`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from amkd_monai.data.datasets.layout import Layout, check_ids, report_conflicts
from amkd_monai.data.splits import Item, group_identical_images
from amkd_monai.files.names import files_by_id, read_table, some

CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative")
TABLES = {
    "train": ("train_1.csv", "train.csv"),
    "validation": ("valid.csv", "val.csv", "validation.csv"),
    "test": ("test.csv",),
}
FOLDERS = {
    "test": ("test_images", "test"),
    "validation": ("val_images", "valid_images", "validation_images", "val", "valid", "validation"),
    "train": ("train_images", "train"),
}
GRADES = {
    "0": 0, "nodr": 0, "normal": 0,
    "1": 1, "mild": 1,
    "2": 2, "moderate": 2,
    "3": 3, "severe": 3,
    "4": 4, "proliferate": 4, "proliferative": 4, "proliferatedr": 4, "proliferativedr": 4,
}  # fmt: skip
"""Grades by the names that class folders have, in lower case and letters and digits only."""


class Aptos2019(Layout):
    """The sections of the layout if it has them, otherwise folds stratified by grade."""

    title = "APTOS 2019"
    expected = "train.csv (id_code,diagnosis) with train_images/<id_code>.png, three such tables, or a folder per grade"
    predict_in = tuple(f"{name}{inner}" for names in FOLDERS.values() for name in names for inner in (f"/{name}", ""))
    validation_fraction = 0.2

    def is_in(self, folder: Path) -> bool:
        """Whether there is a table of training images, or folders of grades."""
        return bool(_first(folder, TABLES["train"]) or _grade_folders(folder) or _section_folders(folder))

    def find_items(self, root: str | Path, cache_dir: str | Path | None = None) -> list[Item]:
        """List all graded images, sorted by id; byte-identical images share a group, conflicts are announced."""
        root = Path(root)
        self.check(root)
        tables = {name: table for name, names in TABLES.items() if (table := _first(root, names)) is not None}
        if "validation" in tables and len(tables) == 3:
            items = [{**i, "section": name} for name in tables for i in _table_items(root, tables[name], name)]
        elif "train" in tables:
            items = _table_items(root, tables["train"], "train")
        elif (folders := _section_folders(root)) is not None:
            items = [{**i, "section": name} for name, folder in folders.items() for i in _class_folder_items(folder)]
        else:
            items = _class_folder_items(root)
        if not items:
            raise FileNotFoundError(f"No images in {root}: expected {self.expected}.")
        if twice := [name for name, count in Counter(item["id"] for item in items).items() if count > 1]:
            raise ValueError(f"{root} has id(s) in two places: {some(twice)}; keep one image of each id.")
        grouped = group_identical_images(items)
        report_conflicts(grouped, CLASSES)
        return grouped


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _table_items(root: Path, table: Path, section: str) -> list[Item]:
    folder = _first(root, FOLDERS[section])
    if folder is None:
        raise FileNotFoundError(f"{table} has no folder of images beside it: expected {root / FOLDERS[section][0]}.")
    folder = folder / folder.name if (folder / folder.name).is_dir() else folder
    rows, images = read_table(table, ("id_code", "diagnosis")), files_by_id(folder)
    check_ids(rows, images, table, folder)
    items: list[Item] = []
    for name, row in rows.items():
        grade = row["diagnosis"].rstrip("0").removesuffix(".") if "." in row["diagnosis"] else row["diagnosis"]
        if grade not in ("0", "1", "2", "3", "4"):
            raise ValueError(f"{table} gives '{name}' the diagnosis '{row['diagnosis']}': grades are 0 to 4.")
        items.append({"image": str(images[name]), "label": int(grade), "id": name, "group": name})
    return items


def _section_folders(root: Path) -> dict[str, Path] | None:
    """The folder of each section, if all three are there and hold class folders."""
    folders = {name: folder for name, names in FOLDERS.items() if (folder := _first(root, names)) is not None}
    return folders if len(folders) == 3 and all(map(_grade_folders, folders.values())) else None


def _class_folder_items(folder: Path) -> list[Item]:
    return [
        {"image": str(file), "label": grade, "id": name, "group": name}
        for child, grade in _grade_folders(folder).items()
        for name, file in files_by_id(child).items()
    ]


def _grade_folders(folder: Path) -> dict[Path, int]:
    """The class folders within a folder, with their grades."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()] if folder.is_dir() else []
    names = {child: "".join(c for c in child.name.lower() if c.isalnum()) for child in children}
    return {child: GRADES[name] for child, name in names.items() if name in GRADES}
