"""The folder of studies: MONAI Label's own datastore, with checks of what is uploaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException

from amkd_monai.files.masks import read_mask
from amkd_monai.files.names import VOLUME_SUFFIXES, has_suffix
from amkd_monai.files.pictures import picture_size
from amkd_monai.files.volumes import read_label_volume, volume_grid
from amkd_monai.label.requests import answerable


class Studies(LocalDatastore):
    """Images of one folder and the labels saved for them; refuses files that training could not read.

    Args:
        folder: of the images; labels come into its folder ``labels/``.
        suffixes: kinds of image that the served models take.
        classes: names of classes that a label may hold.
    """

    def __init__(self, folder: str, suffixes: Sequence[str], classes: Sequence[str]) -> None:
        self._classes = tuple(classes)
        super().__init__(
            folder,
            extensions=[f"*{suffix}" for suffix in suffixes],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image; a file that cannot be read, or a name with a folder in it, is refused."""
        with answerable():
            _plain_name(image_id)
            _check_image(Path(image_filename))
        return str(super().add_image(image_id, image_filename, image_info))

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label: a mask on the image's grid, or ``{"class": name}`` as JSON."""
        with answerable():
            if label_tag not in (DefaultLabelTag.FINAL.value, DefaultLabelTag.ORIGINAL.value):
                raise ValueError(f"There is no tag '{label_tag}': use final or original.")
        image = self.get_image_uri(image_id)
        if not image:
            raise ImageNotFoundException(f"There is no image '{image_id}' in the studies.")
        with answerable():
            try:
                self._check_label(Path(image), Path(label_filename))
            except ValueError as error:
                raise ValueError(f"The label for {image_id} is refused: {error}") from error
        return str(super().save_label(image_id, label_filename, label_tag, label_info))

    def _check_label(self, image: Path, label: Path) -> None:
        if label.suffix == ".json":
            name = read_class(label)
            if name not in self._classes:
                raise ValueError(f"'{name}' is none of the classes {', '.join(self._classes) or '(none is served)'}.")
            return
        if has_suffix(image, VOLUME_SUFFIXES):
            read_label_volume(label, volume_grid(image))
        else:
            read_mask([label], image)


def read_class(label: Path) -> str:
    """Read the class in a label file ``{"class": name}``.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return str(json.loads(label.read_text())["class"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError('a class label must be JSON such as {"class": "melanoma"}.') from error


def _check_image(file: Path) -> None:
    if has_suffix(file, VOLUME_SUFFIXES):
        volume_grid(file)
    else:
        picture_size(file)


def _plain_name(name: str) -> None:
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"'{name}' cannot be the name of an image: use one without a folder.")
