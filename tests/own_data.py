"""Data of a user's own, made from real pictures and from phantoms: a lesion and the rim around it, three classes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from helpers import needs, shared_data
from PIL import Image
from scipy import ndimage

from amkd_monai.data.datasets import get_task


def rim_of(lesion: np.ndarray, width: int) -> np.ndarray:
    """Classes of a lesion (2) and of what lies around it (1), of the same shape, uint8."""
    around = ndimage.binary_dilation(lesion, iterations=width)
    return (lesion.astype(np.uint8) + around).astype(np.uint8)


def rimmed_pictures(folder: Path, count: int = 14, values: tuple[int, int, int] = (0, 1, 2)) -> Path:
    """Write real pictures of polyps, two of each patient, and their masks of three values."""
    source = shared_data("Kvasir-SEG")
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, file in enumerate(sorted((source / "images").glob("*.jpg"))[:count]):
        name = f"patient{number // 2:02d}_{number}"
        picture = Image.open(file)
        picture.thumbnail((160, 160))
        picture.save(folder / "images" / f"{name}.png")
        lesion = np.asarray(Image.open(source / "masks" / file.name).convert("L").resize(picture.size)) > 127
        classes = rim_of(lesion, 5)
        Image.fromarray(np.array(values, np.uint8)[classes]).save(folder / "masks" / f"{name}.png")
    return folder


def rimmed_volumes(folder: Path, cases: int = 6) -> Path:
    """Write phantom volumes in nnU-Net's raw layout, with labels of three classes."""
    import json

    phantom = get_task("msd_heart").write_phantom(folder.parent / "hearts", cases=cases, shape=(12, 40, 44))
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    for image in sorted((phantom / "imagesTr").glob("*.nii.gz")):
        case = image.name.removesuffix(".nii.gz")
        (folder / "imagesTr" / f"{case}_0000.nii.gz").write_bytes(image.read_bytes())
        label = nib.load(phantom / "labelsTr" / image.name)
        classes = rim_of(np.asarray(label.dataobj) > 0, 2)
        nib.save(nib.Nifti1Image(classes, label.affine), folder / "labelsTr" / image.name)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "wall": 1, "left atrium": 2}}
    about |= {"numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def dicom_series(folder: Path, volume: Path) -> Path:
    """Write a NIfTI volume of whole numbers as a folder of DICOM slices, whose names say nothing of their order."""
    itk = needs("SimpleITK")
    folder.mkdir(parents=True)
    image = itk.Cast(itk.ReadImage(str(volume)), itk.sitkInt16)
    writer, uid = itk.ImageFileWriter(), f"1.2.826.0.1.3680043.2.1125.{len(volume.name)}{sum(volume.name.encode())}"
    writer.KeepOriginalImageUIDOn()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    for z in range(image.GetSize()[2]):
        plane = image[:, :, z]
        plane = itk.JoinSeries([plane])
        tags = {"0008|0060": "MR", "0020|000e": uid, "0020|000d": f"{uid}.1", "0008|0018": f"{uid}.2.{z + 1}"}
        tags["0020|0052"] = f"{uid}.3"
        tags["0020|0032"] = "\\".join(f"{c:.6f}" for c in image.TransformIndexToPhysicalPoint((0, 0, z)))
        tags["0020|0037"] = "\\".join(f"{c:.6f}" for c in direction[:, :2].T.ravel())
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        plane.SetSpacing((*image.GetSpacing()[:2], image.GetSpacing()[2]))
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / f"{(7 * z) % 1009:04d}.dcm"))
        writer.Execute(plane)
    return folder


def dicom_picture(path: Path, values: np.ndarray, **tags) -> Path:
    """Write grey values (H, W) or colours (H, W, 3) as one DICOM file."""
    pydicom = needs("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape[-2:] if values.ndim == 2 else values.shape[:2]
    data.SamplesPerPixel, data.PixelRepresentation = (3 if values.ndim == 3 else 1), int(values.dtype.kind == "i")
    data.BitsAllocated = data.BitsStored = values.dtype.itemsize * 8
    data.HighBit, data.PixelData = data.BitsStored - 1, values.tobytes()
    data.PhotometricInterpretation = "RGB" if values.ndim == 3 else "MONOCHROME2"
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


FINDINGS = ["mass", "Fluid level", "stripes"]


def finding_pictures(folder: Path, count: int = 64) -> Path:
    """Write noisy grey pictures with a bright disc, a bright lower edge and stripes, each or not, and their table."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64]
    rows = [["image", "patient", "age", *FINDINGS]]
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        present = (rng.random(3) < 0.5).astype(int)
        values = rng.normal(90, 12, (64, 64)) + np.kron(rng.normal(0, 25, (4, 4)), np.ones((16, 16)))
        values[(y - 24) ** 2 + (x - 16) ** 2 < 80] += 110 * present[0]
        values[52:] += 110 * present[1]
        values[:, 40:] += 60 * present[2] * np.sin(x[:, 40:] * 1.6)
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        rows.append([f"{number:02d}", f"p{number // 2}", str(40 + number % 7), *map(str, present)])
    (folder / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    return folder


def signed(series: Path, patient: str, study: str) -> None:
    """Give the slices of a series a patient and a study."""
    pydicom = needs("pydicom")
    for file in series.iterdir():
        data = pydicom.dcmread(file)
        data.PatientID, data.StudyInstanceUID = patient, study
        data.save_as(file)
