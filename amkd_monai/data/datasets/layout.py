"""How the files of a data set lie in its folder: what all layouts share, and folders of images and masks."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amkd_monai.data import splits
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions
from amkd_monai.files import names
from amkd_monai.files.masks import other_size
from amkd_monai.files.names import natural, some
from amkd_monai.files.pictures import picture_frame
from amkd_monai.files.volumes import check_grid, volume_grid
from amkd_monai.terminal import logger

SECTIONS = ("train", "validation", "test")


class Layout:
    """How the files of a data set lie in its folder and are divided; a subclass reads one layout.

    ``find_items(root, cache_dir=None, **options)`` lists the labelled items with "image", "label", "id" and "group";
    "section" is an official one, "problem" says why an item cannot be used. A label is a mask file, several mask files,
    or a class index. Further parameters are the data set's options. It raises FileNotFoundError or ValueError, one
    sentence that names the file, where the folder does not have the layout or contradicts itself.

    Attributes:
        title: name of the data set in messages.
        expected: the layout in words.
        predict_in: folders that may hold the images to predict; the data set's own folder is looked at last.
        volumes: images are NIfTI volumes, not pictures.
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
        if self.is_in(root.parent):
            fix += f"; you are one level too low, use {root.parent}"
        elif root.is_dir() and (below := [child for child in sorted(root.iterdir()) if self.is_in(child)]):
            fix += f"; you are one level too high, use {below[0]}"
        if any(root.rglob("*.dcm")):
            fix += "; DICOM series are predicted, for training convert them to NIfTI, for example by dcm2niix"
        raise FileNotFoundError(f"No {self.title} data in {root}: {fix}.")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of image files."""
        return names.VOLUME_SUFFIXES if self.volumes else names.PICTURE_SUFFIXES

    def inference_items(self, root: Path) -> list[Item]:
        """List the images to predict, {"image", "id"}: those of an official layout, else the folder's own files."""
        for folder in (root / name for name in (*self.predict_in, ".")):
            if folder.is_dir() and (files := names.images_to_predict(folder, self.suffixes)):
                return [{"image": str(files[name]), "id": name} for name in sorted(files, key=natural)]
        what, places = "volumes" if self.volumes else "images", " or ".join(["it", *self.predict_in])
        raise FileNotFoundError(f"No {what} to predict in {root}: expected {' or '.join(self.suffixes)} in {places}.")

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Keep official sections (of train and test alone, validation is taken from train), else draw them."""
        if {"train", "test"} <= {item.get("section") for item in items}:
            train, validation, test = _official_sections(items)
            if not validation:
                share = how.fractions[0] / (how.fractions[0] + how.fractions[1])
                train, validation, _ = splits.random_split(train, (share, 1 - share, 0), how.seed)
            return train, validation, test
        items = [splits.without(item, "section") for item in items]
        if self.validation_fraction is None:
            logger.info("No official split in %s: splitting at random by %s.", root, tuple(how.fractions))
            return splits.random_split(items, how.fractions, how.seed)
        logger.info("No official split in %s: fold %d of %d.", root, how.fold, how.folds)
        return splits.k_fold(items, how.folds, how.fold, self.validation_fraction, how.seed)


def _official_sections(items: Iterable[Item]) -> Sections:
    """Split items by their "section", which is dropped; a group stays in the latest section that has it.

    What would leak from test into validation or training, or from validation into training, is left out there.
    """
    sections: dict[str, list[Item]] = {name: [] for name in SECTIONS}
    for item in sorted(items, key=lambda item: str(item["id"])):
        sections[item["section"]].append(splits.without(item, "section"))
    taken: set[str] = set()
    for name in reversed(SECTIONS):
        kept = [item for item in sections[name] if item["group"] not in taken]
        if len(kept) < len(sections[name]):
            lost = {item["id"] for item in sections[name]} - {item["id"] for item in kept}
            logger.warning("Left out of %s, as the same images lie in a later section: %s.", name, some(lost))
        sections[name] = kept
        taken |= {item["group"] for item in kept}
    return sections["train"], sections["validation"], sections["test"]


def pair(images: Mapping[str, Path], masks: Mapping[str, Path], volumes: bool = False) -> list[Item]:
    """Make one item per image and mask of one id, each its own group; one without partner is a FileNotFoundError."""
    check_partners(images, masks)
    items: list[Item] = [{"image": str(images[i]), "label": str(masks[i]), "id": i, "group": i} for i in images]
    return [checked(item, volumes) for item in items]


def check_partners(images: Mapping[str, Path], masks: Mapping[str, Path]) -> None:
    """Raise a FileNotFoundError that names all images without mask, or masks without image, if there are any."""
    for files, others, partner in ((images, masks, "mask"), (masks, images, "image")):
        if alone := files.keys() - others.keys():
            place = f" in {next(iter(others.values())).parent}" if others else ""
            where = f"{some(alone)} in {files[min(alone)].parent}"
            raise FileNotFoundError(f"{where} lack(s) a {partner} of the same name{place}: add it or remove these.")


def checked(item: Item, volumes: bool = False) -> Item:
    """Return an item, with what is wrong with the headers of its files, if anything is, under "problem"."""
    image, masks = item["image"], names.label_files(item)
    try:
        if volumes:
            grid = volume_grid(image)
            for mask in masks:
                check_grid(mask, volume_grid(mask), grid)
        else:
            (size, tag), *of_masks = map(picture_frame, (image, *masks))
            for mask, (found, own) in zip(masks, of_masks, strict=True):
                if found != size and not ((tag >= 5) != (own >= 5) and found == size[::-1]):
                    raise ValueError(other_size(mask, found, size))
    except ValueError as error:
        return {**item, "problem": str(error)}
    return item


def check_ids(rows: Collection[str], images: Collection[str], table: Path, folder: Path) -> None:
    """Refuse an id without image (FileNotFoundError) and an image without label (ValueError)."""
    if lost := set(rows) - set(images):
        raise FileNotFoundError(f"{table} names id(s) without an image in {folder}: {some(lost)}; remove the line(s).")
    if unnamed := set(images) - set(rows):
        raise ValueError(f"{folder} holds image(s) that {table} does not name: {some(unnamed)}; remove them.")


def report_conflicts(items: Iterable[Item], classes: Sequence[str]) -> None:
    """Warn of identical images with different classes; they stay, in one group."""
    members: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[item["group"]].append(item)
    groups = [group for group in members.values() if len({item["label"] for item in group}) > 1]
    listed = "; ".join(", ".join(f"{item['id']} ({classes[item['label']]})" for item in group) for group in groups)
    if groups:
        logger.warning("%d group(s) of identical images have conflicting labels: %s.", len(groups), listed)


@dataclass(frozen=True)
class Pairs(Layout):
    """Images and masks of the same names in two folders.

    Attributes:
        title, expected, predict_in, volumes: see :class:`Layout`.
        folders: names of the two folders, images and masks; the first two that are there are taken.
        official: the two folders of the sections "train" and "test", which are looked for before ``folders``.
        file_lists: files of ids, training and test, which fix the sections if they are there.
        duplicate_distance: bits in which the perceptual hashes of one group differ at most, see
            :func:`~amkd_monai.data.splits.group_near_duplicates`; None: a group has byte-identical images only.
    """

    title: str = "image and mask"
    expected: str = "the folders images/ and masks/ with one file each per image"
    folders: Sequence[tuple[str, str]] = (("images", "masks"),)
    official: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    file_lists: tuple[str, str] | None = None
    duplicate_distance: int | None = None
    predict_in: Sequence[str] = ("images",)
    volumes: bool = False

    def find_items(
        self,
        root: Path,
        cache_dir: str | Path | None = None,
        folders: Sequence[str] | None = None,
        mask_ending: str = "",
        duplicate_distance: int | None = None,
    ) -> list[Item]:
        """List all pairs in natural order; of pictures only headers are read.

        Args:
            root: the folder of the data set.
            cache_dir: keeps perceptual hashes.
            folders: the folder of images and that of masks, relative to ``root``; they may be one folder.
            mask_ending: what the names of masks end with before the suffix, e.g. ``_mask``.
            duplicate_distance: replaces the attribute; of pictures only.
        """
        if folders is None and _all_there(root, self.official.values()):
            parts = {section: self._pairs(root, pair, mask_ending) for section, pair in self.official.items()}
            items = [{**item, "section": section} for section, part in parts.items() for item in part]
            if twice := set.intersection(*({item["id"] for item in part} for part in parts.values())):
                raise ValueError(f"{root} has {some(twice)} in both sections: rename one of the two.")
        else:
            if folders is None:
                self.check(root)
                folders = next(pair for pair in self.folders if _all_there(root, [pair]))
            items = self._pairs(root, folders, mask_ending)
        distance = self.duplicate_distance if duplicate_distance is None else duplicate_distance
        if distance is None:
            items = splits.group_identical_images(items)
        elif self.volumes:
            raise ValueError("duplicate_distance compares pictures, not volumes: leave it out.")
        else:
            items = splits.group_near_duplicates(items, distance, cache_dir)
        return sorted(items, key=lambda item: natural(item["id"]))

    def _pairs(self, root: Path, folders: Sequence[str], ending: str) -> list[Item]:
        if isinstance(folders, str) or len(folders) != 2:
            raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
        images, masks = root / folders[0], root / folders[1]
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no folder {folder}: correct `folders` or dataset_dir.")
        beside = [ending] if images == masks and ending else []
        found = names.files_by_id(images, self.suffixes, beside=beside)
        if not found:
            raise FileNotFoundError(f"No images in {images}: expected {self.expected}.")
        return pair(found, names.files_by_id(masks, self.suffixes, ending), self.volumes)

    def is_in(self, folder: Path) -> bool:
        """Whether the folders of images and masks are there."""
        return any(_all_there(folder, pairs) for pairs in (self.official.values(), *([pair] for pair in self.folders)))

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Split by the file lists, where they are, else as :class:`Layout` does; what they do not name is left out."""
        lists = [root / name for name in self.file_lists or ()]
        absent = [file for file in lists if not file.is_file()]
        if len(absent) == len(lists):
            return super().split(root, items, how)
        if absent:
            pair = " and ".join(file.name for file in lists)
            raise FileNotFoundError(f"File list {absent[0]} is missing: give both {pair}, or none.")
        known = {item["id"]: item for item in items}
        train, test = (_read_ids(file, known) for file in lists)
        if both := train & test:
            raise ValueError(f"{some(both)} stand(s) in both {lists[0]} and {lists[1]}: keep each id in one list.")
        if unlisted := known.keys() - train - test:
            logger.warning("Left out, as they stand in neither file list in %s: %s.", root, some(unlisted))
        listed = [{**known[i], "section": s} for s, ids in (("train", train), ("test", test)) for i in ids]
        return super().split(root, listed, how)


def _all_there(root: Path, pairs: Collection[tuple[str, str]]) -> bool:
    return bool(pairs) and all((root / name).is_dir() for pair in pairs for name in pair)


def _read_ids(file: Path, known: Collection[str]) -> set[str]:
    """Read one id a line; blank lines are skipped and an image suffix is dropped."""
    ids = {names.without_suffix(line.strip()) for line in names.read_text(file).splitlines() if line.strip()}
    if not ids:
        raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
    if unknown := ids - set(known):
        raise ValueError(f"File list {file} names ids without an image: {some(unknown)}.")
    return ids
