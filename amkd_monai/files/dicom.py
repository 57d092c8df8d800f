"""DICOM series: groups the files of a folder into volumes and checks that these are complete."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.files.names import file_id, is_slice, left_out, some
from amkd_monai.files.volumes import AFFINE_TOLERANCE, Grid, affine_problem, is_finite

SPACING_TOLERANCE = 0.02  # largest difference between two distances of slices, as a part of the distance
VARIES = {"echo": 0.1, "time point": 0.0, "b-value": 0.1}  # parts by which the slices of one volume may differ in them
TABLE = re.compile(rb"\x28\0\0\x30(SQ\0\0)?.{4}\xfe\xff\0\xe0", re.DOTALL)  # Modality LUT Sequence, which ITK ignores
TILT = 1e-2  # largest part of a slice distance that may lie within the plane of the slices

_TAGS = {
    "series": "0020|000e", "position": "0020|0032", "orientation": "0020|0037", "spacing": "0028|0030",
    "rows": "0028|0010", "columns": "0028|0011", "photometric": "0028|0004", "modality": "0008|0060",
    "bits": "0028|0101", "signed": "0028|0103", "slope": "0028|1053", "intercept": "0028|1052",
    "samples": "0028|0002", "rescale_type": "0028|1054", "patient": "0010|0020", "study": "0020|000d",
    "high": "0028|0102", "echo": "0018|0081", "time point": "0020|0100", "b-value": "0018|9087",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One file of a series: its tags by name, as text, and the number of its frames; 0 if it cannot be read."""

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
    """Find the slices of each volume among the files of a folder, not below it.

    Files that are not DICOM images are left out and counted, and so are single slices of another direction (localizers)
    next to a volume. A series of several directions becomes several volumes, and so do patients or studies under one
    series UID, or without one; a single slice of another size stays in the volume of its direction, which
    :func:`series_grid` refuses.
    """
    groups: defaultdict[tuple[str, ...], list[list[Slice]]] = defaultdict(list)
    foreign, damaged = [], []
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        if not is_slice(file):
            foreign.append(file_id(file))
            continue
        if not (found := _header(file)).frames:
            damaged.append(found)
            continue
        planes = groups[tuple(found.tags.get(name, "") for name in ("patient", "study", "series"))]
        plane = next((plane for plane in planes if _in_one_plane(plane[0], found)), None)
        if plane is None:
            planes.append(plane := [])
        plane.append(found)
    left_out(folder, foreign if groups else [], "file(s) that are no slices")
    result: list[list[Slice]] = []
    for planes in groups.values():
        kept = [slices for slices in planes if len(slices) > 1] or planes
        single = [plane[0] for plane in planes if plane not in kept]
        left = [item for item in single if not any(_alike(item, slices[0], "orientation", 6) for slices in kept)]
        for slices in kept:
            slices += [item for item in single if _alike(item, slices[0], "orientation", 6)]
        left_out(folder, [file_id(item.file) for item in left], "slice(s) of another direction")
        result += [[*slices, *damaged] for slices in kept]
    return result


def _header(file: Path) -> Slice:
    try:
        with _reader(file) as reader:
            reader.ReadImageInformation()
    except RuntimeError:
        return Slice(file, {}, 0)
    tags = {name: reader.GetMetaData(tag).strip() for name, tag in _TAGS.items() if reader.HasMetaDataKey(tag)}
    size = reader.GetSize()
    return Slice(file, tags, size[2] if len(size) > 2 else 1)


def holds_series(folder: Path) -> bool:
    """Whether files of a folder are slices of one series at several places."""
    places: defaultdict[str, set[str]] = defaultdict(set)
    for file in folder.iterdir():
        if file.is_file() and is_slice(file):
            tags = _header(file).tags
            places[tags.get("series", "")].add(tags.get("position", ""))
    return any(len(found) > 1 for found in places.values())


def patient_and_study(path: Path) -> tuple[str, str]:
    """Patient ID and UID of the study of a DICOM file, or of the first one in a folder; "" where they are not said."""
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    tags = next((_header(file).tags for file in files if is_slice(file)), {})
    return tags.get("patient", ""), tags.get("study", "")


def _in_one_plane(a: Slice, b: Slice) -> bool:
    """Whether two slices have one direction, size and pixel size."""
    same = all(a.tags.get(name) == b.tags.get(name) for name in ("rows", "columns"))
    return same and _alike(a, b, "orientation", 6) and _alike(a, b, "spacing", 2)


def _alike(a: Slice, b: Slice, name: str, count: int) -> bool:
    x, y = a.numbers(name, count), b.numbers(name, count)
    return len(x) == len(y) and np.allclose(x, y, rtol=1e-3, atol=1e-3)


@contextmanager
def _reader(file: Path) -> Iterator[Any]:
    """SimpleITK's reader of a file; ITK ends the process on names that are not UTF-8, so they get another one."""
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError("There are DICOM files: run `pip install SimpleITK` to read them.") from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.TemporaryDirectory() if not str(file).isascii() else nullcontext() as folder:
        if folder:
            link = Path(folder) / "slice.dcm"
            link.symlink_to(file.absolute())
            file = link
        reader.SetFileName(str(file))
        yield reader


def series_grid(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], Grid]:
    """Return the slices of a volume in their order, and its grid; no pixels are read, see :func:`read_series`."""
    ordered, affine = _in_order(folder, slices)
    if problem := affine_problem(affine):
        raise ValueError(f"{folder}: the DICOM series {problem}.")
    return ordered, Grid((*(int(ordered[0].tags[name]) for name in ("columns", "rows")), len(ordered)), affine)


def read_series(folder: Path, slices: Sequence[Slice]) -> tuple[np.ndarray, Grid]:
    """Read one volume of :func:`find_series` from ``folder``: values (X, Y, Z), float32, and their grid.

    Modality values count (``RescaleSlope`` and ``RescaleIntercept``, such as Hounsfield units); what is stored
    inverted (``MONOCHROME1``) is turned, except in CT and PET, whose values have a unit. Slices that are no whole
    volume of equal distances, or cannot be read, are a ValueError.
    """
    from SimpleITK import GetArrayFromImage

    planes = []
    ordered, grid = series_grid(folder, slices)
    for item in ordered:
        try:
            with _reader(item.file) as reader:
                plane = GetArrayFromImage(reader.Execute()).astype(np.float32)
        except RuntimeError as error:
            raise ValueError(f"{item.file} is a DICOM file that cannot be read: replace it.") from error
        planes.append(_in_units(plane.reshape(plane.shape[-2:]), item).T)
    array = np.stack(planes, axis=2)
    if not is_finite(array):
        raise ValueError(f"{folder} holds values that are not finite: replace the file.")
    return array, grid


def _in_units(plane: np.ndarray, item: Slice) -> np.ndarray:
    """Take back ITK's inversion of MONOCHROME1 where values have a unit."""
    if item.tags.get("photometric") != "MONOCHROME1" or _inversion(item):
        return plane
    highest = -1.0 if item.tags.get("signed") == "1" else 2.0 ** int(item.tags.get("bits", "16")) - 1
    (slope,), (intercept,) = item.numbers("slope", 1) or [1.0], item.numbers("intercept", 1) or [0.0]
    return slope * highest + 2 * intercept - plane


def _inversion(item: Slice) -> list[str | None]:
    """Scale on which ITK inverts MONOCHROME1; empty where values have a unit, of which only the display is inverted."""
    has_unit = item.tags.get("modality") in ("CT", "PT") or item.tags.get("rescale_type") == "HU"
    inverted = item.tags.get("photometric") == "MONOCHROME1" and not has_unit
    return [item.tags.get(name) for name in ("slope", "intercept", "bits", "signed") if inverted]


def _in_order(folder: Path, slices: Sequence[Slice]) -> tuple[list[Slice], np.ndarray]:
    """The slices from first to last, and the affine (4, 4) of the volume, RAS, mm."""

    def refuse(reason: str, remedy: str) -> ValueError:
        return ValueError(f"{folder} holds a DICOM series of {len(slices)} slices {reason}: {remedy}.")

    if unread := [item.file for item in slices if not item.frames]:
        raise refuse(f"of which {len(unread)} cannot be read ({some(map(file_id, unread))})", "replace them")
    colour = any(item.numbers("samples", 1) not in ([], [1.0]) for item in slices)
    if any(item.numbers("high", 1) != [bits - 1 for bits in item.numbers("bits", 1)] for item in slices):
        raise refuse("of which some have values that are not in the lowest bits (HighBit)", "convert it to NIfTI")
    scales = {(item.tags.get("photometric"), *_inversion(item)) for item in slices}
    if colour or max(item.frames for item in slices) > 1 or len(scales) > 1:
        what = "in colour, of several frames a file or of which some are stored inverted or on other scales"
        raise refuse(what, "give one series of grey slices, or convert it to NIfTI, for example by dcm2niix")
    for name, part in VARIES.items():
        values = [item.numbers(name, 1) or [-1.0] for item in slices]
        if np.ptp(values) > part * np.abs(values).max():
            raise refuse(f"with several values of {name}", "give the slices of one")
    for item in slices:
        with item.file.open("rb") as stream:
            if TABLE.search(stream.read(2**18)):
                raise refuse("whose values a table gives (ModalityLUTSequence)", "convert it to NIfTI")
    tags = (("position", 3), ("orientation", 6), ("spacing", 2))
    placed = [[item.numbers(*tag) for tag in tags] for item in slices]
    if missing := sum(not all(place) for place in placed):
        raise refuse(f"of which {missing} do not say where they lie", "take them out or convert the series to NIfTI")
    if len(slices) < 2:
        raise refuse("alone", "give at least two slices")
    positions, orientations, spacings = (np.array(values) for values in zip(*placed, strict=True))
    sizes = {(item.tags.get("rows"), item.tags.get("columns")) for item in slices}
    turned = np.abs(orientations - orientations[0]).max() > 2e-3
    if turned or len(sizes) > 1 or np.abs(spacings - spacings[0]).max() > 1e-3:
        raise refuse("with several directions, sizes or pixel sizes", "give one series at a time")
    row, column = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    steps = np.diff(positions @ normal)
    if twice := int((steps < AFFINE_TOLERANCE).sum()):
        raise refuse(f"of which {twice} share a position (time points, echoes)", "keep one at each position")
    step = float(np.median(steps))
    allowed = max(SPACING_TOLERANCE * step, AFFINE_TOLERANCE)
    if (uneven := np.abs(steps - step) > allowed).any():
        gaps = steps[uneven] / step
        if (np.abs(gaps - gaps.round()) < 0.1).all() and (gaps > 1.5).all():
            raise refuse(f"and {int((gaps.round() - 1).sum())} missing slice(s)", "complete it")
        raise refuse(f"with {int(uneven.sum())} distance(s) other than {step:.3g} mm", "resample it or complete it")
    along = (positions[-1] - positions[0]) / len(steps)
    straight = positions[0] + np.outer(np.arange(len(positions)), along)
    if off := int((np.abs(positions - straight).max(axis=1) > allowed).sum()):
        raise refuse(f"of which {off} do not lie in line with the others", "resample it")
    drift = np.linalg.norm(along - normal * (along @ normal)) / step
    if drift > TILT:
        raise refuse(f"that lean by {np.degrees(np.arctan(drift)):.1f} degrees (gantry tilt)", "correct the tilt first")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacings[0, 1], column * spacings[0, 0]
    affine[:3, 2], affine[:3, 3] = along, positions[0]
    affine[:2] *= -1  # from left and posterior to right and anterior
    return [slices[i] for i in order], affine
