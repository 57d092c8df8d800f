"""Pictures as data URIs: cases with outlines, teacher outputs, gate weights."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

REFERENCE, PREDICTION = (0, 158, 115), (213, 94, 0)
"""Green and vermilion of the Okabe-Ito palette."""
SCALE_TO = 320
"""Longest side at which a picture is shown."""


def data_uri(picture: np.ndarray, quality: int = 78) -> str:
    """An RGB picture (H, W, 3) uint8 as a JPEG data URI."""
    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(memory, format="JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def outlined(image: np.ndarray, reference: np.ndarray | None, prediction: np.ndarray | None) -> np.ndarray:
    """Draw the borders of masks (H, W) on an image (H, W, 3): the reference green, the prediction vermilion."""
    picture, factor = enlarged(image)
    for mask, colour in ((reference, REFERENCE), (prediction, PREDICTION)):
        if mask is not None and mask.any():
            inside = np.kron(mask > 0, np.ones((factor, factor), bool))
            picture[inside & ~binary_erosion(inside, iterations=2, border_value=1)] = colour
    return picture


def enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """Repeat the pixels of a small image (H, W, ...) and return how often."""
    factor = max(1, SCALE_TO // max(image.shape[:2]))
    return np.repeat(np.repeat(image, factor, 0), factor, 1), factor


def tinted(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) in grey with a map (h, w) uint8 over it, dark violet for 0 to yellow for 255."""
    from matplotlib import colormaps

    image, _ = enlarged(image)
    large = Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    colour = colormaps["inferno"](np.asarray(large) / 255)
    mixed = 0.45 * image.mean(-1, keepdims=True) + 0.55 * 255 * colour[..., :3]
    return mixed.round().clip(0, 255).astype(np.uint8)
