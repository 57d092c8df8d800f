"""Dermoscopic images of nevi, melanomas and keratoses, painted: a demonstration, never a result."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from amkd_monai.data.isic2017 import OFFICIAL
from amkd_monai.data.phantoms.tools import grain, writer

NEVUS, MELANOMA, KERATOSIS = 0, 1, 2


@writer("isic2017")
def write_isic2017(folder: Path, counts: tuple[int, int, int] = (54, 15, 24), height: int = 120, seed: int = 0) -> None:
    """Write images in the official layout: three sections with part 1 masks, part 3 tables and what lies beside.

    Args:
        folder: an empty folder.
        counts: number of images in training, validation and test, the classes in turn.
        height: about the height in pixels; images are wider than high.
        seed: seed of all draws.
    """
    from PIL import Image

    number = 0
    for section, count in zip(OFFICIAL.values(), counts, strict=True):
        images, masks = folder / f"ISIC-2017_{section}_Data", folder / f"ISIC-2017_{section}_Part1_GroundTruth"
        images.mkdir()
        masks.mkdir()
        labels, patients = [], []
        for index in range(count):
            number += 1
            name, kind = f"ISIC_{number:07d}", index % 3
            rng = np.random.default_rng([seed, number])
            image, mask = _lesion(rng, kind, height)
            Image.fromarray(image).save(images / f"{name}.jpg", quality=92)
            Image.fromarray(mask).save(masks / f"{name}_segmentation.png")
            labels.append([name, float(kind == MELANOMA), float(kind == KERATOSIS)])
            patients.append([name, int(rng.integers(4, 17)) * 5, rng.choice(["male", "female", "unknown"])])
        Image.fromarray(image // 32 * 32).save(images / f"{name}_superpixels.png")
        for path, header, rows in (
            (
                folder / f"ISIC-2017_{section}_Part3_GroundTruth.csv",
                ["image_id", "melanoma", "seborrheic_keratosis"],
                labels,
            ),
            (images / f"ISIC-2017_{section}_Data_metadata.csv", ["image_id", "age_approximate", "sex"], patients),
        ):
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *rows])


def _lesion(rng: np.random.Generator, kind: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint one lesion: image (H, W, 3) and mask (H, W) with 0 and 255, both uint8."""
    h = int(height * rng.uniform(0.9, 1.1))
    w = int(h * rng.uniform(1.2, 1.45))
    y, x = np.mgrid[:h, :w].astype(float)
    y, x = (y / h - 0.5 + rng.normal(0, 0.04)), (x - w / 2) / h + rng.normal(0, 0.06)
    skin = np.array([0.86, 0.66, 0.58]) * rng.uniform(0.85, 1.1) + rng.normal(0, 0.02, 3)
    image = skin * (1 + 0.04 * grain(rng, (h, w), h / 10) + 0.015 * grain(rng, (h, w), 1.0))[..., None]

    # outlines: nevi are round, melanomas ragged and lopsided, keratoses round with a sharp border
    angle = np.arctan2(y, x)
    ragged = {NEVUS: 0.05, MELANOMA: 0.20, KERATOSIS: 0.06}[kind]
    outline = 1 + sum(rng.normal(0, ragged / np.sqrt(n)) * np.cos(n * angle + rng.uniform(0, 6.3)) for n in range(2, 8))
    distance = np.hypot(x, y * rng.uniform(0.9, 1.3)) / (rng.uniform(0.2, 0.33) * outline)
    inside = distance < 1
    softness = {NEVUS: 3.0, MELANOMA: 2.0, KERATOSIS: 0.6}[kind] * h / 120
    cover = gaussian_filter(inside.astype(float), softness)[..., None]

    brown = np.array([0.48, 0.29, 0.20]) * rng.uniform(0.85, 1.2)
    colour = np.broadcast_to(brown, image.shape) * (1 + 0.05 * grain(rng, (h, w), 2.0))[..., None]
    if kind == MELANOMA:  # several colours in patches, dark and blue-grey among them
        for patch in ([0.12, 0.08, 0.08], [0.36, 0.36, 0.46], [0.62, 0.34, 0.28]):
            where = 1 / (1 + np.exp(-6 * (grain(rng, (h, w), h / 14) - rng.uniform(0.2, 0.7))))[..., None]
            colour = colour * (1 - where) + where * np.array(patch)
    elif kind == KERATOSIS:  # waxy greyish brown with pale cysts and dark plugs
        colour = np.array([0.55, 0.42, 0.33]) * (1 + 0.14 * grain(rng, (h, w), 1.6))[..., None]
        for shade, number in ((np.array([0.92, 0.86, 0.74]), 14), (np.array([0.20, 0.14, 0.10]), 12)):
            dots = np.zeros((h, w))
            rows, columns = np.nonzero(inside)
            chosen = rng.integers(len(rows), size=number)
            dots[rows[chosen], columns[chosen]] = 1
            dots = np.clip(gaussian_filter(dots, 1.3) * 12, 0, 1)[..., None]
            colour = colour * (1 - dots) + dots * shade
    else:  # an even network
        colour = colour * (1 - 0.12 * np.abs(np.sin(55 * x) * np.sin(55 * y)))[..., None]
    image = image * (1 - cover) + colour * cover
    for _ in range(rng.integers(0, 5)):  # hairs
        slope, place = rng.normal(0, 1), rng.uniform(-0.5, 0.5)
        image[np.abs(y - slope * x - place) < 0.006 * np.hypot(1, slope)] *= 0.35
    image += rng.normal(0, 0.012, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), (inside * 255).astype(np.uint8)
