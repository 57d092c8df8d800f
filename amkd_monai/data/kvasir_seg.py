"""Kvasir-SEG: polyps in colonoscopy frames, `Kvasir-SEG/{images,masks}/<id>.jpg`.

Source: Jha et al., "Kvasir-SEG: A Segmented Polyp Dataset", MMM 2020, https://datasets.simula.no/kvasir-seg/.
Masks are RGB JPEGs with values between 0 and 255 around every edge: readers must threshold at 127.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from amkd_monai.data.duplicates import group_identical_images, group_near_duplicates
from amkd_monai.data.layout import check_layout, pair, plain_items
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, fixed_split, random_split
from amkd_monai.files.names import PICTURE_SUFFIXES, files_by_id, has_suffix, read_text, some

logger = logging.getLogger("amkd_monai")

LAYOUT = "the folders images/ and masks/ with one <id>.jpg each per frame"


def find_items(root: Path, cache_dir: str | Path | None = None, duplicate_distance: int | None = None) -> list[Item]:
    """List all image and mask pairs; masks are checked by their headers only.

    Args:
        root: the folder that holds `images/` and `masks/`.
        cache_dir: keeps perceptual hashes.
        duplicate_distance: group near-duplicates too, see `amkd_monai.data.duplicates.group_near_duplicates`.

    Returns:
        Items sorted by id; byte-identical images share a group, any other image is its own group.

    Raises:
        FileNotFoundError: `root` has not the layout, or an image or mask has no partner.
        ValueError: two files with one id, a file that is no image, or a mask of another size than its image.
    """
    root = Path(root)
    check_layout(root, "Kvasir-SEG", LAYOUT, _has_layout, ("images", "masks"))
    images, masks = files_by_id(root / "images"), files_by_id(root / "masks")
    if not images:
        raise FileNotFoundError(f"No images in {root / 'images'}: expected {LAYOUT}.")
    items = pair(images, masks)
    if duplicate_distance is None:
        return group_identical_images(items)
    return group_near_duplicates(items, duplicate_distance, cache_dir)


def inference_items(root: Path) -> list[Item]:
    """List images without labels: `images/*` of an official layout, otherwise the folder's own image files.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no such folder or no image in it.
    """
    return plain_items((Path(root) / "images", Path(root)))


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Split by the authors' file lists if they lie in `root`, otherwise at random.

    There is no official split in the archive. The authors' later 880/120 split exists as `train.txt` and
    `val.txt` (one id a line) and cannot be rebuilt without them. With the lists, `val.txt` is the test
    section and validation is taken from `train.txt` in the ratio of the first two fractions.

    Raises:
        FileNotFoundError: only one of the two lists is there.
        ValueError: a list is empty or names an unknown id, or both lists name the same id.
    """
    lists = [Path(root) / "train.txt", Path(root) / "val.txt"]
    absent = [file for file in lists if not file.is_file()]
    if len(absent) == len(lists):
        logger.info("No train.txt and val.txt in %s: splitting at random by %s.", root, tuple(how.fractions))
        return random_split(items, how.fractions, how.seed)
    if absent:
        raise FileNotFoundError(f"File list {absent[0]} is missing: give both train.txt and val.txt, or none.")
    known = {item["id"]: item for item in items}
    train_ids, test_ids = (_read_ids(file, known) for file in lists)
    if both := train_ids & test_ids:
        raise ValueError(f"{some(both)} stand(s) in both {lists[0]} and {lists[1]}: keep each id in one list.")
    if unlisted := known.keys() - train_ids - test_ids:
        logger.warning("Left out, as they stand in neither file list in %s: %s.", root, some(unlisted))
    return fixed_split([known[name] for name in train_ids], [known[name] for name in test_ids], how.fractions, how.seed)


def _has_layout(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _read_ids(file: Path, known: Iterable[str]) -> set[str]:
    """Read one id a line; blank lines are skipped and an image suffix is dropped."""
    names = (line.strip() for line in read_text(file).splitlines())
    ids = {Path(name).stem if has_suffix(name, PICTURE_SUFFIXES) else name for name in names if name}
    if not ids:
        raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
    if unknown := ids - set(known):
        raise ValueError(f"File list {file} names ids without an image: {some(unknown)}.")
    return ids
