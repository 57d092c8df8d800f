"""DICOM segmentation: a mask in the geometry of the series that it was made from, with references to its slices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.files.volumes import Grid
from amkd_monai.storage import atomic_path

MORPHOLOGY = ("49755003", "SCT", "Morphologically Abnormal Structure")
CODES = {
    "left atrium": (("123037004", "SCT", "Anatomical Structure"), ("82471001", "SCT", "Left atrium")),
    "infection": (MORPHOLOGY, ("52988006", "SCT", "Lesion")),
    "lesion": (MORPHOLOGY, ("52988006", "SCT", "Lesion")),
    "tumour": (MORPHOLOGY, ("108369006", "SCT", "Neoplasm")),
}
"""Category and type of a class by its name, as value, scheme and meaning; others get the scheme ``99AMKD``.

A class without a code is put into the category of abnormal structures: a segmentation must name one.
"""
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
"""Attributes that a segmentation must have and that may be empty."""


def write_segmentation(
    path: Path, mask: np.ndarray, grid: Grid, series: Sequence[Path], classes: Sequence[str]
) -> None:
    """Write class indices (X, Y, Z) of a series as a binary DICOM segmentation, one segment for each class.

    Args:
        path: file to write.
        mask: on ``grid``.
        grid: of the series, as it was read.
        series: files of its slices.
        classes: names, the background first.

    Raises:
        ValueError: a slice lacks what a segmentation refers to, or highdicom is not installed.
    """
    try:
        import highdicom
        from pydicom import dcmread
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise ValueError("A DICOM segmentation needs highdicom: run `pip install 'amkd_monai[dicom]'`.") from error
    from amkd_monai import __version__

    slices = [dcmread(file, stop_before_pixels=True) for file in series]
    for item, file in zip(slices, series, strict=True):
        if missing := [name for name in NEEDED if not item.get(name)]:
            raise ValueError(f"{file} lacks {missing[0]}, which a DICOM segmentation refers to: leave out --dicom-seg.")
        for name in EMPTY:
            if name not in item:
                setattr(item, name, "")
        if not item.get("SliceThickness"):
            item.SliceThickness = f"{grid.spacing[2]:.6g}"
    planes = np.stack([_plane(mask, grid, item) for item in slices])
    how = highdicom.AlgorithmIdentificationSequence("amkd_monai", codes.DCM.ArtificialIntelligence, __version__)
    segments = []
    for label in range(1, len(classes)):
        category, kind = CODES.get(
            classes[label].lower(), (MORPHOLOGY, (f"CLASS{label}", "99AMKD", classes[label][:64]))
        )
        segments.append(
            highdicom.seg.SegmentDescription(
                label,
                classes[label][:64],
                highdicom.sr.CodedConcept(*category),
                highdicom.sr.CodedConcept(*kind),
                highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                how,
            )
        )
    result = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=planes,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=1000 + int(slices[0].get("SeriesNumber") or 0),
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="amkd_monai",
        manufacturer_model_name="amkd_monai",
        software_versions=__version__,
        device_serial_number="0",
        series_description="Prediction, not for clinical use",
    )
    with atomic_path(path) as temporary:
        result.save_as(temporary)


def _plane(mask: np.ndarray, grid: Grid, item: Any) -> np.ndarray:
    """The part of a mask (X, Y, Z) that lies in a slice, (rows, columns)."""
    read = {name: np.array(getattr(item, name), float) for name in ("ImagePositionPatient", "ImageOrientationPatient")}
    down, across = (float(v) for v in item.PixelSpacing)
    affine = np.eye(4)  # from (row, column, 0) to mm, left, posterior, superior
    affine[:3, 0], affine[:3, 1] = (
        read["ImageOrientationPatient"][3:] * down,
        read["ImageOrientationPatient"][:3] * across,
    )
    affine[:3, 3] = read["ImagePositionPatient"]
    affine[:2] *= -1
    rows, columns = np.indices((int(item.Rows), int(item.Columns)))
    places = (
        np.stack([rows, columns, np.zeros_like(rows), np.ones_like(rows)], -1) @ (np.linalg.inv(grid.affine) @ affine).T
    )
    voxels = places[..., :3].round().astype(int)
    if np.abs(places[..., :3] - voxels).max() > 0.1 or (voxels < 0).any() or (voxels >= mask.shape).any():
        raise ValueError(
            f"The slice {item.SOPInstanceUID} does not lie on the grid of its series: leave out --dicom-seg."
        )
    return mask[tuple(np.moveaxis(voxels, -1, 0))]
