"""What the layouts of data sets share: the right folder, images and their labels, classes in tables, sections."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from amkd_monai.data.splits import Item, Sections
from amkd_monai.files.masks import other_size
from amkd_monai.files.names import PICTURE_SUFFIXES, images_to_predict, natural, some
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid

logger = logging.getLogger("amkd_monai")

SECTIONS = ("train", "validation", "test")


def check_layout(
    root: Path,
    name: str,
    layout: str,
    has_layout: Callable[[Path], bool],
    parts: Sequence[str],
    otherwise: Callable[[Path], str] = lambda root: "",
) -> None:
    """Raise a FileNotFoundError that names the right folder if ``root`` is one level too high or too low.

    Args:
        root: the folder that was given.
        name: name of the data set.
        layout: what is expected, in words.
        has_layout: whether a folder has it.
        parts: names of the folders inside the right one.
        otherwise: what else may be wrong with ``root``, in words; asked before looking one level below.
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
    """Return the folders of images and of masks under the two names a config gives."""
    if isinstance(folders, str) or len(folders) != 2:
        raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
    for name in folders:
        if not (root / name).is_dir():
            raise FileNotFoundError(f"There is no folder {root / name}: correct `folders` or dataset_dir.")
    return root / folders[0], root / folders[1]


def pair(
    images: Mapping[str, Path],
    masks: Mapping[str, Path],
    problem: Callable[[Path, Sequence[Path]], str] | None = None,
) -> list[Item]:
    """Make one item per image and mask of one id; each is its own group.

    An item whose files cannot be read, or do not lie on each other, says so under "problem", by the words of
    ``problem`` (:func:`picture_problem` by default). An image or mask without partner is a FileNotFoundError.
    """
    check_partners(images.keys() - masks.keys(), images, "mask", masks)
    check_partners(masks.keys() - images.keys(), masks, "image", images)
    items: list[Item] = []
    for name, image in images.items():
        items.append({"image": str(image), "label": str(masks[name]), "id": name, "group": name})
        mark_problem(items[-1], (problem or picture_problem)(image, [masks[name]]))
    return items


def mark_problem(item: Item, problem: str) -> None:
    """Write under "problem" what is wrong with an item, unless nothing is."""
    if problem:
        item["problem"] = problem


def check_partners(alone: Iterable[str], files: Mapping[str, Path], partner: str, others: Mapping[str, Path]) -> None:
    """Raise a FileNotFoundError about all files without a partner, if there are any."""
    if alone := set(alone):
        folder = files[min(alone)].parent
        beside = f" in {next(iter(others.values())).parent}" if others else ""
        raise FileNotFoundError(
            f"{some(alone)} in {folder} lack(s) a {partner} of the same name{beside}: "
            "add the missing file(s) or remove these."
        )


def picture_problem(image: Path, masks: Sequence[Path]) -> str:
    """Say what is wrong with the headers of a picture and its masks; empty if nothing is."""
    try:
        (size, tag), *of_masks = map(picture_frame, (image, *masks))
    except ValueError as error:
        return str(error)
    for mask, (found, own) in zip(masks, of_masks, strict=True):
        if found != size and not ((tag >= 5) != (own >= 5) and found == size[::-1]):
            return other_size(mask, found, size)
    return ""


def volume_problem(image: Path, masks: Sequence[Path]) -> str:
    """Say what is wrong with the headers of a volume and its labels; empty if nothing is."""
    try:
        grid = volume_grid(image)
        for mask in masks:
            check_grid(mask, volume_grid(mask), grid)
    except ValueError as error:
        return str(error)
    return ""


def plain_items(
    folders: Sequence[Path], what: str = "images", suffixes: Sequence[str] = PICTURE_SUFFIXES
) -> list[Item]:
    """List what is to be predicted: the images of the first folder that has any, as items with "image" and "id".

    Args:
        folders: where to look, the folder that was given last.
        what: what the files are, in words.
        suffixes: the kinds of file.

    Raises:
        FileNotFoundError: there is no such folder or no image in it.
    """
    for folder in folders:
        if folder.is_dir() and (files := images_to_predict(folder, suffixes)):
            return [{"image": str(files[name]), "id": name} for name in sorted(files, key=natural)]
    inside = " or ".join(f"{folder.name}/" for folder in folders[:-1])
    raise FileNotFoundError(
        f"No {what} to predict in {folders[-1]}: expected {' or '.join(suffixes)} files in it"
        + (f" or in its folder {inside}." if inside else ".")
    )


def check_ids(rows: Collection[str], images: Collection[str], table: Path, folder: Path) -> None:
    """Refuse an id without image (FileNotFoundError) and an image without label (ValueError)."""
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
