"""Whether a file can be read to its last pixel."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amkd_monai.data.layout import IMAGE_SUFFIXES
from amkd_monai.data.volumes import VOLUME_SUFFIXES, volume_shape


@dataclass(frozen=True)
class Finding:
    """What one file is.

    Attributes:
        size: (W, H) of a picture, all axes of a volume; empty if it cannot be read.
        mode: of a picture (L, RGB, ...) or the data type of a volume.
        problem: one sentence, empty if there is none.
    """

    size: tuple[int, ...] = ()
    mode: str = ""
    problem: str = ""


def image_files(root: Path) -> Iterator[Path]:
    """Yield all pictures and volumes below a folder, sorted; hidden files and folders are left out."""
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if not hidden and file.is_file() and file.name.lower().endswith((*IMAGE_SUFFIXES, *VOLUME_SUFFIXES)):
            yield file


def inspect_file(file: Path) -> Finding:
    """Read a file as a whole."""
    if file.stat().st_size == 0:
        return Finding(problem=f"{file} has no content: replace it by an intact copy.")
    return _inspect_volume(file) if file.name.endswith(VOLUME_SUFFIXES) else _inspect_picture(file)


def _inspect_picture(file: Path) -> Finding:
    from PIL import Image

    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
            image.draft("L", (64, 64))  # a JPEG is read to its end all the same
            image.load()
            levels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Finding(problem=f"{file} cannot be read as an image ({error}): replace it by an intact copy.")
    if not np.isfinite(levels).all():
        return Finding(size, mode, f"{file} holds values that are not finite: replace it by an intact copy.")
    return Finding(size, mode)


def _inspect_volume(file: Path) -> Finding:
    import nibabel

    try:
        shape = volume_shape(file)
        volume = nibabel.load(file)
        finite = np.isfinite(np.asanyarray(volume.dataobj)).all()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        sentence = str(error)
        if str(file) not in sentence:
            sentence = f"{file} cannot be read as a NIfTI volume ({error}): replace it by an intact copy."
        return Finding(problem=sentence)
    kind = str(volume.get_data_dtype())
    if not finite:
        return Finding(shape, kind, f"{file} holds values that are not finite: replace it by an intact copy.")
    return Finding(shape, kind)
