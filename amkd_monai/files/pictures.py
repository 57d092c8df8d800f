"""Pictures of any mode as RGB of 8 bits, upright as viewers show them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amkd_monai.atomic import atomic_path
from amkd_monai.files.names import MARK

if TYPE_CHECKING:
    from PIL import Image

FULL_SCALES = (255, 4095, 65535)
"""White of grey pictures of more than 8 bits: the smallest of these that holds the picture's brightest level."""

FEWEST_LEVELS = 16
"""A picture of no more different levels than this, out of 256, is black, white or scaled wrongly."""

OPAQUE = 127
ORIENTATION = 0x0112
UNDONE = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The EXIF orientation that takes back another one."""

DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, ArithmeticError, NotImplementedError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for damaged files."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong with it is told in one sentence.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or has several pages.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.format != "MPO" and (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it has {pages} pages, of which only one could be read; save each as a file")
            yield image
    except FileNotFoundError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a picture ({reason}): correct or replace the file.") from error


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened picture, 1 to 8; 1 where there is none. To be asked before the pixels are read."""
    from PIL import Image as pillow

    tags = getattr(image, "tag_v2", None)
    if tags is None:  # the method of PNG reads all pixels, since a tag may stand behind them
        tags = image.getexif() if _has_late_text(image) else pillow.Image.getexif(image)
    value = tags.get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _has_late_text(image: Image.Image) -> bool:
    """Whether a PNG has EXIF or text behind its pixels."""
    if image.format != "PNG" or "exif" in image.info:
        return False
    stream, late = image.fp, False  # type: ignore[attr-defined]
    start = stream.tell()
    stream.seek(8)
    pixels = False
    while len(head := stream.read(8)) == 8 and not late:
        late = pixels and head[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt")
        pixels |= head[4:] == b"IDAT"
        stream.seek(int.from_bytes(head[:4], "big") + 4, 1)
    stream.seek(start)
    return late


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture as viewers show it."""
    tags = getattr(image, "tag_v2", None)
    width, height = (tags[256], tags[257]) if tags is not None else image.size  # Pillow 11 turns the size of a TIFF
    return (height, width) if orientation(image) >= 5 else (width, height)


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as viewers show it; only the header is read.

    Raises:
        ValueError: the file is no picture.
    """
    with opened(path) as image:
        return upright_size(image)


def upright(image: Image.Image) -> Image.Image:
    """Read an opened picture and turn it by its EXIF orientation."""
    from PIL import ImageOps

    # Pillow maps an uncompressed TIFF into memory by its turned size, which scrambles it, unless it has no name.
    image.filename = ""  # type: ignore[attr-defined]
    image.load()  # turns a TIFF
    return ImageOps.exif_transpose(image)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (H, W, ...) by an EXIF orientation, 1 to 8."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return array[::rows, ::columns]


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture has transparent pixels or could have."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def eight_bits(levels: np.ndarray) -> np.ndarray:
    """Scale grey levels (H, W) of 16 or 32 bits or floating point to 0 to 255, uint8.

    Floating point up to 1 is a share of white. Otherwise white is 255, 4095 (12 bits) or 65535: the smallest that is
    not below the brightest level.

    Raises:
        ValueError: negative or non-finite levels, or some above 65535.
    """
    if not np.isfinite(levels).all() or levels.min() < 0:
        raise ValueError("it holds levels that are negative or not finite")
    highest = levels.max()
    if levels.dtype.kind == "f" and highest <= 1:
        return (levels * 255).round().astype(np.uint8)
    white = next((white for white in FULL_SCALES if highest <= white), 0)
    if not white:
        raise ValueError(f"it holds levels up to {highest:g}, more than 16 bits")
    if levels.dtype.kind == "f":
        return (levels * (255 / white)).round().astype(np.uint8)
    return (levels.astype(np.int64) * 255 // white).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB of 8 bits; what is transparent becomes black.

    Raises:
        ValueError: levels that have no scale, see :func:`eight_bits`.
    """
    from PIL import Image as pillow

    if image.mode.startswith(("I", "F")):
        image = pillow.fromarray(eight_bits(np.asarray(image)))
    if has_alpha(image):
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def level_problem(levels: np.ndarray) -> str:
    """Say that an image, uint8 or in [0, 1], has almost no levels; empty if it has more, or few pixels."""
    flat = levels.reshape(-1)
    flat = flat[:: max(1, flat.size // 1_000_000)]
    if flat.dtype != np.uint8:
        flat = (flat.clip(0, 1) * 255).round().astype(np.uint8)
    found = np.count_nonzero(np.bincount(flat))
    if found > min(FEWEST_LEVELS, flat.size // 64):
        return ""
    return f"it has only {found} of 256 levels (from {flat.min()} to {flat.max()}): it is blank or its scale is unknown"


def read_picture(path: str | Path, size: Sequence[int] | None = None) -> np.ndarray:
    """Read a picture of any mode as RGB, upright as viewers show it.

    Args:
        path: the file.
        size: (H, W) to resize to while decoding: a JPEG is decoded at the smallest of its own scales that is not below
            it, then resized with anti-aliasing. None keeps the size.

    Returns:
        Levels 0 to 255 (H, W, 3), uint8.

    Raises:
        ValueError: it cannot be read, or has almost no levels.
    """
    from PIL import Image

    with opened(path) as image:
        if size is not None:
            target = int(size[1]), int(size[0])
            image.draft("RGB", target[::-1] if orientation(image) >= 5 else target)
        rgb = to_rgb(upright(image))
    if problem := level_problem(np.asarray(rgb)):
        raise ValueError(f"{path} cannot be used: {problem}.")
    return np.asarray(rgb if size is None else rgb.resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0))


def write_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """Write levels (H, W) or (H, W, 3), uint8, marked as a prediction."""
    from PIL import Image, PngImagePlugin

    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=mark)
