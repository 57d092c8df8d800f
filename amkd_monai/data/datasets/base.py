"""What a layout of a data set offers: its items, their sections, and the images to predict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from amkd_monai.data.layout import given_sections, plain_items
from amkd_monai.data.splits import DEFAULT_SPLIT, Item, Sections, SplitOptions, k_fold, random_split
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES

logger = logging.getLogger("amkd_monai")


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

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of image files."""
        return VOLUME_SUFFIXES if self.volumes else PICTURE_SUFFIXES

    def inference_items(self, root: str | Path) -> list[Item]:
        """List the images to predict, {"image", "id"}: those of an official layout, else the folder's own files."""
        folders = [Path(root) / name for name in (*self.predict_in, ".")]
        return plain_items(folders, "volumes" if self.volumes else "images", self.suffixes)

    def split(self, root: Path, items: list[Item], how: SplitOptions = DEFAULT_SPLIT) -> Sections:
        """Keep official sections (of train and test alone, validation is taken from train), else draw them."""
        if {"train", "test"} <= {item.get("section") for item in items}:
            train, validation, test = given_sections([item for item in items if "section" in item])
            if not validation:
                share = how.fractions[0] / (how.fractions[0] + how.fractions[1])
                train, validation, _ = random_split(train, (share, 1 - share, 0), how.seed)
            return train, validation, test
        items = [{key: value for key, value in item.items() if key != "section"} for item in items]
        if self.validation_fraction is None:
            logger.info("No official split in %s: splitting at random by %s.", root, tuple(how.fractions))
            return random_split(items, how.fractions, how.seed)
        logger.info("No official split in %s: fold %d of %d.", root, how.fold, how.folds)
        return k_fold(items, how.folds, how.fold, self.validation_fraction, how.seed)
