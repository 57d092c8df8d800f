"""COVID-19 CT as volumes: one folder of NIfTI images, one of infection masks of the same names.

Looked for, unless folders are named: the 20 cases of Ma et al. (https://zenodo.org/records/3757476, folders
`COVID-19-CT-Seg_20cases` and `Infection_Mask`), `imagesTr/` and `labelsTr/`, `images/` and `masks/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amkd_monai.data.duplicates import group_identical_images
from amkd_monai.data.layout import check_layout, named_folders, pair, plain_items, volume_problem
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, random_split
from amkd_monai.files.names import VOLUME_SUFFIXES, files_by_id

FOLDERS = (("COVID-19-CT-Seg_20cases", "Infection_Mask"), ("imagesTr", "labelsTr"), ("images", "masks"))
LAYOUT = " or ".join(f"{images}/ and {masks}/" for images, masks in FOLDERS) + " with one NIfTI file each per volume"


def find_items(root: Path, folders: Sequence[str] | None = None, mask_ending: str = "") -> list[Item]:
    """List all volumes with their masks; headers and file lengths are checked.

    Args:
        root: the folder that holds the two folders.
        folders: the folder of images and that of masks, relative to `root`.
        mask_ending: what the names of masks end with before the suffix, e.g. `_seg`.

    Returns:
        Items sorted by id; byte-identical volumes share a group, any other volume is its own group.

    Raises:
        FileNotFoundError: `root` has not the layout, or an image or mask has no partner.
        ValueError: two volumes with one id.
    """
    root = Path(root)
    images, masks = _folders(root, folders)
    found = files_by_id(images, VOLUME_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"No volumes in {images}: expected {LAYOUT}.")
    return group_identical_images(pair(found, files_by_id(masks, VOLUME_SUFFIXES, mask_ending), volume_problem))


def inference_items(root: Path) -> list[Item]:
    """List volumes without labels: those of an official layout, otherwise the folder's own NIfTI files.

    Raises:
        FileNotFoundError: there is no such folder or no volume in it.
    """
    root = Path(root)
    return plain_items((*(root / images for images, _ in FOLDERS), root), "volumes", VOLUME_SUFFIXES)


def split(root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
    """Split volumes at random."""
    return random_split(items, how.fractions, how.seed)


def _folders(root: Path, folders: Sequence[str] | None) -> tuple[Path, Path]:
    if folders is not None:
        return named_folders(root, folders)
    parts = [name for names in FOLDERS for name in names]
    check_layout(root, "COVID CT volume", LAYOUT, lambda folder: bool(_known(folder)), parts)
    return named_folders(root, _known(root)[0])


def _known(root: Path) -> list[tuple[str, str]]:
    return [names for names in FOLDERS if all((root / name).is_dir() for name in names)]
