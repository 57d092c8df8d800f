"""Write masks on the grid of their image, and overlays to look at. No torch, no MONAI."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amkd_monai.atomic import atomic_path

COLOUR = np.array((255.0, 64.0, 0.0), np.float32)
OPACITY = 0.35
CAPTION_SCALE = 16
"""A captioned picture's width in heights of its letters."""
CAPTIONED_WIDTH = 320
"""Pixels; narrower pictures are enlarged, so that a caption can be read."""


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask (H, W) of 0 and 1 as PNG of 0 and 255."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray((mask > 0).astype(np.uint8) * 255).save(temporary, format="PNG")


def write_volume(path: Path, mask: np.ndarray, affine: np.ndarray, like: Path | None) -> None:
    """Write a mask (D, H, W) as NIfTI, uint8, with the affine and the codes of the volume ``like``."""
    import nibabel

    image = nibabel.Nifti1Image(mask.astype(np.uint8), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    if like is not None:
        header = nibabel.load(like).header
        image.set_sform(affine, int(header["sform_code"]) or 1)
        image.set_qform(affine, int(header["qform_code"]))
        image.header.set_xyzt_units(*header.get_xyzt_units())
    with atomic_path(path) as temporary:
        packed = temporary.with_name(temporary.name + ".nii.gz")
        try:
            nibabel.save(image, packed)
            packed.replace(temporary)
        finally:
            packed.unlink(missing_ok=True)


def telling_slice(volume: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slice of the last axis with most foreground, the middle one without any: (3, W, H) grey, and its mask."""
    counts = (mask > 0).sum((0, 1))
    index = int(counts.argmax()) if counts.any() else mask.shape[2] // 2
    low, high = np.percentile(volume, [0.5, 99.5])
    grey = ((volume[..., index] - low) / max(float(high - low), 1e-6)).clip(0, 1) * 255
    return np.repeat(np.rot90(grey)[None], 3, 0), np.rot90(mask[..., index])


def write_overlay(path: Path, image: np.ndarray, mask: np.ndarray) -> None:
    """Write an image (3, H, W), levels 0 to 255, with its mask (H, W) tinted and outlined."""
    from PIL import Image

    inside = mask > 0
    core = np.pad(inside, 1, mode="edge")
    core = core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    opacity = np.where(inside & ~core, 1.0, np.where(inside, OPACITY, 0.0)).astype(np.float32)[..., None]
    picture = np.moveaxis(image, 0, -1) * (1 - opacity) + COLOUR * opacity
    with atomic_path(path) as temporary:
        Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(temporary, format="PNG")


def write_captioned(path: Path, image: np.ndarray, caption: str) -> None:
    """Write an image (3, H, W), levels 0 to 255, above a band with one line of text that fits its width."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(np.moveaxis(image, 0, -1).round().clip(0, 255).astype(np.uint8))
    factor = -(-CAPTIONED_WIDTH // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    height = picture.width / CAPTION_SCALE
    length = ImageFont.load_default(height).getlength(caption)
    font = ImageFont.load_default(height * min(1.0, (picture.width - height) / length))
    result = Image.new("RGB", (picture.width, picture.height + round(1.8 * height)))
    result.paste(picture)
    place = (height / 2, picture.height + 0.9 * height)
    ImageDraw.Draw(result).text(place, caption, (255, 255, 255), font, anchor="lm")
    with atomic_path(path) as temporary:
        result.save(temporary, format="PNG")
