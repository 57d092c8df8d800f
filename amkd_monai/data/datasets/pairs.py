"""Folders of pairs: one folder of images and one of masks, with one file of a name in each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amkd_monai.data.datasets.base import Layout, pair
from amkd_monai.data.duplicates import group_identical_images, group_near_duplicates
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions
from amkd_monai.files.names import PICTURE_SUFFIXES, files_by_id, has_suffix, natural, read_text, some

logger = logging.getLogger("amkd_monai")


@dataclass(frozen=True)
class Pairs(Layout):
    """Images and masks of the same names in two folders.

    Attributes:
        title, expected, predict_in, volumes: see :class:`Layout`.
        folders: names of the two folders, images and masks; the first two that are there are taken.
        official: the two folders of the sections "train" and "test", which are looked for before ``folders``.
        file_lists: files of ids, training and test, which fix the sections if they are there.
        duplicate_distance: bits in which the perceptual hashes of one group differ at most, see
            :func:`~amkd_monai.data.duplicates.group_near_duplicates`; None: a group has byte-identical images only.
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
        root: str | Path,
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
        root = Path(root)
        if folders is None and _all_there(root, self.official.values()):
            items = [
                {**item, "section": section}
                for section, names in self.official.items()
                for item in self._pairs(root, names, mask_ending)
            ]
            ids = [item["id"] for item in items]
            if twice := {name for name in ids if ids.count(name) > 1}:
                raise ValueError(f"{root} has {some(twice)} in both sections: rename one of the two.")
        else:
            if folders is None:
                self.check(root)
                folders = next(names for names in self.folders if _all_there(root, [names]))
            items = self._pairs(root, folders, mask_ending)
        distance = self.duplicate_distance if duplicate_distance is None else duplicate_distance
        if distance is None:
            items = group_identical_images(items)
        elif self.volumes:
            raise ValueError("duplicate_distance compares pictures, not volumes: leave it out.")
        else:
            items = group_near_duplicates(items, distance, cache_dir)
        return sorted(items, key=lambda item: natural(item["id"]))

    def _pairs(self, root: Path, folders: Sequence[str], ending: str) -> list[Item]:
        if isinstance(folders, str) or len(folders) != 2:
            raise ValueError(f"folders must name two folders, images and masks, not {folders}.")
        images, masks = root / folders[0], root / folders[1]
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no folder {folder}: correct `folders` or dataset_dir.")
        found, labels = files_by_id(images, self.suffixes), files_by_id(masks, self.suffixes, ending)
        if images == masks and ending:
            found = {name: file for name, file in found.items() if not name.endswith(ending)}
        if not found:
            raise FileNotFoundError(f"No images in {images}: expected {self.expected}.")
        return pair(found, labels, self.volumes)

    def is_in(self, folder: Path) -> bool:
        """Whether the folders of images and masks are there."""
        return any(_all_there(folder, pairs) for pairs in (self.official.values(), *([f] for f in self.folders)))

    def hint(self, root: Path) -> str:
        """Tell that volumes are another task."""
        volumes = not self.volumes and (any(root.glob("*.nii*")) or any(root.glob("*/*.nii*")))
        return "it holds volumes, use a task for volumes such as covid_volumes" if volumes else ""

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Split by the file lists, where they are, else as :class:`Layout` does."""
        return super().split(root, self._listed(Path(root), items), how)

    def _listed(self, root: Path, items: list[Item]) -> list[Item]:
        """Return the items that the file lists name, with their sections; all items if there are no lists."""
        lists = [root / name for name in self.file_lists or ()]
        absent = [file for file in lists if not file.is_file()]
        if len(absent) == len(lists):
            return items
        if absent:
            raise FileNotFoundError(
                f"File list {absent[0]} is missing: give both {' and '.join(file.name for file in lists)}, or none."
            )
        known = {item["id"]: item for item in items}
        train, test = (_read_ids(file, known) for file in lists)
        if both := train & test:
            raise ValueError(f"{some(both)} stand(s) in both {lists[0]} and {lists[1]}: keep each id in one list.")
        if unlisted := known.keys() - train - test:
            logger.warning("Left out, as they stand in neither file list in %s: %s.", root, some(unlisted))
        return [{**known[name], "section": s} for s, names in (("train", train), ("test", test)) for name in names]


def _all_there(root: Path, pairs: Collection[tuple[str, str]]) -> bool:
    return bool(pairs) and all((root / name).is_dir() for names in pairs for name in names)


def _read_ids(file: Path, known: Collection[str]) -> set[str]:
    """Read one id a line; blank lines are skipped and an image suffix is dropped."""
    names = (line.strip() for line in read_text(file).splitlines())
    ids = {Path(name).stem if has_suffix(name, PICTURE_SUFFIXES) else name for name in names if name}
    if not ids:
        raise ValueError(f"File list {file} is empty: write one id a line, or remove both lists.")
    if unknown := ids - set(known):
        raise ValueError(f"File list {file} names ids without an image: {some(unknown)}.")
    return ids
