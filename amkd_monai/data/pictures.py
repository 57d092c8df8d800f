"""Photographs of any mode as RGB of 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode (grey of 8 or 16 bits, palette, RGBA) to RGB of 8 bits."""
    if image.mode.startswith("I"):  # PIL's own conversion of 16-bit grey cuts every level above 255 to white
        from PIL import Image as pillow

        levels = np.asarray(image).clip(0, 65535)
        image = pillow.fromarray((levels // 257 if levels.max() > 255 else levels).astype(np.uint8))
    return image.convert("RGB")
