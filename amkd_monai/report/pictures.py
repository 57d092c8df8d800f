"""Pictures as data URIs: cases with outlines, what teachers say, where they are trusted."""

from __future__ import annotations

import base64
import io

import numpy as np

REFERENCE, PREDICTION = (0, 158, 115), (213, 94, 0)
"""Green and vermilion of the Okabe-Ito palette."""
SCALE_TO = 320
"""Longest side at which a picture is shown."""


def data_uri(picture: np.ndarray, quality: int = 80) -> str:
    """An RGB picture (H, W, 3) uint8 as a JPEG data URI."""
    from PIL import Image

    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(memory, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def outlined(image: np.ndarray, reference: np.ndarray | None, prediction: np.ndarray | None) -> np.ndarray:
    """Draw the borders of masks (H, W) on an image (H, W, 3): the reference green, the prediction vermilion."""
    image, factor = enlarged(image)
    picture = image.copy()
    for mask, colour in ((reference, REFERENCE), (prediction, PREDICTION)):
        if mask is not None and mask.any():
            inside = np.kron(mask > 0, np.ones((factor, factor), bool))
            picture[inside & ~_eroded(inside, 2)] = colour
    return picture


def enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Repeat the pixels of a small image (H, W, ...) and return how often."""
    factor = max(1, SCALE_TO // max(image.shape[:2]))
    return np.repeat(np.repeat(image, factor, 0), factor, 1), factor


def tinted(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) in grey with a map (h, w) uint8 over it, dark violet for 0 to yellow for 255."""
    from matplotlib import colormaps
    from PIL import Image

    image, _ = enlarged(image)
    size = (image.shape[1], image.shape[0])
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.NEAREST)) / 255
    grey = image.mean(-1, keepdims=True)
    colour = colormaps["inferno"](smooth)[..., :3] * 255
    return (0.45 * grey + 0.55 * colour).round().clip(0, 255).astype(np.uint8)


def _eroded(mask: np.ndarray, width: int) -> np.ndarray:
    for _ in range(width):
        p = np.pad(mask, 1, mode="edge")
        mask = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return mask
