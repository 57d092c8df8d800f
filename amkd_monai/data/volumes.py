"""NIfTI volumes: what their headers tell without reading the voxels."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

VOLUME_SUFFIXES = (".nii.gz", ".nii")


def affine_problem(affine: np.ndarray) -> str:
    """Say what is wrong with an affine (4, 4): not finite, or not invertible; empty if nothing is."""
    if not np.isfinite(affine).all():
        return "has an affine that is not finite"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        return "has a singular affine, so no voxel size and no orientation"
    return ""


def volume_shape(file: Path) -> tuple[int, ...]:
    """Shape from the header, after a check of the affine and that the file is not cut short.

    Raises:
        ValueError: the file is damaged, no NIfTI volume, not 3D, or its affine cannot be used.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        volume = nibabel.load(file)
        voxels_end = volume.dataobj.offset + math.prod(volume.shape) * volume.get_data_dtype().itemsize
        whole = _is_whole(file, voxels_end)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a NIfTI volume: replace it by an intact copy.") from error
    if not whole:
        raise ValueError(f"{file} ends before its last voxel: replace it by an intact copy.")
    if len(volume.shape) != 3:
        raise ValueError(f"{file} has {len(volume.shape)} axes: give a volume of 3.")
    if problem := affine_problem(volume.affine):
        raise ValueError(f"{file} {problem}: replace it by an intact copy.")
    return tuple(volume.shape)


def _is_whole(file: Path, length: int) -> bool:
    """Whether `file` holds at least `length` bytes once it is uncompressed.

    A gzip file ends with its uncompressed length, so an intact file is seldom read to the end: only when
    that number differs, as it does after a cut and in files of several gzip members.
    """
    if file.suffix != ".gz":
        return file.stat().st_size >= length
    with file.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        if int.from_bytes(stream.read(4), "little") == length % 2**32:
            return True
    with gzip.open(file) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(2**22), b"")) >= length
