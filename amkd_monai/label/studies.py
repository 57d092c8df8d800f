"""The folder of studies: MONAI Label's own datastore, with checks of what is uploaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException

from amkd_monai.data.layout import image_size
from amkd_monai.data.masks import read_mask
from amkd_monai.data.volumes import VOLUME_SUFFIXES, volume_shape
from amkd_monai.label.requests import answerable

AFFINE_TOLERANCE = 1e-2
"""Largest difference (mm) between the affines of a label and its volume; clients write them in 32 bits."""


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
            _shape(Path(image_filename))
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
        if not _is_volume(image):
            height, width = read_mask([label]).shape
            shape: tuple[int, ...] = (width, height)
        else:
            shape = volume_shape(label)
        if shape != _shape(image):
            raise ValueError(f"it is {'x'.join(map(str, shape))}, the image {'x'.join(map(str, _shape(image)))}.")
        if _is_volume(image) and not np.allclose(
            nibabel.load(image).affine, nibabel.load(label).affine, atol=AFFINE_TOLERANCE
        ):
            raise ValueError("its affine is not that of the image.")


def read_class(label: Path) -> str:
    """Read the class in a label file ``{"class": name}``.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return str(json.loads(label.read_text())["class"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError('a class label must be JSON such as {"class": "melanoma"}.') from error


def _is_volume(file: Path) -> bool:
    return file.name.lower().endswith(VOLUME_SUFFIXES)


def _shape(file: Path) -> tuple[int, ...]:
    return volume_shape(file) if _is_volume(file) else image_size(file)


def _plain_name(name: str) -> None:
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"'{name}' cannot be the name of an image: use one without a folder.")
