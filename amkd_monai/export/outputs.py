"""Overlays to look at. No torch, no MONAI."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amkd_monai.files.pictures import write_png

COLOUR = np.array((255.0, 64.0, 0.0), np.float32)
OPACITY = 0.35
CAPTION_SCALE = 16
"""A captioned picture's width in heights of its letters."""
CAPTIONED_WIDTH = 320
"""Pixels; narrower pictures are enlarged, so that a caption can be read."""


def write_overlay(path: Path, image: np.ndarray, mask: np.ndarray) -> None:
    """Write an image (H, W, 3), levels 0 to 255, with its mask (H, W) tinted and outlined."""
    inside = mask > 0
    core = np.pad(inside, 1, mode="edge")
    core = core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    opacity = np.where(inside & ~core, 1.0, np.where(inside, OPACITY, 0.0)).astype(np.float32)[..., None]
    picture = image * (1 - opacity) + COLOUR * opacity
    write_png(path, picture.round().clip(0, 255).astype(np.uint8))


def write_captioned(path: Path, image: np.ndarray, caption: str) -> None:
    """Write an image (H, W, 3), uint8, above a band with one line of text that fits its width."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(image)
    factor = -(-CAPTIONED_WIDTH // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    height = picture.width / CAPTION_SCALE
    length = ImageFont.load_default(height).getlength(caption)
    font = ImageFont.load_default(height * min(1.0, (picture.width - height) / length))
    result = Image.new("RGB", (picture.width, picture.height + round(1.8 * height)))
    result.paste(picture)
    place = (height / 2, picture.height + 0.9 * height)
    ImageDraw.Draw(result).text(place, caption, (255, 255, 255), font, anchor="lm")
    write_png(path, result)
