"""Kvasir-SEG: polyps in colonoscopy frames, `Kvasir-SEG/{images,masks}/<id>.jpg`.

Source: Jha et al., "Kvasir-SEG: A Segmented Polyp Dataset", MMM 2020, https://datasets.simula.no/kvasir-seg/.
Masks are RGB JPEGs with values between 0 and 255 around every edge: readers must threshold at 127.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from amkd_monai.data.splits import Item, Sections, group_identical_images, random_split

logger = logging.getLogger("amkd_monai")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
LAYOUT = "the folders images/ and masks/ with one <id>.jpg each per frame"


def find_items(root: Path) -> list[Item]:
    """List all image and mask pairs; masks are checked by their headers only.

    Args:
        root: the folder that holds `images/` and `masks/`.

    Returns:
        Items sorted by id; byte-identical images share a group, any other image is its own group.

    Raises:
        FileNotFoundError: `root` has not the layout, or an image or mask has no partner.
        ValueError: two files with one id, a file that is no image, or a mask of another size than its image.
    """
    root = Path(root)
    _check_layout(root)
    images, masks = _files_by_id(root / "images"), _files_by_id(root / "masks")
    if not images:
        raise FileNotFoundError(f"No images in {root / 'images'}: expected {LAYOUT}.")
    _check_partners(images.keys() - masks.keys(), root / "images", "mask", root / "masks")
    _check_partners(masks.keys() - images.keys(), root / "masks", "image", root / "images")
    items = []
    for name, image in images.items():
        image_size, mask_size = _size(image), _size(masks[name])
        if image_size != mask_size:
            raise ValueError(
                f"Mask {masks[name]} is {mask_size[0]}x{mask_size[1]} pixels but its image is "
                f"{image_size[0]}x{image_size[1]}: replace one by the file of the original archive."
            )
        items.append({"image": str(image), "label": str(masks[name]), "id": name, "group": name})
    return group_identical_images(items)


def inference_items(root: Path) -> list[Item]:
    """List images without labels: `images/*` of an official layout, otherwise the folder's own image files.

    Returns:
        Items with "image" and "id", sorted by id.

    Raises:
        FileNotFoundError: there is no such folder or no image in it.
        ValueError: two files with one id.
    """
    root = Path(root)
    for folder in (root / "images", root):
        if folder.is_dir() and (files := _files_by_id(folder)):
            return [{"image": str(file), "id": name} for name, file in files.items()]
    raise FileNotFoundError(
        f"No images to predict in {root}: expected image files ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or "
        "in its folder images/."
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
    """Split by the authors' file lists if they lie in `root`, otherwise at random by `fractions`.

    There is no official split in the archive. The authors' later 880/120 split exists as `train.txt` and
    `val.txt` (one id a line) and cannot be rebuilt without them. With the lists, `val.txt` is the test
    section and validation is taken from `train.txt` in the ratio of the first two fractions.

    Args:
        root: the folder that holds `images/` and, where the split is fixed, `train.txt` and `val.txt`.
        items: what `find_items` returned for `root`.
        fractions: shares of train, validation and test.
        folds: not used, this data set is not cross-validated.
        fold: not used.
        seed: seed of the random choice.

    Returns:
        Train, validation and test items.

    Raises:
        FileNotFoundError: only one of the two lists is there.
        ValueError: a list is empty or names an unknown id, or both lists name the same id.
    """
    lists = [Path(root) / "train.txt", Path(root) / "val.txt"]
    absent = [file for file in lists if not file.is_file()]
    if len(absent) == len(lists):
        logger.info("No train.txt and val.txt in %s: splitting at random by %s.", root, tuple(fractions))
        return random_split(items, fractions, seed)
    if absent:
        raise FileNotFoundError(f"File list {absent[0]} is missing: give both train.txt and val.txt, or none.")
    known = {item["id"]: item for item in items}
    train_ids, test_ids = (_read_ids(file, known) for file in lists)
    if both := train_ids & test_ids:
        raise ValueError(f"{_some(both)} stand(s) in both {lists[0]} and {lists[1]}: keep each id in one list.")
    if unlisted := known.keys() - train_ids - test_ids:
        logger.warning("Left out, as they stand in neither file list in %s: %s.", root, _some(unlisted))
    test = [known[name] for name in sorted(test_ids)]
    test_groups = {item["group"] for item in test}
    leaking = {name for name in train_ids if known[name]["group"] in test_groups}
    if leaking:
        logger.warning("Left out of train, as their images are also in val.txt: %s.", _some(leaking))
    rest = [known[name] for name in sorted(train_ids - leaking)]
    share = fractions[0] / (fractions[0] + fractions[1])
    train, validation, _ = random_split(rest, (share, 1 - share, 0), seed)
    return train, validation, test


def _check_layout(root: Path) -> None:
    """Raise one sentence that names the right folder if `root` is one level too high or too low."""
    if _has_layout(root):
        return
    fix = f"expected {LAYOUT}"
    if _has_layout(root.parent) and root.name in ("images", "masks"):
        fix += f"; you are one level too low, use {root.parent}"
    elif root.is_dir():
        below = [child for child in sorted(root.iterdir()) if _has_layout(child)]
        if below:
            fix += f"; you are one level too high, use {below[0]}"
    raise FileNotFoundError(f"No Kvasir-SEG data in {root}: {fix}.")


def _has_layout(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def _files_by_id(folder: Path) -> dict[str, Path]:
    """Map id to image file, sorted by id; hidden files (such as macOS `._*`) and other files are ignored."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix.lower() not in IMAGE_SUFFIXES or not file.is_file():
            continue
        if file.stem in files:
            raise ValueError(f"{files[file.stem]} and {file} have the same id '{file.stem}': keep one of them.")
        files[file.stem] = file
    return dict(sorted(files.items()))


def _check_partners(alone: Iterable[str], folder: Path, partner: str, partner_folder: Path) -> None:
    if alone := set(alone):
        raise FileNotFoundError(
            f"{_some(alone)} in {folder} lack(s) a {partner} of the same name in {partner_folder}: "
            "add the missing file(s) or remove these."
        )


def _size(file: Path) -> tuple[int, int]:
    """Width and height in pixels; only the header is read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size
    except OSError as error:
        raise ValueError(f"{file} cannot be read as an image: replace it by an intact copy.") from error


def _read_ids(file: Path, known: Iterable[str]) -> set[str]:
    """Read one id a line; blank lines are skipped and an image suffix is dropped."""
    names = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
    ids = {Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name for name in names if name}
    if not ids:
        raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
    if unknown := ids - set(known):
        raise ValueError(f"File list {file} names ids without an image: {_some(unknown)}.")
    return ids


def _some(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names and count the others."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
