"""Volumes of NIfTI files and DICOM series: their grid in space, their values, and masks on the same grid."""

from __future__ import annotations

import gzip
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.atomic import atomic_path
from amkd_monai.files.masks import MaskCodes, decode_plausible
from amkd_monai.files.names import MARK, has_suffix
from amkd_monai.files.pictures import DAMAGED

logger = logging.getLogger("amkd_monai")

MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SMALLEST_VOXEL, LARGEST_VOXEL = 1e-3, 100.0
"""Voxel sizes (mm) outside of these are a mistake of units."""
DECIMALS = 6
"""Of voxel sizes (mm); headers hold 32 bits, whose noise can change the rounded size of a resampled volume."""
ORTHOGONAL = 1e-3
"""Largest cosine between two axes that resampling takes for a right angle."""
AFFINE_TOLERANCE = 1e-2
"""Largest difference (mm) between the affines of a label and its volume; tools write them in 32 bits."""
CORNER_TOLERANCE = 0.1
"""Largest difference, in voxels, between the corners of a label and those of its volume."""

_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
CT_VALUES = ("auto", "hu", "levels", "shares")
LOWEST_AIR, HIGHEST_MINIMUM = -1100.0, -200.0
"""HU; every CT holds air or fat between these. What lies below is padding."""
BRIGHTEST = 0.75
"""Part of the scale that a windowed volume reaches at least."""

AXES = ("left to right", "posterior to anterior", "inferior to superior")


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie.

    Attributes:
        shape: voxels along the three axes of the array.
        affine: (4, 4) from voxel indices to mm; x points right, y anterior, z superior (RAS).
    """

    shape: tuple[int, ...]
    affine: np.ndarray

    @cached_property
    def spacing(self) -> list[float]:
        """Voxel size along each axis of the array, mm."""
        return [float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0)]

    @cached_property
    def axes(self) -> str:
        """Where each axis of the array points, such as "LPS"."""
        import nibabel

        return "".join(nibabel.aff2axcodes(self.affine))

    def order_to(self, axes: str) -> np.ndarray:
        """Orientation transform of nibabel (3, 2) from this order of the array to another."""
        from nibabel import orientations

        return orientations.ornt_transform(
            orientations.io_orientation(self.affine), orientations.axcodes2ornt(tuple(axes))
        )

    def reordered(self, axes: str) -> Grid:
        """The same voxels in another order of the array."""
        from nibabel import orientations

        order = self.order_to(axes)
        shape = tuple(int(self.shape[i]) for i in np.argsort(order[:, 0]))
        return Grid(shape, self.affine @ orientations.inv_ornt_aff(order, self.shape))


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


def volume_grid(file: str | Path) -> Grid:
    """Grid of a NIfTI volume from its header, after a check that the file is not cut short.

    Units of metres and microns become mm. Axes of length 1 behind the third are dropped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no NIfTI volume of 3 axes and one real number per voxel, or does not say where
            its voxels lie.
    """
    return _open_nifti(Path(file))[1]


def _open_nifti(file: Path) -> tuple[Any, Grid]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        volume = nibabel.load(file)
        if not isinstance(volume, nibabel.Nifti1Pair):
            raise ValueError(f"it is {type(volume).__name__}")
        shape, dtype = tuple(int(n) for n in volume.shape), volume.get_data_dtype()
        whole = _is_whole(file, volume.dataobj.offset + math.prod(shape) * dtype.itemsize)
        units = volume.header.get_xyzt_units()[0]
        affine = np.array(volume.affine, float)
        codes = int(volume.header["sform_code"]), int(volume.header["qform_code"])
        qform = volume.header.get_qform() if all(codes) else affine
    except FileNotFoundError:
        raise
    except (ImageFileError, HeaderDataError, *DAMAGED) as error:
        raise ValueError(f"{file} cannot be read as a NIfTI volume ({error}): replace it by an intact copy.") from error
    if not whole:
        raise ValueError(f"{file} ends before its last voxel: replace it by an intact copy.")
    if dtype.fields or dtype.kind not in "iufb":
        kind = "colours" if dtype.fields else f"values of the type {dtype}"
        raise ValueError(f"{file} holds {kind}: give a volume of one real number per voxel.")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{file} has the shape {'x'.join(map(str, shape))}: give a volume of 3 axes.")
    if not any(codes):
        raise ValueError(
            f"{file} does not say where its axes point (sform and qform are unset): set its orientation, for example "
            "by converting it again from DICOM."
        )
    differs = np.abs(qform[:3] - affine[:3]).max() * MILLIMETRES[units] > AFFINE_TOLERANCE
    affine[:3] *= MILLIMETRES[units]
    if problem := affine_problem(affine):
        raise ValueError(f"{file} {problem}: correct its header or replace it by an intact copy.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    stated = np.abs(volume.header["pixdim"][1:4]) * MILLIMETRES[units]
    if codes[0] and np.abs(spacing - stated).max() > 0.01 * stated.max():
        raise ValueError(
            f"{file} has voxels of {' x '.join(f'{v:g}' for v in spacing)} by its sform but "
            f"{' x '.join(f'{v:g}' for v in stated)} by pixdim: correct its header."
        )
    affine[:3, :3] *= spacing.round(DECIMALS) / spacing
    if differs:
        logger.warning("%s has an sform and a qform that differ: it is read by the sform, as nibabel does.", file)
    return volume, Grid(shape, affine)


def _is_whole(file: Path, length: int) -> bool:
    """Whether `file` holds at least `length` bytes once it is uncompressed.

    A gzip file ends with its uncompressed length, so an intact file is seldom read to the end: only when
    that number differs, as it does after a cut and in files of several gzip members.
    """
    if file.suffix.lower() != ".gz":
        return file.stat().st_size >= length
    with file.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        if int.from_bytes(stream.read(4), "little") == length % 2**32:
            return True
    with gzip.open(file) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(2**22), b"")) >= length


def read_volume(source: str | Path) -> tuple[np.ndarray, Grid]:
    """Read a NIfTI volume in the order of its file.

    Returns:
        Values (X, Y, Z), float32, and their grid.

    Raises:
        ValueError: it cannot be read, holds values that are not finite, or its geometry cannot be used.
    """
    array, grid = _voxels(Path(source), np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{source} holds values that are not finite: replace the file.")
    return array, grid


def _voxels(file: Path, dtype: Any = None) -> tuple[np.ndarray, Grid]:
    volume, grid = _open_nifti(file)
    try:
        if has_suffix(file, [".gz"]):  # nibabel stops before the checksum at the end
            with gzip.open(file) as stream:
                volume = type(volume).from_bytes(stream.read())
        return np.asanyarray(volume.dataobj, dtype).reshape(grid.shape), grid
    except DAMAGED as error:
        raise ValueError(f"{file} cannot be read as a NIfTI volume ({error}): replace it by an intact copy.") from error


def reorder(array: np.ndarray, grid: Grid, axes: str) -> np.ndarray:
    """Bring voxels (X, Y, Z) on a grid into another order of the array, such as "RAS"."""
    from nibabel import orientations

    return orientations.apply_orientation(array, grid.order_to(axes))


def grid_problem(image: Grid, label: Grid) -> str:
    """Say in what a label's grid differs from its image's, the order of the arrays apart; empty if in nothing."""
    a, b = image.reordered("RAS"), label.reordered("RAS")
    for name, of_image, of_label in zip(AXES, a.shape, b.shape, strict=True):
        if of_image != of_label:
            return f"it has {of_label} voxels from {name}, its image {of_image}"
    for name, size, other in zip(AXES, a.spacing, b.spacing, strict=True):
        if abs(size - other) > max(AFFINE_TOLERANCE, 1e-3 * size):
            return f"its voxels measure {other:g} mm from {name}, those of its image {size:g} mm"
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*(np.array(a.shape) - 1), 1]
    away = (corners @ (b.affine - a.affine).T)[:, :3]
    farthest = np.abs(away).max(axis=0)
    allowed = max(AFFINE_TOLERANCE, CORNER_TOLERANCE * min(a.spacing))
    if np.abs(a.affine - b.affine).max() <= AFFINE_TOLERANCE and farthest.max() <= allowed:
        return ""
    axis = int(farthest.argmax())
    if np.abs(a.affine[:3, :3] - b.affine[:3, :3]).max() > AFFINE_TOLERANCE:
        return f"its axes point elsewhere than those of its image, by up to {farthest[axis]:.3g} mm from {AXES[axis]}"
    return f"it lies {farthest[axis]:.3g} mm away from its image, from {AXES[axis]} (origin of the affine)"


def read_label_volume(
    file: str | Path,
    image: Grid | None = None,
    classes: int = 2,
    codes: MaskCodes = "auto",
    used: set[str] | None = None,
) -> tuple[np.ndarray, Grid]:
    """Read a label volume, in the array order of its image.

    Args:
        file: NIfTI file.
        image: grid of the image; None keeps the order of the file.
        classes: number of classes, background included.
        codes: see :func:`amkd_monai.files.masks.decode`.
        used: gets the coding of the file, see :func:`amkd_monai.files.masks.coding_problem`.

    Returns:
        Class indices (X, Y, Z), uint8, 255 where there is no label, and their grid.

    Raises:
        ValueError: it cannot be read, lies on another grid, or holds values that the codes do not explain.
    """
    array, grid = _voxels(Path(file))
    try:
        if image is not None and (problem := grid_problem(image, grid)):
            raise ValueError(f"{problem}: save it on the grid of its image")
        mask = decode_plausible(array, classes, codes, used)
    except ValueError as error:
        raise ValueError(f"Label {file} cannot be used: it {str(error).removeprefix('it ')}.") from error
    if image is None:
        return mask, grid
    return reorder(mask, grid, image.axes), image


def write_mask_volume(path: Path, mask: np.ndarray, grid: Grid, like: str | Path | None = None) -> None:
    """Write a mask as NIfTI, uint8, on the grid of its image.

    Args:
        path: ``.nii.gz`` file.
        mask: class indices (X, Y, Z).
        grid: of the image.
        like: NIfTI file of the image, whose sform, qform, their codes and units are repeated; None writes the grid in
            mm.
    """
    import nibabel

    header = nibabel.Nifti1Header()
    if like is None:
        header.set_sform(grid.affine, 1)
        header.set_qform(grid.affine, 1)
        header.set_xyzt_units("mm")
    else:
        source = nibabel.load(like).header
        header.set_xyzt_units(source.get_xyzt_units()[0])
        for name in _GEOMETRY:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header.set_data_shape(mask.shape)
    header.set_data_dtype(np.uint8)
    header["descrip"] = MARK.encode()
    image = nibabel.Nifti1Image(mask.astype(np.uint8), header.get_best_affine(), header)
    with atomic_path(path) as temporary:
        packed = temporary.with_name(temporary.name + ".nii.gz")
        try:
            nibabel.save(image, packed)
            packed.replace(temporary)
        finally:
            packed.unlink(missing_ok=True)


def middle_slice(volume: np.ndarray, mask: np.ndarray, axis: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The slice of a volume with most foreground, the middle one without any (H, W), and its mask (H, W)."""
    others = tuple(other for other in range(3) if other != axis)
    counts = (mask > 0).sum(others)
    index = int(counts.argmax()) if counts.any() else mask.shape[axis] // 2
    return np.take(volume, index, axis), np.take(mask, index, axis)


def grey_levels(volume: np.ndarray, percentiles: Sequence[float] = (0.5, 99.5)) -> np.ndarray:
    """Scale a volume to 0 to 255 between two of its percentiles, uint8, to look at."""
    low, high = np.percentile(volume, percentiles)
    return ((volume - low) / max(float(high - low), 1e-6) * 255).clip(0, 255).astype(np.uint8)


def ct_range(lowest: float, highest: float, low: float, high: float, values: str = "auto") -> tuple[float, float]:
    """The values of a CT that become 0 and 1.

    Args:
        lowest: value of the volume.
        highest: value of the volume.
        low: lower end of the window in HU.
        high: upper end in HU.
        values: what the volume holds: ``hu``, ``levels`` (windowed before, 0 to 255) or ``shares`` (windowed before, 0
            to 1); ``auto`` takes the only one that fits.

    Raises:
        ValueError: the values fit none of them, as Hounsfield units with an offset of 1024 do.
    """
    if values not in CT_VALUES:
        raise ValueError(f"CT values are '{values}': use one of {', '.join(CT_VALUES)}.")
    ends = {"hu": (low, high), "levels": (0.0, 255.0), "shares": (0.0, 1.0)}
    if values != "auto":
        return ends[values]
    if lowest <= HIGHEST_MINIMUM:
        return ends["hu"]
    for name in ("shares", "levels"):
        if lowest >= 0 and BRIGHTEST * ends[name][1] <= highest <= ends[name][1]:
            return ends[name]
    raise ValueError(
        f"the values {lowest:g} to {highest:g} are neither Hounsfield units of a CT nor windowed to 0..255 or 0..1: "
        "take off an offset such as 1024, or say what they are (`values` of CtWindowd)"
    )


def ct_extremes(volume: np.ndarray) -> tuple[float, float]:
    """Lowest value of a CT, padding aside, and the highest."""
    inside = volume[volume >= LOWEST_AIR]
    return float(inside.min() if inside.size else volume.min()), float(volume.max())
