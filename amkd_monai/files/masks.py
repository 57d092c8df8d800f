"""Mask files: maps values to classes and finds pixels without a label."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from amkd_monai.files import pictures
from amkd_monai.files.names import DICOM_SUFFIX, has_suffix, some
from amkd_monai.files.pictures import OPAQUE, WHITE

IGNORED = 255  # class index of pixels without a label: no loss and no metric counts them

NAMED_CODES = ("auto", "nonzero", "threshold", "indices", "one_based", "inverted")
MaskCodes = str | Mapping[str, int | str]  # one of the names, or {value in the file: class index or "ignore"}

DARK, BRIGHT = 64, 192  # grey masks (JPEG, soft edges, probabilities) are darker and brighter, but for their edges
FLAT = 8  # largest step between neighbours within an area of one level; edges are steeper
BLOCK = 17  # side (pixels) of the neighbourhood in which something bright explains levels between dark and bright
STRAY = 0.02  # largest share of the foreground that may be neither dark, bright nor edge
HUE = 0.25  # largest difference of a channel, as a part of the brightest one, within one colour
COLOURED = 64  # channels that differ by more than this are a colour; less is JPEG noise
LARGEST_INDEX = 16  # values below it are class indices rather than grey levels
LARGEST_SHARE = 0.95  # more foreground than this is implausible, unless the codes are given
HOW = 'say how in `mask_codes`: "nonzero", "threshold", "indices", "one_based", "inverted" or {value: class}'


def decode(values: np.ndarray, classes: int = 2, codes: MaskCodes = "auto") -> np.ndarray:
    """Turn the values of a mask into class indices of the same shape, uint8; 255 where there is no label.

    ``values`` are those of the file (H, W) or (X, Y, Z), ``classes`` their number, background included. Of ``codes``,
    ``auto`` takes what has one meaning only: class indices from 0 on, with 255 for pixels without a label; for two
    classes also 0 and one high value (255, 65535), and grey scales of dark and bright (JPEG, soft edges,
    probabilities), cut in the middle. ``nonzero`` takes whatever is not 0 as foreground (merged classes, instance ids),
    ``threshold`` the upper half of the scale, ``indices`` the values as they are, ``one_based`` the values less 1,
    ``inverted`` 0 as foreground; a table maps each value. Values that the codes do not explain are a ValueError.
    """
    if isinstance(codes, str) and codes not in NAMED_CODES:
        names = ", ".join(NAMED_CODES)
        raise ValueError(f"is to be read by `mask_codes` {codes!r}, which is none of {names} and no {{value: class}}")
    if values.dtype not in (np.uint8, np.uint16) and values.min() >= 0 and values.max() < 65536:
        whole = np.round(values).astype(np.uint16)
        values = whole if np.abs(values - whole).max() < 1e-3 else values
    found = _distinct(values)
    if not np.isfinite(found).all() or found[0] < 0:
        raise ValueError("holds values that are negative or not finite")
    if isinstance(codes, Mapping):
        return _mapped(values, found, codes, classes)
    if codes == "auto":
        codes = _guessed(values, found, classes)
    if codes in ("indices", "one_based"):
        first = int(codes == "one_based")
        known = np.isin(found, [*range(first, first + classes), IGNORED])
        if not known.all():
            raise ValueError(f"holds the value {found[~known][0]:g}; the task has the classes 0 to {classes - 1}")
        return np.where(values == IGNORED, IGNORED, values - 1).astype(np.uint8) if first else values.astype(np.uint8)
    if classes != 2:
        raise ValueError(f"mask_codes '{codes}' is for two classes, the task has {classes}: use indices")
    if codes == "threshold":
        if len(found) == 2 and _grey(found).max() <= OPAQUE:
            raise ValueError(f"holds {found[0]:g} and {found[1]:g} alone, both in the lower half of the scale")
        return (_grey(values) > OPAQUE).astype(np.uint8)
    if codes == "nonzero" and found[0] > 0 and len(found) > 1:
        raise ValueError("holds several values but no 0, so that everything would be foreground")
    return (values == 0 if codes == "inverted" else values != 0).astype(np.uint8)


def _distinct(values: np.ndarray) -> np.ndarray:
    """Distinct values, sorted; Pillow counts bytes several times faster than NumPy."""
    if values.dtype == np.uint8:
        return np.flatnonzero(Image.fromarray(values.ravel("K").reshape(1, -1)).histogram())
    return np.flatnonzero(np.bincount(values.ravel("K"))) if values.dtype == np.uint16 else np.unique(values)


def _mapped(values: np.ndarray, found: np.ndarray, codes: Mapping[str, int | str], classes: int) -> np.ndarray:
    indices = {**{str(index): index for index in range(classes)}, "ignore": IGNORED, str(IGNORED): IGNORED}
    if wrong := [index for index in codes.values() if str(index) not in indices]:
        raise ValueError(f'mask_codes names {wrong[0]!r}: give a class from 0 to {classes - 1}, or "ignore"')
    if unknown := sorted(set(found.tolist()) - set(map(float, codes))):
        raise ValueError(f"holds the value {unknown[0]:g}, which mask_codes does not name")
    result = np.full(values.shape, IGNORED, np.uint8)
    for value, index in codes.items():
        result[values == float(value)] = indices[str(index)]
    return result


def _guessed(values: np.ndarray, found: np.ndarray, classes: int) -> str:
    """The codes of a mask, where its values leave no choice."""
    held = set(found.tolist())
    listed = some(f"{value:g}" for value in found)
    if held <= {*range(classes), IGNORED} and (IGNORED not in held or held & {*range(1, classes)}):
        if classes == 2 and 0 not in held:
            raise ValueError(f"holds no 0 but {listed}: {HOW}")
        return "indices"
    if classes > 2:
        raise ValueError(f"holds the value(s) {listed}; the task has the classes 0 to {classes - 1}")
    if len(found) == 2 and found[0] == 0 and found[1] > OPAQUE:
        return "nonzero"
    small = held - {0, IGNORED}
    coded = values.dtype.kind != "f" and small and max(small) < LARGEST_INDEX
    if len(found) > 1 and not coded and _is_grey_scale(_grey(values)):
        return "threshold"
    raise ValueError(f"holds the value(s) {listed}, which can mean several things for {classes} classes: {HOW}")


def _grey(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else pictures.eight_bits(values)


def _is_grey_scale(grey: np.ndarray) -> bool:
    """Whether dark and bright levels (H, W), uint8, say what is foreground, and all others lie along edges."""
    if grey.ndim != 2 or grey.min() >= DARK or grey.max() < BRIGHT:
        return False
    levels = _distinct(grey)
    if len(levels) > 2 and np.diff(levels).min() >= LARGEST_INDEX:
        return False  # a few codes
    allowed = STRAY * np.count_nonzero(grey > OPAQUE)
    down, right = (np.abs(np.diff(grey.astype(np.int16), axis=axis)) <= FLAT for axis in (0, 1))
    flat = down[:-1, 1:-1] & down[1:, 1:-1] & right[1:-1, :-1] & right[1:-1, 1:]
    middle = (grey > levels[0] + 2 * LARGEST_INDEX) & (grey < BRIGHT)
    if np.count_nonzero(flat & middle[1:-1, 1:-1]) > allowed:
        return False  # an area of a level of its own
    bright = grey >= BRIGHT
    between = (grey > levels[0] + LARGEST_INDEX) & ~bright
    if np.count_nonzero(between) <= allowed:
        return True
    from scipy.ndimage import maximum_filter  # only here: predicting works without SciPy

    near = maximum_filter(bright, BLOCK, mode="constant")
    return bool(np.count_nonzero(between & ~near) <= allowed)


def _values(image: Image.Image, classes: int, codes: MaskCodes, used: set[str] | None = None) -> np.ndarray:
    """Values (H, W) of an upright mask: levels, indices of a palette, or 0 and 1 for colours and transparency.

    ``used`` gets which colour stands for what, where that is guessed.
    """
    if (
        image.format in ("JPEG", "MPO")
        and 0 < max(high for _, high in np.reshape(image.getextrema(), (-1, 2))) < LARGEST_INDEX
    ):
        raise ValueError("is a JPEG of class indices, which it changes: save it as PNG")
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if pictures.has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"))
        rgb, opaque = rgba[..., :3], _opaque(rgba[..., 3])
        if opaque.any() and not opaque.all() and not rgb[opaque].any():
            if rgb.any():
                raise ValueError("is black where it is opaque, coloured where it is transparent: save it without alpha")
            if classes > 2:
                raise ValueError("has transparency in place of classes: save it as class indices")
            return opaque.astype(np.uint8)
        rgb = rgb * opaque[..., None]
    elif image.mode in ("1", "L"):
        return np.asarray(image, np.uint8)
    elif image.mode == "P":
        if max((image.getpalette() or [0])[:3]) > COLOURED and codes == "auto":
            raise ValueError(f"has a palette whose first colour is not black, {HOW}")
        values, palette = np.asarray(image), np.reshape(image.getpalette() or [], (-1, 3))
        if used is not None and codes == "auto":
            used |= {f"value {v} is {palette[v].tolist()}" for v in _distinct(values) if 0 < v < len(palette)}
        return values
    else:
        rgb = np.asarray(image.convert("RGB"))
    planes = rgb.transpose(2, 0, 1).copy()  # NumPy is many times slower along a last axis of 3
    highest = planes.max(axis=0)
    spread = (highest - planes.min(axis=0)).max()
    if spread and (classes > 2 or highest.max() < LARGEST_INDEX):
        raise ValueError("has colours, which do not say the class: save it as class indices, in grey or with a palette")
    if spread <= COLOURED:
        return np.asarray(Image.fromarray(rgb).convert("L"))
    if codes != "auto":
        inside = highest > COLOURED
        if inside.all() and (rgb != rgb[0, 0]).any():
            raise ValueError("has several colours and no black background: save it as class indices")
        return inside.astype(np.uint8)
    lit = highest >= highest.max() / 2
    hues = rgb[lit] / highest[lit][:, None]
    if (np.abs(hues - np.median(hues, axis=0)).max(axis=1) > HUE).mean() > STRAY:
        raise ValueError(f"has several colours for the classes of the task, {HOW}")
    if used is not None:
        used.add(f"the foreground is {(np.median(hues, axis=0) * 255).round().tolist()}")
    return (highest.astype(np.uint16) * 255 // highest.max()).astype(np.uint8)  # as grey levels of one colour


def _opaque(alpha: np.ndarray) -> np.ndarray:
    """Where a mask shows, by its alpha (H, W): everywhere if it is the same everywhere."""
    levels = np.unique(alpha)
    if len(levels) == 1 or (levels[0] == 0 and len(levels) == 2):
        return alpha >= levels[-1]
    if levels[-1] <= OPAQUE or levels[0] > OPAQUE:
        raise ValueError(f"is transparent by {len(levels)} degrees: save it without alpha")
    return alpha > OPAQUE


@contextmanager
def _opened(file: str | Path) -> Iterator[Image.Image]:
    """Open a mask; of DICOM it is a ValueError: what its window shows is not what its values are.

    So are colours of 16 bits, of which Pillow reads the upper half alone: small values would be 0.
    """
    if has_suffix(file, [DICOM_SUFFIX]):
        raise ValueError(f"Mask {file} is DICOM, whose values are read for pictures alone: save it as PNG.")
    with pictures.opened(file) as stored:
        tiles = getattr(stored, "tile", ())  # of a file whose pixels are not read yet
        packed = [str(tile[3] if isinstance(tile[3], str) else next(iter(tile[3] or ()), "")) for tile in tiles]
        if stored.mode[0] != "I" and any(";16" in mode for mode in packed):
            raise ValueError("its colours have 16 bits, of which the upper 8 alone could be read; save it with 8")
        yield stored


def raw_mask(file: str | Path) -> np.ndarray:
    """Read the values (H, W) of a mask before any meaning; one that has no values is a ValueError."""
    with _opened(file) as stored:
        upright = pictures.upright(stored)
    try:
        return _values(upright, 2, "auto")
    except ValueError as error:
        raise ValueError(f"Mask {file} cannot be used: it {error}.") from error


def read_mask(
    files: Sequence[str | Path],
    image: str | Path | None = None,
    classes: int = 2,
    codes: MaskCodes = "auto",
    used: set[str] | None = None,
) -> np.ndarray:
    """Read the masks of one picture by :func:`decode` as class indices (H, W), uint8; 255 where there is no label.

    A later file's classes win over background and no label. A mask lies on the picture ``image`` as viewers show it,
    see :func:`_onto`. ``used`` gets how each file is coded, see :func:`coding_problem`. A ValueError if a file cannot
    be read, has values that the codes do not explain, or another size than the picture.
    """
    of_image, result = None if image is None else pictures.picture_frame(image), np.empty(0)
    for file in files:
        with _opened(file) as stored:
            tag, stored = pictures.frame(stored)[1], pictures.upright(stored)
        try:
            mask = decode_plausible(_values(stored, classes, codes, used), classes, codes, used)
        except ValueError as error:
            raise ValueError(f"Mask {file} cannot be used: it {error}.") from error
        if of_image is not None:
            mask = _onto(mask, tag, *of_image, file)
        if file == files[0]:
            result = mask
        elif mask.shape != result.shape:
            raise ValueError(f"Mask {file} has another size than {files[0]}: correct or remove it.")
        else:
            result = np.where(np.where(mask == IGNORED, result == 0, mask > 0), mask, result)
    return result


def decode_plausible(values: np.ndarray, classes: int, codes: MaskCodes, used: set[str] | None) -> np.ndarray:
    """As :func:`decode`; a guess must not look inverted, and ``used`` gets how 255 is used."""
    mask = decode(values, classes, codes)
    if codes != "auto":
        return mask
    inside = (mask > 0) & (mask != IGNORED)
    inner = inside[tuple(slice(1, -1) if n > 4 else slice(None) for n in inside.shape)]
    border, on_border = inside.size - inner.size, np.count_nonzero(inside) - np.count_nonzero(inner)
    if (share := inside.mean()) > LARGEST_SHARE or (border and on_border == border):
        raise ValueError(f"is foreground at {share:.0%} of the image or along its whole border, as if inverted: {HOW}")
    if used is not None and (values == 255).any():
        used.add("1 and 255" if (mask == IGNORED).any() else "255")
    return mask


def coding_problem(used: set[str]) -> str:
    """Say that 255, a colour or white means one thing in some files of a data set, another in others; empty if not."""
    if {"255", "1 and 255"} <= used:
        return f"Some masks hold 0, 1 and 255, others 0 and 255 alone, so that 255 can mean two things: {HOW}."
    said = defaultdict[str, list[list[float]]](list)
    for what, _, value in sorted(entry.partition(" is ") for entry in used):
        said[what] += [json.loads(value)] if value else []
    for what, values in said.items():
        if values and np.ptp(values, axis=0).max() >= COLOURED:
            remedy = "save all on one scale, such as 8 bits" if what == WHITE else HOW
            return f"In these files {what} is {some(map(str, values))}, which can mean several things: {remedy}."
    return ""


def _onto(values: np.ndarray, tag: int, size: tuple[int, int], image_tag: int, file: str | Path) -> np.ndarray:
    """Lay an upright mask (H, W) with the EXIF orientation ``tag`` onto a picture of the upright size (W, H)."""
    if tag != 1 and image_tag == 1:  # drawn upright and tagged by mistake, or tagged rightly: the sizes must tell
        raw = pictures.turned(values, pictures.UNDONE[tag])
        if raw.shape == values.shape and raw.shape[::-1] == size:
            raise ValueError(f"Mask {file} has an EXIF orientation ({tag}), its picture has none: save it without one.")
        values = raw if raw.shape[::-1] == size else values
    elif image_tag != 1 and tag == 1 and values.shape[::-1] != size and values.shape == size:
        values = pictures.turned(values, image_tag)  # drawn on the stored pixels
    if values.shape[::-1] != size:
        raise ValueError(other_size(file, values.shape[::-1], size))
    return values


def other_size(file: str | Path, found: Sequence[int], size: Sequence[int]) -> str:
    """Say that a mask is not of the size (W, H) of its picture."""
    return f"Mask {file} is {found[0]}x{found[1]} pixels, its image {size[0]}x{size[1]}: use the original files."
