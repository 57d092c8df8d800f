"""Checks that all data sets share: where the files are, who belongs to whom, what an error says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from amkd_monai.data.splits import Item

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


class DataProblems(ValueError):
    """Several things are wrong with a data set.

    Attributes:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" There are {len(problems) - 1} more problems like this: `data check` lists them all."
        super().__init__(problems[0] + (more if len(problems) > 1 else ""))
        self.problems = list(problems)


def label_files(item: Mapping[str, object]) -> list[str]:
    """Return the mask files of an item: one, several (combined by OR), or none where the label is a class."""
    label = item.get("label")
    if isinstance(label, str):
        return [label]
    return [str(file) for file in label] if isinstance(label, (list, tuple)) else []


def check_layout(
    root: Path,
    name: str,
    layout: str,
    has_layout: Callable[[Path], bool],
    parts: Sequence[str],
    otherwise: Callable[[Path], str] = lambda root: "",
) -> None:
    """Raise one sentence that names the right folder if ``root`` is one level too high or too low.

    Args:
        root: the folder that was given.
        name: name of the data set.
        layout: what is expected, in words.
        has_layout: whether a folder has it.
        parts: names of the folders inside the right one.
        otherwise: what else may be wrong with ``root``, in words; asked before looking one level below.

    Raises:
        FileNotFoundError: ``root`` has not the layout.
    """
    if has_layout(root):
        return
    fix = f"expected {layout}"
    if root.name in parts and has_layout(root.parent):
        fix += f"; you are one level too low, use {root.parent}"
    elif hint := otherwise(root):
        fix += f"; {hint}"
    elif root.is_dir() and (below := [child for child in sorted(root.iterdir()) if has_layout(child)]):
        fix += f"; you are one level too high, use {below[0]}"
    raise FileNotFoundError(f"No {name} data in {root}: {fix}.")


def named_folders(root: Path, folders: Sequence[str]) -> tuple[Path, Path]:
    """Return the folder of images and that of masks under the names a config gives.

    Raises:
        ValueError: not two names.
        FileNotFoundError: no such folder.
    """
    if isinstance(folders, str) or len(folders) != 2:
        raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
    for name in folders:
        if not (root / name).is_dir():
            raise FileNotFoundError(f"There is no folder {root / name}: correct `folders` or dataset_dir.")
    return root / folders[0], root / folders[1]


def file_id(file: Path) -> str:
    """Return the name without its suffix, ``.nii.gz`` counting as one: `imagesTr/la_003.nii.gz` -> `la_003`."""
    return file.name.removesuffix(".gz").removesuffix(".nii") if file.name.endswith((".nii.gz", ".nii")) else file.stem


def files_by_id(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, ending: str = "") -> dict[str, Path]:
    """Map id to file; hidden files (such as macOS `._*`) and files of other kinds are ignored.

    Args:
        folder: where to look, not below.
        suffixes: the kinds of file.
        ending: what the names end with before the suffix, e.g. ``_mask``; it is no part of the id.

    Returns:
        Files sorted by id.

    Raises:
        ValueError: two files have one id.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.name.lower().endswith(tuple(suffixes)) or not file.is_file():
            continue
        name = file_id(file)
        if not name.endswith(ending):
            continue
        name = name.removesuffix(ending)
        if name in files:
            raise ValueError(f"{files[name]} and {file} have the same id '{name}': keep one of them.")
        files[name] = file
    return dict(sorted(files.items()))


def pair(
    images: Mapping[str, Path], masks: Mapping[str, Path], size: Callable[[Path], tuple[int, ...]] | None = None
) -> list[Item]:
    """Make one item per image and mask of one id; each is its own group.

    Args:
        images: files by id.
        masks: files by id.
        size: reads the size of a file; None takes that of a picture.

    Raises:
        FileNotFoundError: there is no image, or an image or mask has no partner.
        DataProblems: files that cannot be read, or masks of another size than their image.
    """
    check_partners(images.keys() - masks.keys(), images, "mask", masks)
    check_partners(masks.keys() - images.keys(), masks, "image", images)
    items: list[Item] = []
    problems: list[str] = []
    for name, image in images.items():
        items.append({"image": str(image), "label": str(masks[name]), "id": name, "group": name})
        problems += size_problems(image, [masks[name]], size or image_size)
    if problems:
        raise DataProblems(problems)
    return items


def check_partners(alone: Iterable[str], files: Mapping[str, Path], partner: str, others: Mapping[str, Path]) -> None:
    """Raise one sentence about all files without a partner.

    Raises:
        FileNotFoundError: ``alone`` is not empty.
    """
    if alone := set(alone):
        folder = files[min(alone)].parent
        beside = f" in {next(iter(others.values())).parent}" if others else ""
        raise FileNotFoundError(
            f"{some(alone)} in {folder} lack(s) a {partner} of the same name{beside}: "
            "add the missing file(s) or remove these."
        )


def size_problems(image: Path, masks: Sequence[Path], size: Callable[[Path], tuple[int, ...]]) -> list[str]:
    """Return a sentence for each file that cannot be read and each mask of another size than its image."""
    sizes: list[tuple[int, ...]] = []
    for file in (image, *masks):
        try:
            sizes.append(size(file))
        except ValueError as error:
            return [str(error)]
    words = ["x".join(map(str, found)) for found in sizes]
    unit = "pixels" if len(sizes[0]) == 2 else "voxels"
    return [
        f"Mask {mask} is {word} {unit} but its image is {words[0]}: replace one by the file of the original archive."
        for mask, word, found in zip(masks, words[1:], sizes[1:], strict=True)
        if found != sizes[0]
    ]


def image_size(file: Path) -> tuple[int, ...]:
    """Width and height in pixels; only the header is read.

    Raises:
        ValueError: the file is no picture.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: replace it by an intact copy.") from error


def plain_items(
    folders: Sequence[Path], what: str = "images", suffixes: Sequence[str] = IMAGE_SUFFIXES, skip: str = ""
) -> list[Item]:
    """List what is to be predicted: the files of the first folder that has any.

    Args:
        folders: where to look, the folder that was given last.
        what: what the files are, in words.
        suffixes: the kinds of file.
        skip: regular expression of ids that are no images.

    Returns:
        Items with "image" and "id", in natural order of the ids.

    Raises:
        FileNotFoundError: there is no such folder or no file in it.
        ValueError: two files with one id.
    """
    for folder in folders:
        files = files_by_id(folder, suffixes) if folder.is_dir() else {}
        names = [name for name in files if not (skip and re.search(skip, name))]
        if names:
            return [{"image": str(files[name]), "id": name} for name in sorted(names, key=natural)]
    inside = " or ".join(f"{folder.name}/" for folder in folders[:-1])
    raise FileNotFoundError(
        f"No {what} to predict in {folders[-1]}: expected {' or '.join(suffixes)} files in it"
        + (f" or in its folder {inside}." if inside else ".")
    )


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which numbers within a name count as numbers: `benign (2)` comes before `benign (10)`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def some(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names and count the others."""
    names = sorted(names, key=natural)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
