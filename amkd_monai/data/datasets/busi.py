"""BUSI: breast ultrasound, `Dataset_BUSI_with_GT/{benign,malignant,normal}/<class> (N).png` with `_mask.png` beside.

Source: Al-Dhabyani et al., "Dataset of breast ultrasound images", Data in Brief 28:104863, 2020. Some images have
further masks `_mask_1.png`, `_mask_2.png`, one lesion each. Many images come twice, with and without calipers
(Pawlowska et al. 2023, PMC10293973), so images that look alike share a group. Normal images have empty masks.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path

from amkd_monai.data.datasets.layout import Layout, check_partners, checked
from amkd_monai.data.splits import Item, group_near_duplicates
from amkd_monai.files.names import file_id, image_files, natural, some

logger = logging.getLogger("amkd_monai")

CLASSES = ("benign", "malignant", "normal")
SAME_LESION = 64
"""Bits in which the perceptual hashes of one group differ at most: copies, and frames of one lesion."""

_NAME = re.compile(r"(?P<id>.+ \(\d+\))(?P<mask>_mask(_\d+)?)?")


class Busi(Layout):
    """Three folders of classes, which the folds hold in equal shares."""

    title = "BUSI"
    expected = "the folders benign/, malignant/ and normal/ with `<class> (N).png` and `<class> (N)_mask.png`"
    validation_fraction = 0.15

    def is_in(self, folder: Path) -> bool:
        """Whether there are folders of benign and malignant images."""
        return (folder / "benign").is_dir() and (folder / "malignant").is_dir()

    def find_items(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        normals: bool = True,
        duplicate_distance: int = SAME_LESION,
    ) -> list[Item]:
        """List all images with their masks in natural order; "class" is the folder.

        Args:
            root: the folder that holds `benign/`, `malignant/` and `normal/`.
            cache_dir: keeps perceptual hashes.
            normals: keep the images without a lesion, whose masks are empty.
            duplicate_distance: see `amkd_monai.data.splits.group_near_duplicates`.
        """
        root = Path(root)
        self.check(root)
        items: list[Item] = []
        for name in CLASSES if normals else CLASSES[:2]:
            images, masks = _files(root / name) if (root / name).is_dir() else ({}, {})
            check_partners(images, {number: files[0] for number, files in masks.items()})
            for number, image in images.items():
                files = sorted(masks[number], key=lambda file: natural(file.name))
                label = [str(file) for file in files] if len(files) > 1 else str(files[0])
                item = {"image": str(image), "label": label, "id": number, "group": number, "class": name}
                items.append(checked(item, image, files))
        if not items:
            raise FileNotFoundError(f"No images in {root}: expected {self.expected}.")
        return group_near_duplicates(sorted(items, key=lambda item: natural(item["id"])), duplicate_distance, cache_dir)

    def inference_items(self, root: str | Path) -> list[Item]:
        """List the images of all three folders, without the masks beside them, else the folder's own files."""
        folders = [Path(root) / name for name in CLASSES if (Path(root) / name).is_dir()]
        return [item for folder in folders or [Path(root)] for item in super(Busi, self).inference_items(folder)]


def _files(folder: Path) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Images and lists of masks by id; a file with another name is announced and left out."""
    images: dict[str, Path] = {}
    masks: defaultdict[str, list[Path]] = defaultdict(list)
    others = []
    for file in image_files(folder):
        match = _NAME.fullmatch(file_id(file))
        if match is None:
            others.append(file.name)
        elif match["mask"]:
            masks[match["id"]].append(file)
        elif match["id"] in images:
            raise ValueError(f"{images[match['id']]} and {file} have the same id: keep one of them.")
        else:
            images[match["id"]] = file
    if others:
        logger.warning("Left out, as their names are not `<class> (N).png`, in %s: %s.", folder, some(others))
    return images, dict(masks)
