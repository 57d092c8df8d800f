"""Reads pictures of any mode as 8-bit RGB, upright as viewers show them."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps, PngImagePlugin

from amkd_monai.files.dicom_picture import shown_levels
from amkd_monai.files.names import DICOM_SUFFIX, MARK, has_suffix, keep_others
from amkd_monai.storage import atomic_path

FULL_SCALES = (255, 4095, 65535)  # white of grey pictures: the smallest that holds the brightest level
WHITE = "white of 16 bits"  # of which a data set needs one
FEWEST_LEVELS = 16  # of 256; a picture with no more is black, white or scaled wrongly
OPAQUE = 127
CLASS_COLOURS = ((86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (255, 64, 0), (0, 114, 178))
"""Of labels 1, 2, ... in overlays, then from the first on again; of the Okabe-Ito palette but one."""
ORIENTATION, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 0x0106, 0x0153  # tags
UNDONE = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the EXIF orientation that undoes another one
LATE_TAGS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # of a PNG, possibly behind its pixels
DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, ArithmeticError),
    *(NotImplementedError, MemoryError, struct.error, zlib.error),
)  # what Pillow and nibabel raise for damaged files


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture of one page; what goes wrong in the block is a ValueError that names the file."""
    try:
        with Image.fromarray(shown_levels(path)) if has_suffix(path, [DICOM_SUFFIX]) else Image.open(path) as image:
            if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it has {pages} pages, of which only one could be read; save each as a file")
            if image.mode[0] in "IF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:
                raise ValueError("its white is 0 (MinIsWhite), which only 8 bits may have; save it with black as 0")
            if image.mode == "L" and 2 in np.ravel(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1)):
                raise ValueError("its 8 bits are signed and would be read as unsigned; save it with unsigned ones")
            yield image
    except FileNotFoundError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a picture ({reason}): correct or replace the file.") from error


def frame(image: Image.Image) -> tuple[tuple[int, int], int]:
    """Upright (width, height) and EXIF orientation, 1 to 8, of an opened picture whose pixels are not read yet."""
    tags, size = getattr(image, "tag_v2", None), image.size
    if tags is not None:  # Pillow 11 turns the size of a TIFF
        size = tags[256], tags[257]
    elif image.format == "PNG" and "exif" not in image.info:  # its getexif decodes all pixels
        content = Path(image.filename).read_bytes()  # type: ignore[attr-defined]
        tags = image.getexif() if any(tag in content for tag in LATE_TAGS) else {}
    else:
        tags = Image.Image.getexif(image)
    tag = int(tags.get(ORIENTATION, 1)) if tags.get(ORIENTATION) in range(1, 9) else 1
    return (size[::-1] if tag >= 5 else size), tag


def picture_frame(path: str | Path) -> tuple[tuple[int, int], int]:
    """Upright (width, height) and EXIF orientation, 1 to 8, of a picture, by its header alone unless it is DICOM."""
    with opened(path) as image:
        return frame(image)


def upright(image: Image.Image) -> Image.Image:
    """Read the pixels of an opened picture and turn them by the EXIF orientation."""
    # Pillow maps an uncompressed TIFF into memory by its turned size, which scrambles it, unless it has no name.
    image.filename = ""  # type: ignore[attr-defined]
    image.load()  # turns a TIFF
    ImageOps.exif_transpose(image, in_place=True)
    return image


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, ...) by an EXIF orientation, 1 to 8."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    return array[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture has transparent pixels or could have."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def eight_bits(levels: np.ndarray) -> np.ndarray:
    """Scale grey levels (H, W) of 16 or 32 bits or floating point to 0 to 255, uint8.

    Floating point up to 1 is a share of white. Otherwise white is the smallest of ``FULL_SCALES`` that is not below the
    brightest level. Levels that are negative, not finite or above 65535 are a ValueError.
    """
    if not np.isfinite(levels).all() or levels.min() < 0:
        raise ValueError("it holds levels that are negative or not finite")
    highest = levels.max()
    if highest > FULL_SCALES[-1]:
        raise ValueError(f"it holds levels up to {highest:g}, more than 16 bits")
    white = next(white for white in FULL_SCALES if highest <= white)
    if levels.dtype.kind == "f":
        return (levels * (255 / (white if highest > 1 else 1))).round().astype(np.uint8)
    return (levels.astype(np.int64) * 255 // white).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to RGB of 8 bits; transparent pixels become black."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(eight_bits(np.asarray(image)))
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def level_problem(levels: np.ndarray) -> str:
    """Say that an image of any shape, uint8 or in [0, 1], has almost no levels; empty if it has more, or few pixels."""
    for sampled in (4_000, 1_000_000):  # the larger sample only decides what the smaller one makes suspicious
        part = levels.reshape(-1)[:: levels.size // sampled // 6 * 6 + 1]  # a step that meets every channel
        if part.dtype != np.uint8:
            part = (part.clip(0, 1) * 255).round().astype(np.uint8)
        found = np.count_nonzero(np.bincount(part))
        if found > min(FEWEST_LEVELS, levels.size // 64):
            return ""
    return f"it has only {found} of 256 levels (from {part.min()} to {part.max()}): it is blank or its scale is unknown"


def read_picture(path: str | Path, used: set[str] | None = None) -> np.ndarray:
    """Read a picture of any mode as RGB (H, W, 3), uint8, upright as viewers show it.

    A picture that cannot be read or has almost no levels is a ValueError. ``used`` gets the white of one of 16 bits.
    """
    with opened(path) as image:
        loaded = upright(image)
        if used is not None and loaded.mode.startswith("I"):
            used.add(f"{WHITE} is {[white for white in FULL_SCALES if np.asarray(loaded).max() <= white][:1]}")
        picture = np.asarray(to_rgb(loaded))
    if problem := level_problem(picture):
        raise ValueError(f"{path} cannot be used: {problem}.")
    return picture


def read_channels(files: Sequence[str | Path], used: set[str] | None = None) -> np.ndarray:
    """Read one picture as RGB, or several grey pictures of one size as channels: (H, W, C), uint8.

    A file that cannot be read, in colour among several, or of another size is a ValueError; ``used`` is for one.
    """
    first, *others = (read_picture(file, used if len(files) == 1 else None) for file in files)
    if not others:
        return first
    for file, picture in zip(files, (first, *others), strict=True):
        if picture.shape != first.shape:
            raise ValueError(f"{file} has another size than {files[0]}: all channels of an image need one size.")
        if (picture != picture[..., :1]).any():
            raise ValueError(f"{file} is in colour, but one of {len(files)} channels: give a grey picture a channel.")
    return np.stack([picture[..., 0] for picture in (first, *others)], -1)


def class_colours(labels: ArrayLike) -> np.ndarray:
    """RGB (..., 3), uint8, of labels (...) from 1 on."""
    return np.array(CLASS_COLOURS, np.uint8)[(np.asarray(labels, int) - 1) % len(CLASS_COLOURS)]


def contrasting(image: np.ndarray, count: int = 1) -> np.ndarray:
    """Those of ``CLASS_COLOURS`` (count, 3) that differ most from an image (H, W, 3), uint8, and from each other."""

    def seen(colours: np.ndarray) -> np.ndarray:  # (N, 3), light, which thin lines are seen by, and two of colour
        return np.asarray(Image.fromarray(colours[None]).convert("YCbCr"), float)[0] * (1, 0.6, 0.6)

    palette, pixels = np.array(CLASS_COLOURS, np.uint8), image.reshape(-1, 3)
    places, sample = seen(palette), seen(pixels[:: max(1, len(pixels) // 20_000)])
    far = np.percentile(np.linalg.norm(places[:, None] - sample, axis=-1), 5, axis=1)
    chosen = [int(far.argmax())]
    while len(chosen) < count:
        far = np.minimum(far, np.linalg.norm(places - places[chosen[-1]], axis=-1) / 2)
        chosen.append(int(far.argmax()))
    return palette[chosen]


def outlined(image: np.ndarray, masks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Draw borders on a copy of an image (H, W, 3): each mask (H, W), boolean, in its colour rimmed in black."""
    picture, width = image.copy(), max(1, round(max(image.shape[:2]) / 160))
    for mask, _ in masks:
        picture[_grown(mask, (width + 1) // 2) & ~mask] = 0
    for mask, colour in masks:
        picture[mask & _grown(~mask, width)] = colour
    return picture


def _grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """Add the neighbours of a mask (H, W), boolean; in NumPy, since predicting works without SciPy."""
    for _ in range(steps):
        around = np.pad(mask, 1)
        mask = mask | around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
    return mask


def write_mask(path: Path, mask: np.ndarray, classes: int) -> None:
    """Write class indices (H, W), uint8, as PNG: 0 and 255 for two ``classes``, the indices for more."""
    write_png(path, mask if classes > 2 else (mask > 0).astype(np.uint8) * 255)


def write_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """Write levels (H, W) or (H, W, 3), uint8, marked as a prediction."""
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    with atomic_path(keep_others(path)) as temporary:
        Image.fromarray(np.asarray(picture)).save(temporary, format="PNG", pnginfo=mark)
