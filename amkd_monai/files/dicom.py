"""DICOM series: which files of a folder are one volume, and whether they are a whole one."""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.files.names import file_id, has_suffix, some
from amkd_monai.files.volumes import AFFINE_TOLERANCE, Grid, affine_problem

logger = logging.getLogger("amkd_monai")

SPACING_TOLERANCE = 0.02
"""Largest difference between two distances of slices, as a part of the distance."""
TILT = 1e-2
"""Largest part of a slice distance that may lie within the plane of the slices."""

_TAGS = {
    "series": "0020|000e", "position": "0020|0032", "orientation": "0020|0037", "spacing": "0028|0030",
    "rows": "0028|0010", "columns": "0028|0011", "photometric": "0028|0004", "modality": "0008|0060",
    "bits": "0028|0101", "signed": "0028|0103", "slope": "0028|1053", "intercept": "0028|1052",
    "samples": "0028|0002", "rescale_type": "0028|1054",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One file of a series: its tags by name, as text, and the number of its frames."""

    file: Path
    tags: dict[str, str]
    frames: int

    def numbers(self, name: str, count: int) -> list[float]:
        """A tag of several numbers; nothing where the tag is missing or holds something else."""
        try:
            values = [float(v) for v in self.tags.get(name, "").split("\\")]
        except ValueError:
            return []
        return values if len(values) == count and np.isfinite(values).all() else []


def find_series(folder: Path) -> list[list[Slice]]:
    """Find the volumes among the files of a folder, not below it.

    Files that are no DICOM images are left out and counted, and so are single slices of another direction or size
    (localizers) beside a volume. A series of several directions becomes several volumes.

    Returns:
        The slices of each volume; empty if no file is DICOM.

    Raises:
        ValueError: there are DICOM files and SimpleITK is not installed.
    """
    groups: defaultdict[str, list[list[Slice]]] = defaultdict(list)
    foreign, damaged, dicom = [], [], 0
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        found = _read_tags(file) if (marked := _may_be_dicom(file)) else None
        if found is None and (marked or has_suffix(file.name, [".dcm"])):
            damaged.append(Slice(file, {}, 0))
        elif found is None:
            foreign.append(file_id(file))
        else:
            dicom += 1
            planes = groups[found.tags.get("series", "")]
            plane = next((plane for plane in planes if _in_one_plane(plane[0], found)), None)
            if plane is None:
                planes.append(plane := [])
            plane.append(found)
    if dicom and foreign:
        logger.warning(
            "%d file(s) in %s are no DICOM images and are left out: %s.", len(foreign), folder, some(foreign)
        )
    result: list[list[Slice]] = []
    for planes in groups.values():
        kept = [slices for slices in planes if len(slices) > 1] or planes
        if left := sum(map(len, planes)) - sum(map(len, kept)):
            logger.warning("%d slice(s) of another direction or size in the series in %s are left out.", left, folder)
        result += [[*slices, *damaged] for slices in kept]
    return result


def _in_one_plane(a: Slice, b: Slice) -> bool:
    """Whether two slices have one direction, size and pixel size."""
    if any(a.tags.get(name) != b.tags.get(name) for name in ("rows", "columns")):
        return False
    pairs = [(a.numbers(*tag), b.numbers(*tag)) for tag in (("orientation", 6), ("spacing", 2))]
    return all(len(x) == len(y) and np.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in pairs)


def _may_be_dicom(file: Path) -> bool:
    """Whether a file starts as DICOM does: with the mark behind a preamble, or with a tag of the first groups."""
    with file.open("rb") as stream:
        head = stream.read(132)
    return head[128:] == b"DICM" or (head[:1] in (b"\x02", b"\x08") and head[1:2] == b"\x00" and len(head) == 132)


def _itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError("There are DICOM files: run `pip install SimpleITK` to read them.") from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


@contextmanager
def _for_itk(file: Path) -> Iterator[str]:
    """A name of the file that ITK can take: it ends the process on bytes that are not UTF-8."""
    if str(file).isascii():
        yield str(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "slice.dcm"
        link.symlink_to(file.absolute())
        yield str(link)


def _read_tags(file: Path) -> Slice | None:
    itk = _itk()
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        with _for_itk(file) as name:
            reader.SetFileName(name)
            reader.ReadImageInformation()
    except RuntimeError:
        return None
    tags = {name: reader.GetMetaData(tag).strip() for name, tag in _TAGS.items() if reader.HasMetaDataKey(tag)}
    size = reader.GetSize()
    return Slice(file, tags, size[2] if len(size) > 2 else 1)


def read_series(folder: Path, slices: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """Read one volume of :func:`find_series`, which lies in ``folder``.

    Modality values count (``RescaleSlope`` and ``RescaleIntercept``, such as Hounsfield units); what is stored
    inverted (``MONOCHROME1``) is turned, except in CT, whose values have a unit.

    Returns:
        Values (X, Y, Z), float32: along rows, columns and slices; and their grid.

    Raises:
        ValueError: the slices are no whole volume of equal distances, or cannot be read.
    """
    ordered, affine = _in_order(folder, slices)
    itk = _itk()
    planes = []
    for item in ordered:
        reader = itk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        try:
            with _for_itk(item.file) as name:
                reader.SetFileName(name)
                plane = itk.GetArrayFromImage(reader.Execute()).astype(np.float32)
        except RuntimeError as error:
            raise ValueError(
                f"{item.file} is a DICOM file that cannot be read: replace it by an intact copy."
            ) from error
        planes.append(_in_units(plane.reshape(plane.shape[-2:]), item).T)
    grid = Grid((*planes[0].shape, len(planes)), affine)
    if problem := affine_problem(affine):
        raise ValueError(f"{folder}: the DICOM series {problem}.")
    array = np.stack(planes, axis=2)
    if not np.isfinite(array).all():
        raise ValueError(f"{folder} holds values that are not finite: replace the file.")
    return array, grid


def _in_units(plane: np.ndarray, item: Slice) -> np.ndarray:
    """Take back ITK's inversion of MONOCHROME1 where values have a unit: only their display is inverted in CT."""
    tags = item.tags
    if tags.get("photometric") != "MONOCHROME1" or not (
        tags.get("modality") == "CT" or tags.get("rescale_type") == "HU"
    ):
        return plane
    highest = -1.0 if tags.get("signed") == "1" else 2.0 ** int(tags.get("bits", "16")) - 1
    slope, intercept = (item.numbers(name, 1) or [value] for name, value in (("slope", 1.0), ("intercept", 0.0)))
    return slope[0] * highest + 2 * intercept[0] - plane


def _in_order(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], np.ndarray]:
    """The slices from first to last, and the affine (4, 4) of the volume, RAS, mm."""

    def refuse(reason: str, remedy: str) -> ValueError:
        return ValueError(f"{folder} holds a DICOM series of {len(slices)} slices {reason}: {remedy}.")

    if unread := [item.file for item in slices if not item.frames]:
        raise refuse(f"of which {len(unread)} cannot be read ({some(map(file_id, unread))})", "replace them")
    if frames := max(item.frames for item in slices) - 1:
        raise refuse(f"with {frames + 1} frames in one file", "convert it to NIfTI, for example by dcm2niix")
    if any(int(item.numbers("samples", 1)[0] if item.numbers("samples", 1) else 1) != 1 for item in slices):
        raise refuse("in colour", "give a series of grey slices")
    if len({item.tags.get("photometric") for item in slices}) > 1:
        raise refuse("of which some are stored inverted", "give one series at a time")
    placed = [
        (item.numbers("position", 3), item.numbers("orientation", 6), item.numbers("spacing", 2)) for item in slices
    ]
    if missing := sum(not all(place) for place in placed):
        raise refuse(f"of which {missing} do not say where they lie", "take them out or convert the series to NIfTI")
    if len(slices) < 2:
        raise refuse("alone", "give at least two slices")
    positions, orientations, spacings = (np.array(values) for values in zip(*placed, strict=True))
    if np.abs(spacings - spacings[0]).max() > 1e-3 or np.abs(orientations - orientations[0]).max() > 2e-3:
        raise refuse("with several directions or pixel sizes", "give one series at a time")
    row, column = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(row, column)
    place = positions @ normal
    order = np.argsort(place, kind="stable")
    place, positions = place[order], positions[order]
    steps = np.diff(place)
    if twice := int((steps < AFFINE_TOLERANCE).sum()):
        raise refuse(
            f"of which {twice} lie at the position of another one, as in several time points or echoes",
            "keep one slice at each position",
        )
    step = float(np.median(steps))
    uneven = np.abs(steps - step) > max(SPACING_TOLERANCE * step, AFFINE_TOLERANCE)
    if uneven.any():
        gaps = steps[uneven] / step
        if (np.abs(gaps - gaps.round()) < 0.1).all() and (gaps > 1.5).all():
            raise refuse(f"and {int((gaps.round() - 1).sum())} missing slice(s)", "complete it")
        raise refuse(f"with {int(uneven.sum())} distance(s) other than {step:.3g} mm", "resample it or complete it")
    along = (positions[-1] - positions[0]) / (len(place) - 1)
    straight = positions[0] + np.outer(np.arange(len(place)), along)
    if off := int((np.abs(positions - straight).max(axis=1) > max(SPACING_TOLERANCE * step, AFFINE_TOLERANCE)).sum()):
        raise refuse(f"of which {off} lie aside of the others", "resample it")
    drift = np.linalg.norm(along - normal * (along @ normal)) / step
    if drift > TILT:
        raise refuse(f"that lean by {np.degrees(np.arctan(drift)):.1f} degrees (gantry tilt)", "correct the tilt first")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacings[0, 1], column * spacings[0, 0]
    affine[:3, 2], affine[:3, 3] = along, positions[0]
    affine[:2] *= -1  # from left and posterior to right and anterior
    return [slices[i] for i in order], affine
