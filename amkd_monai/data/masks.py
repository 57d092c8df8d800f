"""What is foreground in the mask files of 2D data sets, which come in every mode and scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

GREY_THRESHOLD = 127
"""Masks stored as JPEG hold every grey level; at > 0 the compression's ringing would count as foreground."""

LARGEST_INDEX = 15
"""A mask with no level above this one is a map of class indices (0/1, or several classes)."""

MOST_CODES = 8
SMALLEST_GAP = 16
"""A mask of at most 8 levels that lie at least 16 apart is a map of grey codes, such as 0, 38 and 75."""

COLOURED = 64
"""Channels that differ by more than this are a colour; less is JPEG noise."""


def foreground(image: Image.Image) -> np.ndarray:
    """Tell foreground from background in a mask of any mode; all classes are merged.

    Coloured masks: every colour but black is foreground. Otherwise the levels decide: class indices and grey codes are
    foreground where they are not 0, grey scales (JPEG, smooth edges) are cut at 127. Transparent is background.

    Args:
        image: the opened mask.

    Returns:
        Boolean array (H, W).

    Raises:
        ValueError: levels that are neither of these.
    """
    if image.mode in ("1", "L"):
        return _by_level(np.asarray(image.convert("L")))
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        if not np.isfinite(levels).all() or levels.min() < 0:
            raise ValueError("holds values that are negative or not finite")
        return _by_level(levels / 257 if levels.max() > 255 else levels)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        rgb = rgba[..., :3] * (rgba[..., 3:] > GREY_THRESHOLD)
    else:
        rgb = np.asarray(image.convert("RGB"))
    highest = rgb.max(axis=2)
    if (highest - rgb.min(axis=2)).max() > COLOURED:
        return highest > COLOURED
    from PIL import Image

    return _by_level(np.asarray(Image.fromarray(rgb).convert("L")))


def _by_level(levels: np.ndarray) -> np.ndarray:
    found = np.flatnonzero(np.bincount(levels.ravel())) if levels.dtype == np.uint8 else np.unique(levels)
    highest = float(found[-1])
    few = len(found) <= MOST_CODES and (len(found) == 1 or np.diff(found).min() >= SMALLEST_GAP)
    if highest <= LARGEST_INDEX or few:
        return levels > 0
    if highest > GREY_THRESHOLD:
        return levels > GREY_THRESHOLD
    raise ValueError(
        f"holds {len(found)} grey levels up to {highest:g}, neither a mask of 0 and 255 nor a map of few classes"
    )


def read_mask(files: Sequence[str | Path]) -> np.ndarray:
    """Read the masks of one image and combine them by OR.

    Args:
        files: one mask file or several.

    Returns:
        Boolean array (H, W).

    Raises:
        ValueError: a file is no picture, has unexpected values, or the sizes differ.
    """
    from PIL import Image

    result: np.ndarray | None = None
    for file in files:
        try:
            with Image.open(file) as image:
                mask = foreground(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Mask {file} cannot be used ({error}): correct or replace the file.") from error
        if result is not None and mask.shape != result.shape:
            raise ValueError(f"Mask {file} has another size than {files[0]}: correct or remove it.")
        result = mask if result is None else result | mask
    if result is None:
        raise ValueError("There is no mask file to read.")
    return result
