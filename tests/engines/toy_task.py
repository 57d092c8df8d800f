"""A seventh data set: bright discs on noise, in folders of pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from amkd_monai.data.datasets import Task

TASK = Task(
    name="discs",
    classes=("background", "disc"),
    modality="toy",
    folder="Discs",
    prompts=("disc",),
)


def write(root: Path, count: int = 12) -> Path:
    """Write images and masks, and return the folder."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    y, x = np.mgrid[:60, :80]
    for i in range(count):
        disc = (y - rng.integers(20, 40)) ** 2 + (x - rng.integers(25, 55)) ** 2 < 225
        image = rng.integers(0, 120, (60, 80, 3)) + 120 * disc[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(root / "masks" / f"{i:02d}.png")
    return root
