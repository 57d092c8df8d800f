"""Thumbnails with the outlines of their masks on one page, to see at a glance whether labels belong to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amkd_monai.data.datasets import Task
from amkd_monai.data.splits import Item
from amkd_monai.files.masks import IGNORED, MaskCodes, read_mask
from amkd_monai.files.names import label_files
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.volumes import grey_levels, middle_slice, read_label_volume, read_volume

if TYPE_CHECKING:
    from PIL import Image

ORANGE = (230, 159, 0)
"""Of the Okabe-Ito palette; with its black border it is seen on any background and by colour-blind readers."""

CAPTION_HEIGHT = 30


def write_contact_sheet(
    path: str | Path,
    task: Task,
    items: Sequence[Item],
    count: int = 30,
    columns: int = 6,
    side: int = 200,
    mask_codes: MaskCodes | None = None,
) -> Path:
    """Draw evenly spaced items.

    Args:
        path: PNG to write.
        task: tells pictures from volumes (of which the slice with most foreground is shown) and names the classes.
        items: what to choose from.
        count: thumbnails at most.
        columns: thumbnails in a row.
        side: longest side of a thumbnail in pixels.
        mask_codes: what the values of masks mean; None takes the task's rule.

    Returns:
        The path.

    Raises:
        ValueError: there is no item.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not items:
        raise ValueError("There is no image to draw: correct the data first.")
    chosen = [items[round(i)] for i in np.linspace(0, len(items) - 1, min(count, len(items)))]
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + CAPTION_HEIGHT + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, item in enumerate(chosen):
        left, top = number % columns * (side + 8) + 4, number // columns * (side + CAPTION_HEIGHT + 8) + 4
        picture, mask = _load(item, task, task.mask_codes if mask_codes is None else mask_codes)
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        thumbnail = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        if mask is not None and mask.any():
            thumbnail = _outlined(thumbnail, Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        sheet.paste(thumbnail, (left, top))
        draw.text((left, top + side + 1), _shortened(item["id"], side), fill="black", font=font)
        draw.text((left, top + side + 14), _caption(item, mask, task), fill="black", font=font)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _load(item: Item, task: Task, codes: MaskCodes) -> tuple[Image.Image, np.ndarray | None]:
    """The picture, or a slice of the volume, and where its mask (H, W) has foreground."""
    from PIL import Image

    files, classes = label_files(item), len(task.classes)
    if task.dimensions == 2:
        picture = Image.fromarray(read_picture(item["image"]))
        mask = read_mask(files, item["image"], classes, codes) if files else None
        return picture, None if mask is None else (mask > 0) & (mask != IGNORED)
    volume, grid = read_volume(item["image"])
    label = np.zeros(volume.shape, np.uint8)
    if files:
        label, _ = read_label_volume(files[0], grid, classes, codes)
    plane, outline = middle_slice(grey_levels(volume), label * (label != IGNORED), int(np.argmin(volume.shape)))
    return Image.fromarray(plane).convert("RGB"), outline > 0 if files else None


def _outlined(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Draw the border of a mask, orange within black."""
    from PIL import ImageChops, ImageFilter

    grey = mask.convert("L")
    for width, colour in ((5, (0, 0, 0)), (3, ORANGE)):
        border = ImageChops.subtract(grey.filter(ImageFilter.MaxFilter(width)), grey.filter(ImageFilter.MinFilter(3)))
        picture.paste(colour, mask=border)
    return picture


def _caption(item: Item, mask: np.ndarray | None, task: Task) -> str:
    label = item.get("label")
    if isinstance(label, int):
        return task.classes[label] if 0 <= label < len(task.classes) else str(label)
    words = [str(item["class"])] if "class" in item else []
    if mask is not None:
        words.append(f"{mask.mean():.1%}" if mask.any() else "empty mask")
    return ", ".join(words)


def _shortened(text: str, side: int) -> str:
    letters = side // 7
    return text if len(text) <= letters else text[: letters - 1] + "…"
