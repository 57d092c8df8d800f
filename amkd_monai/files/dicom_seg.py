"""DICOM made of a series: a mask as segmentation, and pictures of its slices as secondary captures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amkd_monai.files.names import keep_others
from amkd_monai.files.volumes import Grid
from amkd_monai.storage import atomic_folder, atomic_path

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
    """Write class indices (X, Y, Z) on the ``grid`` of a series, as ``read_series`` gives it, as a DICOM segmentation.

    Each of ``classes`` but the background has a segment. A ValueError if a slice lacks what it refers to.
    """
    slices = _in_order(series, grid)
    import highdicom
    from pydicom.sr.codedict import codes

    from amkd_monai import __version__

    for item in slices:
        if not item.get("SliceThickness"):
            item.SliceThickness = f"{grid.spacing[2]:.6g}"
    by = highdicom.AlgorithmIdentificationSequence("amkd_monai", codes.DCM.ArtificialIntelligence, __version__)
    how, segments = (highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC, by), []
    for label, name in enumerate(classes[1:], 1):
        coded = CODES.get(name.lower(), (MORPHOLOGY, (f"CLASS{label}", "99AMKD", name[:64])))
        category, kind = (highdicom.sr.CodedConcept(*code) for code in coded)
        segments.append(highdicom.seg.SegmentDescription(label, name[:64], category, kind, *how))
    result = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=np.ascontiguousarray(mask.T),  # (X, Y, Z) -> (slices, rows, columns)
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
    with atomic_path(keep_others(path)) as temporary:
        result.save_as(temporary)


def write_captures(
    folder: Path,
    mask: np.ndarray,
    levels: np.ndarray,
    grid: Grid,
    series: Sequence[Path],
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Write a new series of secondary captures, a picture of each slice of a series, to a new or replaced folder.

    Class indices and grey levels 0 to 255 (X, Y, Z) lie on the ``grid`` of the series; ``draw`` makes a picture (rows,
    columns, 3), uint8, of levels and mask of a slice. A ValueError if a slice lacks what a capture refers to.
    """
    slices = _in_order(series, grid)
    import highdicom
    from pydicom import Dataset

    def towards(direction: np.ndarray) -> str:
        axis = np.abs(direction).argmax()
        return ("RAF", "LPH")[int(direction[axis] > 0)][axis]

    uid = highdicom.UID()
    for file in folder.rglob("*"):
        keep_others(file)
    with atomic_folder(folder, replace=True) as temporary:
        for number, (item, *planes) in enumerate(zip(slices, levels.T, mask.T, strict=True), 1):
            across, down = np.array(item.ImageOrientationPatient, float).reshape(2, 3)
            result = highdicom.sc.SCImage.from_ref_dataset(
                item,
                draw(*planes),
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                series_instance_uid=uid,
                series_number=2000 + int(slices[0].get("SeriesNumber") or 0),
                sop_instance_uid=highdicom.UID(),
                instance_number=number,
                manufacturer="amkd_monai",
                pixel_spacing=tuple(item.PixelSpacing),
                patient_orientation=(towards(across), towards(down)),
            )
            result.SeriesDescription = "Overlay of a prediction, not for clinical use"
            result.SourceImageSequence = [Dataset()]
            for name in ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID"):
                setattr(result.SourceImageSequence[0], name, item[name.removeprefix("Referenced")].value)
            result.save_as(temporary / f"{number:04d}.dcm")


def _in_order(series: Sequence[Path], grid: Grid) -> list[Any]:
    """Read the slices without their pixels, in their order along the grid; what may be empty is there."""
    try:
        import highdicom  # noqa: F401
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError("DICOM output needs highdicom: run `pip install 'amkd_monai[dicom]'`.") from error

    slices = [dcmread(file, stop_before_pixels=True) for file in series]
    for item, file in zip(slices, series, strict=True):
        if missing := [name for name in NEEDED if not item.get(name)]:
            raise ValueError(f"{file} lacks {missing[0]}, which DICOM output refers to: leave out the DICOM options.")
        for name in EMPTY:
            if name not in item:
                setattr(item, name, "")
    across, down, along, corner = (grid.affine[:3] * [[-1], [-1], [1]]).T  # DICOM counts to left and posterior
    slices.sort(key=lambda item: float(np.array(item.ImagePositionPatient, float) @ along))
    for number, item in enumerate(slices):
        spacing = np.array(item.PixelSpacing, float)[::-1, None]  # of the steps across and down
        own = np.vstack(
            [np.array(item.ImageOrientationPatient, float).reshape(2, 3) * spacing, item.ImagePositionPatient]
        )
        if np.abs(own.astype(float) - [across, down, corner + number * along]).max() > 0.1 * spacing.min():
            where = f"The slice {item.SOPInstanceUID} does not lie on the grid of its series"
            raise ValueError(f"{where}: leave out the DICOM options.")
    return slices
