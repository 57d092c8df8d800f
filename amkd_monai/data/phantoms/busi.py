"""Breast-ultrasound-like images: speckle, layers of tissue, dark lesions among shadows and cysts of fat."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amkd_monai.data.phantoms.tools import blur, smooth_noise, writer

LESIONS = {"benign": (1, 2), "malignant": (1, 1), "normal": (0, 0)}
"""Fewest and most lesions per class."""


@writer("busi")
def write_busi(folder: Path, count: int = 18, size: tuple[int, int] = (130, 210), seed: int = 0) -> None:
    """Write images as `Dataset_BUSI_with_GT/<class>/<class> (N).png` with their masks beside.

    As in the real data: masks of benign and malignant images are 1-bit, of normal ones RGB and empty; an image with two
    lesions has two mask files; one image comes twice, with calipers burnt in.

    Args:
        folder: an empty folder.
        count: benign images; there are as many malignant ones and a third as many normal ones.
        size: smallest and largest side in pixels; no image is square.
        seed: seed of all draws.
    """
    from PIL import Image

    for kind, name in enumerate(LESIONS):
        (folder / name).mkdir()
        for index in range(count if name != "normal" else max(1, count // 3)):
            rng = np.random.default_rng([seed, kind, index])
            lesions = 2 if (name, index) == ("benign", 0) else LESIONS[name][0]
            grey, masks = ultrasound_image(rng, size, lesions, malignant=name == "malignant")
            _save(grey, masks, folder / name, f"{name} ({index + 1})")
            if (name, index) == ("malignant", 0):
                number = count + 1
                _save(_with_calipers(grey, masks[0]), masks, folder / name, f"{name} ({number})")
            if name == "normal":
                empty = Image.new("RGB", (grey.shape[1], grey.shape[0]))
                empty.save(folder / name / f"{name} ({index + 1})_mask.png")


def _save(grey: np.ndarray, masks: list[np.ndarray], folder: Path, stem: str) -> None:
    from PIL import Image

    Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(folder / f"{stem}.png")
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(folder / f"{stem}_mask{f'_{number}' if number else ''}.png")


def _with_calipers(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Burn two crosses into a copy, at the ends of the lesion's width."""
    grey = grey.copy()
    rows, columns = mask.nonzero()
    for column in (columns.min(), columns.max()):
        row = int(rows[columns == column].mean())
        grey[row, max(0, column - 3) : column + 4] = 255
        grey[max(0, row - 3) : row + 4, column] = 255
    return grey


def ultrasound_image(
    rng: np.random.Generator, size: tuple[int, int], lesions: int, malignant: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Paint one image.

    Args:
        rng: source of all draws.
        size: smallest and largest side in pixels.
        lesions: how many, side by side.
        malignant: with ragged outlines and a shadow below, otherwise smooth and with brighter tissue below.

    Returns:
        Grey image (H, W) uint8 and one boolean mask (H, W) per lesion; W is larger than H.
    """
    middle = sum(size) // 2
    height, width = int(rng.integers(size[0], middle)), int(rng.integers(middle, size[1] + 1))
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : width / height : width * 1j]  # one unit is the height
    shape = (height, width)

    depth = y + 0.03 * smooth_noise(rng, shape, (3, 6))
    skin, fat, muscle = rng.uniform(0.05, 0.09), rng.uniform(0.22, 0.32), rng.uniform(0.74, 0.86)
    level = np.select([depth < skin, depth < fat, depth < muscle], [0.85, 0.36, 0.55], 0.44)
    level = blur(level, 1.5) + 0.05 * smooth_noise(rng, shape, (12, 8))
    for _ in range(rng.integers(2, 5)):  # lobules of fat: as dark as a lesion, but flat and without an edge
        center = rng.uniform(0.1, 0.9) * width / height, rng.uniform(0.12, 0.3)
        lobule = np.hypot((x - center[0]) / rng.uniform(0.12, 0.25), (y - center[1]) / rng.uniform(0.03, 0.05))
        level -= 0.22 * np.exp(-(lobule**4))
    for _ in range(rng.integers(1, 3)):  # shadows of ribs and gas, from the depth of the muscle down
        column = rng.uniform(0, width / height)
        level -= 0.25 * np.exp(-(((x - column) / 0.05) ** 2)) * (depth > muscle)

    masks = []
    for number in range(lesions):
        share = width / height / lesions
        center_x, center_y = share * (number + rng.uniform(0.38, 0.62)), rng.uniform(0.42, 0.60)
        radius = rng.uniform(0.10, 0.19) / (1.25 if lesions > 1 else 1)
        angle = np.arctan2(y - center_y, x - center_x)
        ragged = 0.5 if malignant else 0.12
        outline = 1 + sum(
            rng.uniform(0, ragged / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5, 7)
        )
        flat = rng.uniform(0.9, 1.15) if malignant else rng.uniform(1.2, 1.7)
        distance = np.hypot(x - center_x, (y - center_y) * flat) / (radius * outline)
        inside = distance < 1
        below = np.clip((y - center_y) / 0.25, 0, 1) * np.exp(-(((x - center_x) / radius) ** 4)) * ~inside
        soft = blur(inside.astype(float), 1.5 if malignant else 0.9)
        level = level * (1 - soft) + (0.20 + 0.03 * smooth_noise(rng, shape, (9, 9))) * soft
        level += (-0.20 if malignant else 0.15) * below
        if not malignant:
            level += 0.12 * np.exp(-(((distance - 1.05) / 0.05) ** 2))  # the capsule
        masks.append(inside)

    echo = np.abs(
        smooth_noise(rng, shape, (height // 2, width // 3)) + 1j * smooth_noise(rng, shape, (height // 2, width // 3))
    )
    grey = np.clip(level, 0.03, 1) * (0.35 + 0.55 * echo)
    grey = np.log1p(9 * np.clip(grey, 0, 2)) / np.log(19)  # what a scanner shows is compressed
    gain = 1 - 0.25 * (y - rng.uniform(0.3, 0.7)) ** 2
    return (np.clip(grey * gain, 0, 1) * 255).astype(np.uint8), masks
