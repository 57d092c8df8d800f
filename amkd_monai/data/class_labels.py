"""What data sets with one class per image share: label tables, the images they name, given sections, conflicts."""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from amkd_monai.data.splits import Item, Sections

logger = logging.getLogger("amkd_monai")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
SECTIONS = ("train", "validation", "test")


def images_by_id(folder: Path, beside: Sequence[str] = ()) -> dict[str, Path]:
    """Map id (file name without suffix) to image file, sorted by id; hidden and other files are ignored.

    Args:
        folder: where the images lie.
        beside: endings of ids that mark files beside the images, such as "_superpixels".

    Raises:
        ValueError: two files with one id.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            continue
        if file.stem.endswith(tuple(beside)) and beside:
            continue
        if file.stem in files:
            raise ValueError(f"{files[file.stem]} and {file} have the same id '{file.stem}': keep one of them.")
        files[file.stem] = file
    return files


def read_table(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read a label table: {id: row}, where the first of ``columns`` holds the id.

    Raises:
        ValueError: columns are missing, a cell of them is empty, an id comes twice, or there is no row.
    """
    rows: dict[str, dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        found = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = found
        if missing := [name for name in columns if name not in found]:
            raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}: it has {', '.join(found) or 'none'}.")
        for number, row in enumerate(reader, start=2):
            cells = {name: (row[name] or "").strip() for name in columns}
            if not any(cells.values()):
                continue
            if empty := [name for name, cell in cells.items() if not cell]:
                raise ValueError(f"{path}, line {number} has no {', '.join(empty)}: complete or remove the line.")
            name = cells[columns[0]]
            if name in rows:
                raise ValueError(f"{path}, line {number} repeats the id '{name}': keep one line.")
            rows[name] = cells
    if not rows:
        raise ValueError(f"{path} holds no labels: use the file of the original archive.")
    return rows


def check_ids(rows: Collection[str], images: Collection[str], table: Path, folder: Path) -> None:
    """Check that a label table and a folder of images name the same cases.

    Raises:
        FileNotFoundError: an id without image.
        ValueError: an image without label.
    """
    if lost := set(rows) - set(images):
        raise FileNotFoundError(
            f"{table} names id(s) without an image in {folder}: {some(lost)}; add the image(s) or remove the line(s)."
        )
    if unnamed := set(images) - set(rows):
        raise ValueError(f"{folder} holds image(s) that {table} does not name: {some(unnamed)}; remove them.")


def report_conflicts(items: Iterable[Item], classes: Sequence[str]) -> list[str]:
    """Warn of identical images with different classes; they stay, in one group. Return a line for each group."""
    members: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[item["group"]].append(item)
    lines = []
    for group in members.values():
        if len({item["label"] for item in group}) > 1:
            lines.append(", ".join(f"{item['id']} ({classes[item['label']]})" for item in group))
    if lines:
        logger.warning("%d group(s) of identical images have conflicting labels: %s.", len(lines), "; ".join(lines))
    return lines


def given_sections(items: Iterable[Item]) -> Sections:
    """Split items by their "section", which is dropped; a group stays in the latest section that has it.

    What would leak from test into validation or training, or from validation into training, is left out there.
    """
    sections: dict[str, list[Item]] = {name: [] for name in SECTIONS}
    for item in sorted(items, key=lambda item: str(item["id"])):
        sections[item["section"]].append({key: value for key, value in item.items() if key != "section"})
    taken: set[str] = set()
    for name in reversed(SECTIONS):
        kept = [item for item in sections[name] if item["group"] not in taken]
        if len(kept) < len(sections[name]):
            lost = {item["id"] for item in sections[name]} - {item["id"] for item in kept}
            logger.warning("Left out of %s, as the same images lie in a later section: %s.", name, some(lost))
        sections[name] = kept
        taken |= {item["group"] for item in kept}
    return sections["train"], sections["validation"], sections["test"]


def first_folder_with_images(folders: Iterable[Path], beside: Sequence[str] = ()) -> Mapping[str, Path]:
    """Return the images of the first folder that has any.

    Raises:
        FileNotFoundError: none has.
    """
    folders = list(folders)
    for folder in folders:
        if folder.is_dir() and (files := images_by_id(folder, beside)):
            return files
    raise FileNotFoundError(
        f"No images to predict in {folders[-1]}: expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it."
    )


def some(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names and count the others."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
