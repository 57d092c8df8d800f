"""COVID-19 CT: slices with infection masks, in one of the layouts in which they are passed around.

- COVID-SemiSeg (Fan et al., "Inf-Net", IEEE TMI 2020, from the slices of medicalsegmentation.com):
  `TrainingSet/LungInfection-Train/Doctor-label/{Imgs,GT}` and `TestingSet/LungInfection-Test/{Imgs,GT}`;
- any two folders with one image and one mask of a name, `images/` and `masks/` unless told otherwise.

Masks of several classes (ground glass, consolidation, effusion) are merged. Volumes are another task, `covid_volumes`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from amkd_monai.data.duplicates import NEAR, group_near_duplicates
from amkd_monai.data.layout import check_layout, named_folders, pair, plain_items
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, fixed_split, random_split
from amkd_monai.files.names import files_by_id, natural

logger = logging.getLogger("amkd_monai")

LAYOUT = "the folders of COVID-SemiSeg (TrainingSet/, TestingSet/), or images/ and masks/ with one file each per slice"
TRAIN = Path("TrainingSet") / "LungInfection-Train" / "Doctor-label"
TEST = Path("TestingSet") / "LungInfection-Test"
FOLDERS = (("images", "masks"), ("frames", "masks"))
"""Names of the two folders that are looked for when none are given."""


def find_items(
    root: Path,
    cache_dir: str | Path | None = None,
    folders: Sequence[str] | None = None,
    mask_ending: str = "",
    duplicate_distance: int = NEAR,
) -> list[Item]:
    """List all image and mask pairs; masks are checked by their headers only.

    Args:
        root: the folder that holds the two folders, or COVID-SemiSeg.
        cache_dir: keeps the perceptual hashes, so that images are decoded once for them.
        folders: the folder of images and that of masks, relative to `root`; they may be one folder.
        mask_ending: what the names of masks end with before the suffix, e.g. `_mask`.
        duplicate_distance: see `amkd_monai.data.duplicates.group_near_duplicates`.

    Returns:
        Items in natural order; slices that look alike share a group; "section" is the official one, if there is one.

    Raises:
        FileNotFoundError: `root` has not the layout, or an image or mask has no partner.
        ValueError: two slices with one id.
    """
    root = Path(root)
    if folders is None and _is_semiseg(root):
        items = [
            {**item, "section": section}
            for section, below in (("train", TRAIN), ("test", TEST))
            for item in _pairs(root / below / "Imgs", root / below / "GT", mask_ending)
        ]
        ids = [item["id"] for item in items]
        if twice := {name for name in ids if ids.count(name) > 1}:
            raise ValueError(f"{root} has the slice '{min(twice)}' in both sections: rename one of them.")
    else:
        images, masks = _folders(root, folders)
        items = _pairs(images, masks, mask_ending)
    items = group_near_duplicates(items, duplicate_distance, cache_dir)
    return sorted(items, key=lambda item: natural(item["id"]))


def inference_items(root: Path) -> list[Item]:
    """List slices without labels: the official test section, `images/`, `frames/`, otherwise the folder's own files.

    Returns:
        Items with "image" and "id".

    Raises:
        FileNotFoundError: there is no such folder or no image in it.
    """
    root = Path(root)
    return plain_items((root / TEST / "Imgs", root / "images", root / "frames", root / "Imgs", root))


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Keep the official test section, where there is one, and take validation from train; otherwise split by group.

    Slices come without patient ids, so slices of one patient that do not look alike may lie in several sections.
    """
    if all("section" in item for item in items):
        train, test = ([item for item in items if item["section"] == name] for name in ("train", "test"))
        return fixed_split(train, test, how.fractions, how.seed)
    logger.info("No official split in %s: splitting at random by %s.", root, tuple(how.fractions))
    return random_split(items, how.fractions, how.seed)


def _is_semiseg(folder: Path) -> bool:
    return (folder / TRAIN / "Imgs").is_dir() and (folder / TEST / "Imgs").is_dir()


def _folders(root: Path, folders: Sequence[str] | None) -> tuple[Path, Path]:
    """The folder of images and that of masks."""
    if folders is not None:
        return named_folders(root, folders)
    parts = ("images", "masks", "frames", "TrainingSet", "TestingSet")
    check_layout(root, "COVID", LAYOUT, _has_layout, parts, _volumes_hint)
    images, masks = next(names for names in FOLDERS if all((root / name).is_dir() for name in names))
    return root / images, root / masks


def _has_layout(folder: Path) -> bool:
    return _is_semiseg(folder) or any(all((folder / name).is_dir() for name in names) for names in FOLDERS)


def _volumes_hint(root: Path) -> str:
    found = root.is_dir() and (next(root.glob("*.nii*"), None) or next(root.glob("*/*.nii*"), None))
    return "these are volumes, use the task covid_volumes (configs/volumes.json)" if found else ""


def _pairs(images: Path, masks: Path, ending: str) -> list[Item]:
    found, labels = files_by_id(images), files_by_id(masks, ending=ending)
    if images == masks and ending:
        found = {name: file for name, file in found.items() if not name.endswith(ending)}
    if not found:
        raise FileNotFoundError(f"No images in {images}: expected {LAYOUT}.")
    return pair(found, labels)
