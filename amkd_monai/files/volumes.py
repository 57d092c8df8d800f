"""Volumes of NIfTI files and DICOM series: their grid in space, their values, and masks on the same grid."""

from __future__ import annotations

import gzip
import io
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from amkd_monai.files.masks import MaskCodes, decode_plausible
from amkd_monai.files.names import MARK, has_suffix, keep_others
from amkd_monai.files.pictures import DAMAGED
from amkd_monai.storage import atomic_write_bytes
from amkd_monai.terminal import logger

MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SMALLEST_VOXEL, LARGEST_VOXEL = 1e-3, 100.0  # mm; other sizes are a mistake of units
DECIMALS = 6  # of voxel sizes (mm); the noise of 32 bits can change the rounded size of a resampled volume
ORTHOGONAL = 1e-3  # largest cosine between two axes that resampling takes for a right angle
AFFINE_TOLERANCE = 1e-2  # largest difference (mm) between affines of a label and its volume, stored in 32 bits
CORNER_TOLERANCE = 0.1  # largest distance, in voxels, between the corners of a label and of its volume
CT_VALUES = ("auto", "hu", "levels", "shares")
LOWEST_AIR, HIGHEST_MINIMUM = -1100.0, -200.0  # HU; every CT holds air or fat between them, below is padding
BRIGHTEST = 0.75  # part of the scale that a windowed volume reaches at least
AXES = ("left to right", "posterior to anterior", "inferior to superior")
_GEOMETRY = "qform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z sform_code srow_x srow_y srow_z"


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume (X, Y, Z) lie: affine (4, 4) from voxel indices to mm, RAS; header of a NIfTI."""

    shape: tuple[int, ...]
    affine: np.ndarray
    header: Any = None

    @cached_property
    def channels(self) -> int:
        """Values of a voxel that the file holds along a fourth axis; 1 without one."""
        return 1 if self.header is None else math.prod(self.header.get_data_shape()[3:])

    @cached_property
    def spacing(self) -> list[float]:
        """Voxel size along each axis of the array, mm."""
        return [float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0)]

    @cached_property
    def axes(self) -> str:
        """Where each axis of the array points, such as "LPS"."""
        return "".join(nibabel.aff2axcodes(self.affine))

    def order_to(self, axes: str) -> np.ndarray:
        """Orientation transform of nibabel (3, 2) from this order of the array to another."""
        own, other = orientations.io_orientation(self.affine), orientations.axcodes2ornt(tuple(axes))
        return orientations.ornt_transform(own, other)

    def reordered(self, axes: str) -> Grid:
        """The same voxels in another order of the array."""
        order = self.order_to(axes)
        shape = tuple(int(self.shape[i]) for i in np.argsort(order[:, 0]))
        return Grid(shape, self.affine @ orientations.inv_ornt_aff(order, self.shape))


def reorder(array: np.ndarray, grid: Grid, axes: str) -> np.ndarray:
    """Bring voxels (X, Y, Z) on a grid into another order of the array, such as "RAS"."""
    return orientations.apply_orientation(array, grid.order_to(axes))


def affine_problem(affine: np.ndarray) -> str:
    """Say what is wrong with an affine (4, 4) in mm; empty if nothing is."""
    if not np.isfinite(affine).all():
        return "has an affine that is not finite"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        return "has a singular affine, so no voxel size and no orientation"
    if spacing.min() < SMALLEST_VOXEL or spacing.max() > LARGEST_VOXEL:
        return f"has voxels of {' x '.join(f'{v:g}' for v in spacing)} mm: its units must be wrong"
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > ORTHOGONAL:
        return "has axes that are not at right angles (sheared): resample it first"
    return ""


def volume_grid(file: str | Path, several: bool = False) -> Grid:
    """Grid of a NIfTI volume from its header, in mm; axes of length 1 after the third are dropped.

    A ValueError unless the file is whole, says where its voxels lie, and has 3 axes (4 if it may hold ``several``
    channels) of real numbers.
    """
    return _nifti(Path(file), several=several)[1]


def read_volume(file: str | Path, several: bool = False) -> tuple[np.ndarray, Grid]:
    """Read a NIfTI volume, float32, in the order of its file, and its grid, see :func:`volume_grid`.

    The volume is (X, Y, Z), or (C, X, Y, Z) if it may hold ``several`` channels. A ValueError if the file or its grid
    cannot be used, or a value is not finite.
    """
    array, grid = _nifti(Path(file), True, np.float32, several)
    if not is_finite(array):
        raise ValueError(f"{file} holds values that are not finite: replace the file.")
    return array, grid


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or not a number; no array of the same size is made."""
    return math.isfinite(float(array.min()) + float(array.max()))


class _Refused(ValueError):
    """A whole sentence about a file."""


def _nifti(file: Path, with_voxels: bool = False, dtype: Any = None, several: bool = False) -> tuple[np.ndarray, Grid]:
    """Voxels (X, Y, Z) of a file, of ``several`` (C, X, Y, Z), an empty array unless wanted, and their grid."""
    packed, array = has_suffix(file, [".gz"]), np.empty(0)
    try:
        with file.open("rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            if packed and with_voxels:  # all at once, which also compares the checksum at the end
                stream = io.BytesIO(stream.read())
            head, kinds = stream.read(540), (nibabel.Nifti1Image, nibabel.Nifti2Image)
            kind = next((kind for kind in kinds if kind.header_class.may_contain_header(head)), None)
            if kind is None:
                raise ValueError("it does not start like one")
            header = kind.header_class(head[: kind.header_class.sizeof_hdr])
            grid = _grid(file, header, several)
            if with_voxels:
                stream.seek(0)
                array = np.asanyarray(kind.from_stream(stream).dataobj, dtype).reshape(*grid.shape, -1)
                return (np.moveaxis(array, 3, 0) if several else array[..., 0]), grid
            length = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
            length += header.get_data_offset()
            with file.open("rb") as end:  # a packed file ends with its length, unless it has several members
                end.seek(-4, io.SEEK_END)
                intact = packed and int.from_bytes(end.read(), "little") == length % 2**32
            if not intact and stream.seek(0, io.SEEK_END) < length:
                raise ValueError("it ends before its last voxel")
        return array, grid
    except (FileNotFoundError, _Refused):
        raise
    except (ImageFileError, HeaderDataError, *DAMAGED) as error:
        why = str(error) or type(error).__name__  # a lack of memory has no words
        raise ValueError(f"{file} cannot be read as a NIfTI volume ({why}): replace it by an intact copy.") from error


def _grid(file: Path, header: Any, several: bool = False) -> Grid:
    shape, unit = header.get_data_shape(), MILLIMETRES[header.get_xyzt_units()[0]]
    if (dtype := header.get_data_dtype()).kind not in "iufb":
        raise _Refused(f"{file} holds values of the type {dtype}: give a volume of one real number per voxel.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 3 + several) or min(shape) < 1:
        wanted = "3 axes, or 4 of which the last is that of the channels" if several else "3 axes"
        raise _Refused(f"{file} has the shape {'x'.join(map(str, shape))}: give a volume of {wanted}.")
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not (sform or qform):
        raise _Refused(f"{file} does not say where its axes point (sform and qform are unset): set its orientation.")
    affine = header.get_best_affine()
    if sform and qform and np.abs(header.get_qform()[:3] - affine[:3]).max() * unit > AFFINE_TOLERANCE:
        logger.warning("%s has an sform and a qform that differ: it is read by the sform, as nibabel does.", file)
    affine[:3] *= unit
    if problem := affine_problem(affine):
        raise _Refused(f"{file} {problem}: correct its header or replace it by an intact copy.")
    spacing, stated = np.linalg.norm(affine[:3, :3], axis=0), np.abs(header["pixdim"][1:4]) * unit
    if sform and np.abs(spacing - stated).max() > 0.01 * stated.max():
        by_sform, by_pixdim = (" x ".join(f"{v:g}" for v in sizes) for sizes in (spacing, stated))
        raise _Refused(f"{file} has voxels of {by_sform} by its sform but {by_pixdim} by pixdim: correct its header.")
    affine[:3, :3] *= spacing.round(DECIMALS) / spacing
    return Grid(tuple(map(int, shape[:3])), affine, header)


def check_grid(file: str | Path, label: Grid, image: Grid, what: str = "Label") -> None:
    """Raise a ValueError with the figure and axis if a file lies on another grid than its image, in any order."""
    a, b = image.reordered("RAS"), label.reordered("RAS")
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*(np.array(a.shape) - 1), 1]
    farthest = np.abs((corners @ (b.affine - a.affine).T)[:, :3]).max(axis=0)
    allowed = max(AFFINE_TOLERANCE, CORNER_TOLERANCE * min(a.spacing))
    problems = []
    for axis, count, n, size, other in zip(AXES, a.shape, b.shape, a.spacing, b.spacing, strict=True):
        if n != count:
            problems.append(f"it has {n} voxels from {axis}, its image {count}")
        elif abs(size - other) > max(AFFINE_TOLERANCE, 1e-3 * size):
            problems.append(f"its voxels measure {other:g} mm from {axis}, those of its image {size:g} mm")
    if farthest.max() > allowed or np.abs(a.affine - b.affine).max() > AFFINE_TOLERANCE:
        problems.append(f"its voxels lie up to {farthest.max():.3g} mm off, from {AXES[int(farthest.argmax())]}")
    if problems:
        raise ValueError(f"{what} {file} cannot be used: {problems[0]}; save it on the grid of its image.")


def read_label_volume(
    file: str | Path,
    image: Grid | None = None,
    classes: int = 2,
    codes: MaskCodes = "auto",
    used: set[str] | None = None,
) -> tuple[np.ndarray, Grid]:
    """Read a label volume as class indices (X, Y, Z), uint8, 255 where there is no label, and their grid.

    The label gets the array order of its ``image``; see :func:`amkd_monai.files.masks.read_mask`, for errors, too.
    Values that are no classes, or another grid than the image, are a ValueError.
    """
    array, grid = _nifti(Path(file), True)
    if image is not None:
        check_grid(file, grid, image)
    try:
        mask = decode_plausible(array, classes, codes, used)
    except ValueError as error:
        raise ValueError(f"Label {file} cannot be used: it {error}.") from error
    return (mask, grid) if image is None else (reorder(mask, grid, image.axes), image)


def write_mask_volume(path: Path, mask: np.ndarray, grid: Grid) -> None:
    """Write class indices (X, Y, Z) as ``.nii.gz``, uint8, with the geometry of the grid's header, or else in mm."""
    header = nibabel.Nifti1Header()
    if grid.header is None:
        header.set_sform(grid.affine, 1)
        header.set_qform(grid.affine, 1)
        header.set_xyzt_units("mm")
    else:
        header.set_xyzt_units(grid.header.get_xyzt_units()[0])
        for name in _GEOMETRY.split():
            header[name] = grid.header[name]
        header["pixdim"][:4] = grid.header["pixdim"][:4]
    header["descrip"] = MARK.encode()
    header.set_data_dtype(np.uint8)
    image = nibabel.Nifti1Image(mask.astype(np.uint8), None, header)
    atomic_write_bytes(keep_others(path), gzip.compress(image.to_bytes(), 1, mtime=0))


def seen_slice(volume: np.ndarray, mask: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The slice (H, W) of a volume with most foreground, the middle one without any, and its mask (H, W).

    It lies across the longest side of the voxels, axial if all are alike. Rows go to the feet, or of an axial slice to
    the back, columns to the patient's left, or of a sagittal slice to the back.
    """
    spacing = grid.reordered("LPI").spacing
    axis = int(np.argmax(spacing)) if max(spacing) > 1.2 * min(spacing) else 2
    volume, mask = (reorder(array, grid, "LPI") for array in (volume, mask))
    counts = (mask > 0).sum(tuple({0, 1, 2} - {axis}))
    index = int(counts.argmax()) if counts.any() else mask.shape[axis] // 2
    return volume.take(index, axis).T, mask.take(index, axis).T


def grey_levels(volume: np.ndarray) -> np.ndarray:
    """Scale a volume (X, Y, Z) to 0 to 255 between its percentiles 0.5 and 99.5, uint8 (X, Y, Z), to look at."""
    low, high = np.percentile(volume, (0.5, 99.5))
    return ((volume - low) / max(float(high - low), 1e-6) * 255).clip(0, 255).astype(np.uint8)


def ct_range(volume: np.ndarray, low: float, high: float, values: str = "auto") -> tuple[float, float]:
    """The values of a CT of any shape that become 0 and 1, for a window from ``low`` to ``high`` HU.

    ``values`` says what the volume holds: ``hu``, ``levels`` (windowed before, 0 to 255) or ``shares`` (windowed
    before, 0 to 1). ``auto`` takes the only one that fits; none, as for an offset of 1024, is a ValueError.
    """
    if values not in CT_VALUES:
        raise ValueError(f"CT values are '{values}': use one of {', '.join(CT_VALUES)}.")
    ends = {"hu": (low, high), "levels": (0.0, 255.0), "shares": (0.0, 1.0)}
    if values != "auto":
        return ends[values]
    lowest, highest = float(volume.min()), float(volume.max())
    if lowest < LOWEST_AIR <= highest:  # padding
        lowest = float(volume[volume >= LOWEST_AIR].min())
    if lowest <= HIGHEST_MINIMUM:
        return ends["hu"]
    for name in ("shares", "levels"):
        if lowest >= 0 and BRIGHTEST * ends[name][1] <= highest <= ends[name][1]:
            return ends[name]
    what = f"the values {lowest:g} to {highest:g} are neither Hounsfield units nor windowed to 0..255 or 0..1"
    raise ValueError(f"{what}: take off an offset such as 1024, or say what they are (`values` of CtWindowd)")
