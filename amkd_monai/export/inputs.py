"""Find and read what is to be predicted: pictures, NIfTI volumes, DICOM series. No torch, no MONAI."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amkd_monai.data.layout import IMAGE_SUFFIXES, file_id
from amkd_monai.data.pictures import to_rgb
from amkd_monai.data.volumes import VOLUME_SUFFIXES, affine_problem, volume_shape
from amkd_monai.export.steps import Grid

ORTHOGONAL = 1e-3
"""Largest cosine between two axes of a volume that resampling takes for a right angle."""


@dataclass(frozen=True)
class Input:
    """One image to predict.

    Attributes:
        id: name of the answer's files.
        path: file, or folder of a DICOM series.
        series: UID of the series; empty for files.
    """

    id: str
    path: Path
    series: str = ""


def find_inputs(path: str | Path, dimensions: int) -> list[Input]:
    """List the images of a file, a folder, or a folder of DICOM series.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no image of this model's kind, or two with one name.
    """
    path, suffixes = Path(path), IMAGE_SUFFIXES if dimensions == 2 else VOLUME_SUFFIXES
    kind = "pictures (PNG, JPEG, TIFF, BMP)" if dimensions == 2 else "volumes (NIfTI, or a folder of one DICOM series)"
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}: give an image or a folder.")
    if path.is_file():
        if not path.name.lower().endswith(tuple(suffixes)):
            raise ValueError(f"{path} does not fit the model: it takes {kind}.")
        return [Input(file_id(path), path)]
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    found = [Input(file_id(f), f) for f in files if f.name.lower().endswith(tuple(suffixes))]
    if dimensions == 3:
        for folder in [path, *sorted(f for f in path.iterdir() if f.is_dir())]:
            found += _dicom_series(folder)
    if not found:
        raise ValueError(f"{path} holds nothing that fits the model: it takes {kind}.")
    names = [i.id for i in found]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} holds two images called {min(double)}: rename one of them.")
    return found


def _dicom_series(folder: Path) -> list[Input]:
    files = [f for f in sorted(folder.iterdir()) if f.is_file()]
    if not any(_is_dicom(f) for f in files[:5]):
        return []
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(f"{folder} holds DICOM files: run `pip install SimpleITK` to read them.") from error
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    several = len(series) > 1
    return [Input(f"{folder.name}_{n}" if several else folder.name, folder, uid) for n, uid in enumerate(series, 1)]


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def read_picture(path: Path) -> np.ndarray:
    """Read a picture of any mode as RGB, (3, H, W), levels 0 to 255.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.ascontiguousarray(np.moveaxis(np.asarray(to_rgb(image), np.float32), -1, 0))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: replace it by an intact copy.") from error


def read_volume(item: Input) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume as (D, H, W) in the axes of its file, and its affine (4, 4) to RAS, mm.

    The slices of a DICOM series become a volume whose axes point right, anterior and superior.

    Raises:
        ValueError: it cannot be read, or its geometry cannot be used.
    """
    array, affine = _read_series(item) if item.series else _read_nifti(item.path)
    if not np.isfinite(array).all():
        raise ValueError(f"{item.path} holds values that are not finite: replace the file.")
    if problem := affine_problem(affine):
        raise ValueError(f"{item.path} {problem}: replace the file.")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > ORTHOGONAL:
        raise ValueError(f"{item.path} has axes that are not at right angles: resample it first.")
    return array, affine


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import nibabel

    volume_shape(path)
    try:
        volume = nibabel.load(path)
        return np.asarray(volume.dataobj, np.float32), np.asarray(volume.affine, float)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a NIfTI volume: replace it by an intact copy.") from error


def _read_series(item: Input) -> tuple[np.ndarray, np.ndarray]:
    import nibabel
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(item.path), item.series))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise ValueError(f"{item.path} holds a DICOM series that cannot be read: replace its files.") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{item.path} holds no volume of one channel: give a series of grey slices.")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # from left and posterior to right and anterior
    array = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32)
    upright = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    return np.asarray(upright.dataobj, np.float32), np.asarray(upright.affine, float)


def grid_of(affine: np.ndarray) -> Grid:
    """Voxel size and axes of an affine (4, 4) to RAS."""
    import nibabel

    spacing = [float(v) for v in np.linalg.norm(affine[:3, :3], axis=0)]
    return Grid(spacing, "".join(nibabel.aff2axcodes(affine)))
