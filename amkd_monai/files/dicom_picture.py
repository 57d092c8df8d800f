"""Single DICOM pictures, such as radiographs and ultrasound frames, as viewers show them."""

from pathlib import Path
from typing import Any

import numpy as np

PREDICTED_BY = "amkd_monai"  # as its manufacturer
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")  # may hold tables, or other windows
TABLES = ("ModalityLUTSequence", "VOILUTSequence", *GROUPS)
PLAIN = ("MONOCHROME1", "MONOCHROME2", "LINEAR")  # how grey values may be shown


def shown_levels(path: str | Path) -> np.ndarray:
    """Levels of a DICOM file of one frame, uint8: (H, W), or (H, W, 3) in colour.

    Grey values are scaled by the first window that the file states (PS3.3, C.11.2.1.2), values of 8 bits without one
    are levels as they are; MONOCHROME1 is inverted.

    Raises:
        ValueError: another colour model, several frames, lookup tables, values of other bits without a window or not
            in the lowest bits, a file that a prediction wrote, or one that pydicom below 3 would read otherwise.
    """
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError("DICOM pictures need pydicom: run `pip install 'amkd_monai[dicom]'`") from error
    try:
        data = dcmread(path)
        array, colours = _pixels(data), str(data.PhotometricInterpretation)
    except Exception as error:  # its decoders raise whatever they like
        raise ValueError(f"as DICOM: {error}") from error
    if str(data.get("Manufacturer")) == PREDICTED_BY:
        raise ValueError("it is a prediction: give the image it was made from")
    if array.ndim != (3 if int(data.SamplesPerPixel) == 3 else 2):
        raise ValueError("it holds several frames: save each as a file")
    if array.ndim == 3 and array.dtype == np.uint8 and (colours == "RGB" or colours.startswith("YBR_")):
        return array
    if int(data.get("HighBit", int(data.BitsStored) - 1)) != int(data.BitsStored) - 1:
        raise ValueError("its values are not in the lowest bits (HighBit): convert it to PNG")
    how = [name for name in TABLES if name in data]
    how += [name for name in (colours, str(data.get("VOILUTFunction") or "LINEAR")) if name not in PLAIN]
    if how:
        raise ValueError(f"it is shown by {', '.join(how)}: convert it to PNG")
    values = array * float(data.get("RescaleSlope") or 1) + float(data.get("RescaleIntercept") or 0)
    if window := [data.get(name) for name in ("WindowCenter", "WindowWidth") if data.get(name) is not None]:
        centre, width = (float(np.ravel(np.asarray(value, float))[0]) for value in window)
        values = ((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5) * 255
    elif int(data.BitsStored) != 8 or values.min() < 0 or values.max() > 255:
        raise ValueError("it states no window for its values: convert it to PNG")
    levels: np.ndarray = values.clip(0, 255).round().astype(np.uint8)
    return 255 - levels if colours == "MONOCHROME1" else levels


def _pixels(data: Any) -> np.ndarray:
    """Stored values, colour as RGB; a file that pydicom below 3, which MONAI Label has, reads otherwise is refused."""
    try:
        from pydicom.pixels import pixel_array
    except ImportError:
        compressed, colours = data.file_meta.TransferSyntaxUID.is_compressed, str(data.PhotometricInterpretation)
        if int(data.SamplesPerPixel) > 1 and (compressed or colours != "RGB"):
            raise ValueError("its colours need pydicom 3: convert it to PNG") from None
        array, bits, signed = data.pixel_array, int(data.BitsStored), int(data.PixelRepresentation)
        if array.min() < -signed * 2 ** (bits - 1) or array.max() >= 2 ** (bits - signed):
            raise ValueError("its overlay in unused bits needs pydicom 3: convert it to PNG") from None
        return np.asarray(array)
    return np.asarray(pixel_array(data))
