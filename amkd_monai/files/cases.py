"""The image of one case of volumes: NIfTI files of a channel each, a NIfTI file of several, folders of DICOM slices."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from amkd_monai.files.dicom import Slice, find_series, read_series, series_grid
from amkd_monai.files.names import PICTURE_SUFFIXES, VOLUME_SUFFIXES, file_id, has_suffix, images_to_predict, is_slice
from amkd_monai.files.volumes import Grid, check_grid, read_volume, reorder, volume_grid


def is_volume(path: str | Path) -> bool:
    """Whether a path is that of a volume by its name, or a folder."""
    return has_suffix(path, VOLUME_SUFFIXES) or Path(path).is_dir()


def is_series(folder: Path) -> bool:
    """Whether a folder holds files of a DICOM series."""
    return any(is_slice(file) for file in folder.iterdir() if file.is_file())


def series_folders(folder: Path) -> list[Path]:
    """List the folders of a folder that hold files of a DICOM series."""
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and not f.name.startswith(".") and is_series(f)]


def to_predict(folder: Path, volumes: bool) -> dict[str, Path]:
    """Map id to path of the pictures of a folder, or its volumes and folders of a series, that are no predictions."""
    folders = series_folders(folder) if volumes else []
    files = images_to_predict(folder, VOLUME_SUFFIXES if volumes else PICTURE_SUFFIXES, folders)
    for series in folders:
        name = file_id(series)
        files[f"{name}_" if name in files else name] = series
    return files


def case_grid(files: Sequence[str | Path]) -> tuple[Grid, int]:
    """Return the grid of a case and the number of its channels, from headers alone; see :func:`read_case`."""
    grid = _grid(files[0], len(files) == 1)
    for file in files[1:]:
        check_grid(file, _grid(file), grid, "Channel")
    return grid, grid.channels * len(files)


def read_case(files: Sequence[str | Path], channels: int | None = None) -> tuple[np.ndarray, Grid]:
    """Read the channels of a case, such as MR sequences, (C, X, Y, Z) float32, on the grid of the first file.

    ``files`` are NIfTI volumes and folders of one DICOM series, a channel each, or one NIfTI volume whose last axis of
    four is that of the channels. A file or series that cannot be read or lies on another grid, or another number of
    ``channels`` than a given one, is a ValueError.
    """
    found, grid = _read(files[0], len(files) == 1)
    for file in files[1:]:
        array, own = _read(file)
        check_grid(file, own, grid, "Channel")
        found = np.concatenate([found, reorder(array[0], own, grid.axes)[None]])
    if channels not in (None, len(found)):
        raise ValueError(f"{files[0]} gives {len(found)} channel(s), not {channels}: give all channels of the case.")
    return np.ascontiguousarray(found), grid


def _grid(file: str | Path, several: bool = False) -> Grid:
    return series_grid(*_series(Path(file)))[1] if Path(file).is_dir() else volume_grid(file, several)


def _read(file: str | Path, several: bool = False) -> tuple[np.ndarray, Grid]:
    """Channels (C, X, Y, Z) of a file or series, one unless it may hold several."""
    array, grid = read_series(*_series(Path(file))) if Path(file).is_dir() else read_volume(file, several)
    return (array if array.ndim == 4 else array[None]), grid


def _series(folder: Path) -> tuple[Path, list[Slice]]:
    if len(found := find_series(folder)) != 1:
        raise ValueError(f"{folder} holds {len(found)} DICOM volumes: give the slices of each a folder of its own.")
    return folder, found[0]
