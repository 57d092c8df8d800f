"""ISIC 2017: dermoscopic images with their class (part 3) and the outline of the lesion (part 1).

Source: Codella et al., "Skin Lesion Analysis Toward Melanoma Detection", ISBI 2017, https://challenge.isic-archive.com.
Layout, for Training, Validation and Test_v2: `ISIC-2017_<section>_Data/ISIC_XXXXXXX.jpg` with a metadata table and
`_superpixels.png` files among the images; `ISIC-2017_<section>_Part3_GroundTruth.csv` (image_id, melanoma,
seborrheic_keratosis) with floats, where an image with 0.0, 0.0 is a nevus; and
`ISIC-2017_<section>_Part1_GroundTruth/<id>_segmentation.png`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from amkd_monai.data.datasets.layout import Layout, check_ids, pair, report_conflicts
from amkd_monai.data.splits import Item, group_identical_images
from amkd_monai.files.names import files_by_id, read_table, some

OFFICIAL = {"train": "Training", "validation": "Validation", "test": "Test_v2"}
CLASSES = ("nevus", "melanoma", "seborrheic keratosis")
COLUMNS = ("image_id", "melanoma", "seborrheic_keratosis")
BESIDE = ("_superpixels", "_segmentation")
"""Endings of files that lie beside images and are none."""


@dataclass(frozen=True)
class Isic2017(Layout):
    """The official sections (2000/150/600 images), or folds of what there is of them.

    Attributes:
        outlines: labels are masks; otherwise classes.
    """

    outlines: bool = False

    title = "ISIC 2017"
    expected = "ISIC-2017_Training_Data/ISIC_XXXXXXX.jpg and ISIC-2017_Training_Part3_GroundTruth.csv"
    predict_in = tuple(
        folder
        for name in ("Test_v2", "Validation", "Training")
        for folder in (f"ISIC-2017_{name}_Data/ISIC-2017_{name}_Data", f"ISIC-2017_{name}_Data")
    )
    validation_fraction = 0.2

    def is_in(self, folder: Path) -> bool:
        """Whether there are images of an official section."""
        return any(_image_folder(folder, name) is not None for name in OFFICIAL.values())

    def find_items(self, root: str | Path, cache_dir: str | Path | None = None) -> list[Item]:
        """List all labelled images, sorted by id; byte-identical images share a group, conflicts are announced."""
        root = Path(root)
        self.check(root)
        items: list[Item] = []
        for section, name in OFFICIAL.items():
            folder = _image_folder(root, name)
            found = self._outlined(root, name, folder) if self.outlines else self._classified(root, name, folder)
            items += [{**item, "section": section} for item in found]
        if not items:
            raise FileNotFoundError(
                f"No masks in {root}: expected ISIC-2017_Training_Part1_GroundTruth/*{BESIDE[1]}.png."
            )
        grouped = group_identical_images(items)
        if not self.outlines:
            report_conflicts(grouped, CLASSES)
        return grouped

    def _outlined(self, root: Path, name: str, folder: Path | None) -> list[Item]:
        """Images with masks; none where a section has no folder of masks."""
        masks = root / f"ISIC-2017_{name}_Part1_GroundTruth"
        if folder is None or not masks.is_dir():
            return []
        return pair(files_by_id(folder, beside=BESIDE), files_by_id(masks, ending=BESIDE[1]))

    def _classified(self, root: Path, name: str, folder: Path | None) -> list[Item]:
        table = root / f"ISIC-2017_{name}_Part3_GroundTruth.csv"
        if folder is None and not table.is_file():
            return []
        if folder is None or not table.is_file():
            missing = root / f"ISIC-2017_{name}_Data" if folder is None else table
            raise FileNotFoundError(f"{missing} is missing: add it, or remove the rest of that section.")
        rows, images = read_table(table, COLUMNS), files_by_id(folder, beside=BESIDE)
        if wrong := [i for i in rows if re.fullmatch(r"ISIC_\d{7}", i) is None]:  # of tables in circulation
            numbers = " (row numbers)" if all(i.isdigit() for i in wrong) else ""
            raise ValueError(
                f"{table} has ids that are not ISIC_ and 7 digits{numbers}: {some(wrong, 3)}; use the official file."
            )
        check_ids(rows, images, table, folder)
        return [{"image": str(images[i]), "label": _class_of(rows[i], table), "id": i, "group": i} for i in rows]


def _image_folder(root: Path, name: str) -> Path | None:
    """Folder of images of an official section, which may lie in a folder of the same name; None if there is none."""
    folder = root / f"ISIC-2017_{name}_Data"
    return next((f for f in (folder / folder.name, folder) if f.is_dir()), None)


def _class_of(row: dict[str, str], table: Path) -> int:
    """Index in ``CLASSES``, from two columns of floats."""
    for column in COLUMNS[1:]:
        if row[column] not in ("0", "0.0", "1", "1.0"):
            raise ValueError(f"{table} gives '{row['image_id']}' {column} '{row[column]}': expected 0.0 or 1.0.")
    melanoma, keratosis = (row[column].startswith("1") for column in COLUMNS[1:])
    if melanoma and keratosis:
        raise ValueError(f"{table} calls '{row['image_id']}' melanoma and seborrheic keratosis: use the official file.")
    return 1 if melanoma else 2 if keratosis else 0
