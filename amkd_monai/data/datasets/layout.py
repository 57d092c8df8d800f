"""Images to predict, sections, and checks of items."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from amkd_monai.data import splits
from amkd_monai.data.splits import Item, Sections, SplitOptions
from amkd_monai.files import cases, names
from amkd_monai.files.masks import other_size
from amkd_monai.files.names import natural, some
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid
from amkd_monai.terminal import logger

SECTIONS = ("train", "validation", "test")
FOLDS = 5


def listed_images(root: Path, places: Sequence[str], volumes: bool) -> list[Item]:
    """List the images to predict, {"image", "id"}: those of the first of some folders that has any, the root's last."""
    suffixes = names.VOLUME_SUFFIXES if volumes else names.PICTURE_SUFFIXES
    for folder in (root / name for name in (*places, ".")):
        folder = folder / folder.name if (folder / folder.name).is_dir() else folder
        files = names.images_to_predict(folder, suffixes) if folder.is_dir() else {}
        if volumes and folder.is_dir():
            files |= {names.file_id(series): series for series in cases.series_folders(folder)}
        if files:
            return [{"image": str(files[name]), "id": name} for name in sorted(files, key=natural)]
    what, where = "volumes" if volumes else "images", " or ".join(["it", *places])
    raise FileNotFoundError(f"No {what} to predict in {root}: expected {' or '.join(suffixes)} in {where}.")


def divided(root: Path, items: list[Item], how: SplitOptions, validation_fraction: float | None) -> Sections:
    """Keep official sections (of train and test alone, validation is taken from train), else, or by folds, draw."""
    official = how.folds is None and {"train", "test"} <= {item.get("section") for item in items}
    folds = None if official else how.folds or (FOLDS if validation_fraction else None)
    if folds is None and how.fold:
        raise ValueError(f"fold is {how.fold}, but {root} is not split into folds: give `folds`, too.")
    if official:
        train, validation, test = _official_sections(items)
        if not validation:
            share = how.fractions[0] / sum(how.fractions[:2])
            train, validation, _ = splits.random_split(train, (share, 1 - share, 0), how.seed)
        return train, validation, test
    items = [splits.without(item, "section") for item in items]
    if folds is None:
        logger.info("No official split in %s: splitting at random by %s.", root, tuple(how.fractions))
        return splits.random_split(items, how.fractions, how.seed)
    share = validation_fraction or how.fractions[1] / (sum(how.fractions[:2]) or 1)
    logger.info("The test section of %s is fold %d of %d.", root, how.fold, folds)
    return splits.k_fold(items, folds, how.fold, share, how.seed)


def _official_sections(items: Iterable[Item]) -> Sections:
    """Split items by their "section", which is dropped; a group stays in the latest section that has it.

    What would leak from test into validation or training, or from validation into training, is left out there.
    """
    sections: dict[str, list[Item]] = {name: [] for name in SECTIONS}
    for item in sorted(items, key=lambda item: str(item["id"])):
        sections[item["section"]].append(splits.without(item, "section"))
    taken: set[str] = set()
    for name in reversed(SECTIONS):
        if lost := [item["id"] for item in sections[name] if item["group"] in taken]:
            logger.warning("Left out of %s, as the same images lie in a later section: %s.", name, some(lost))
        sections[name] = [item for item in sections[name] if item["group"] not in taken]
        taken |= {item["group"] for item in sections[name]}
    return sections["train"], sections["validation"], sections["test"]


def checked(item: Item, volumes: bool = False, channels: int = 1) -> Item:
    """Return an item, with what is wrong with the headers of its files, if anything is, under "problem"."""
    (image, *others), masks = names.files_of(item["image"]), names.label_files(item)
    try:
        if volumes:
            grid, count = cases.case_grid([image, *others])
            if count != channels:
                raise ValueError(f"{image} gives {count} channel(s), not {channels}: give all, or take it out.")
            for file in masks:
                check_grid(file, volume_grid(file), grid)
        else:
            (size, tag), *of_masks = map(picture_frame, (image, *others, *masks))
            for mask, (found, own) in zip((*others, *masks), of_masks, strict=True):
                if found != size and not ((tag >= 5) != (own >= 5) and found == size[::-1]):
                    same = f"{mask} has another size than {image}: all channels of an image need one size."
                    raise ValueError(other_size(mask, found, size) if mask in masks else same)
    except ValueError as error:
        return {**item, "problem": str(error)}
    return item


def report_conflicts(items: Iterable[Item], name_of: Callable[[int], str]) -> None:
    """Warn of identical images with different classes; they stay, in one group."""
    members: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[item["group"]].append(item)
    groups = [group for group in members.values() if len({item["label"] for item in group}) > 1]
    listed = "; ".join(", ".join(f"{item['id']} ({name_of(item['label'])})" for item in group) for group in groups)
    if groups:
        logger.warning("%d group(s) of identical images have conflicting labels: %s.", len(groups), listed)
