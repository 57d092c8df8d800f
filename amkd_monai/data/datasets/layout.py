"""File layouts of data sets: what all share."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from amkd_monai.data import splits
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions
from amkd_monai.files import cases, names
from amkd_monai.files.masks import other_size
from amkd_monai.files.names import natural, some
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid
from amkd_monai.terminal import logger

SECTIONS = ("train", "validation", "test")
FOLDS = 5


class Layout:
    """How the files of a data set lie in its folder and are divided; a subclass reads one layout.

    ``find_items(root, cache_dir=None, **options)`` lists the labelled items with "image", "label", "id" and "group";
    "section" is an official one, "problem" says why an item cannot be used. A label is a mask file, several mask files,
    or a class index. A FileNotFoundError or ValueError if the folder lacks the layout or contradicts itself.

    Attributes:
        title, expected: name of the data set and the layout in words, for messages.
        predict_in: folders that may hold the images to predict; the data set's own folder is looked at last.
        volumes: images are NIfTI volumes or folders of DICOM slices, not pictures.
        validation_fraction: part of the items outside the test fold that validates, where a data set without sections
            of its own is cross-validated; None: it is split at random.
    """

    find_items: Callable[..., list[Item]]
    title: str
    expected: str
    predict_in: Sequence[str] = ()
    volumes: bool = False
    validation_fraction: float | None = None

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has the layout."""
        raise NotImplementedError

    def check(self, root: Path) -> None:
        """Raise a FileNotFoundError that names the right folder if ``root`` is one level too high or too low."""
        if self.is_in(root):
            return
        fix = f"expected {self.expected}"
        if root.is_dir() and (below := [child for child in sorted(root.iterdir()) if self.is_in(child)]):
            fix += f"; you are one level too high, use {below[0]}"
        elif self.is_in(root.parent):
            fix += f"; you are one level too low, use {root.parent}"
        if any(root.rglob("*.dcm")):
            fix += "; of DICOM, images/<case>/ with the slices of one series and masks/<case>.nii.gz"
        raise FileNotFoundError(f"No {self.title} data in {root}: {fix}.")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of image files."""
        return names.VOLUME_SUFFIXES if self.volumes else names.PICTURE_SUFFIXES

    def inference_items(self, root: Path) -> list[Item]:
        """List the images to predict, {"image", "id"}: those of an official layout, else the folder's own files."""
        for folder in (root / name for name in (*self.predict_in, ".")):
            folder = folder / folder.name if (folder / folder.name).is_dir() else folder
            files = names.images_to_predict(folder, self.suffixes) if folder.is_dir() else {}
            if self.volumes and folder.is_dir():
                files |= {names.file_id(series): series for series in cases.series_folders(folder)}
            if files:
                return [{"image": str(files[name]), "id": name} for name in sorted(files, key=natural)]
        what, places = "volumes" if self.volumes else "images", " or ".join(["it", *self.predict_in])
        raise FileNotFoundError(f"No {what} to predict in {root}: expected {' or '.join(self.suffixes)} in {places}.")

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Keep official sections (of train and test alone, validation is taken from train), else, or by folds, draw."""
        official = how.folds is None and {"train", "test"} <= {item.get("section") for item in items}
        folds = None if official else how.folds or (FOLDS if self.validation_fraction else None)
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
        share = self.validation_fraction or how.fractions[1] / (sum(how.fractions[:2]) or 1)
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
