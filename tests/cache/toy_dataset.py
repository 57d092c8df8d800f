"""A teacher that counts what it sees, and decoded squares on disk."""

import numpy as np
import torch
from monai.transforms import Compose, ScaleIntensityRanged
from PIL import Image
from torch import nn

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.transforms import load_mask, load_rgb
from amkd_monai.teachers.base import Teacher, TeacherFeatures

SIZE = 16
GRID = 4


class CountingTeacher(Teacher):
    """A strided convolution; ``seen`` counts images, and an image number at which it stops can be set."""

    def __init__(self, name="toy", seed=0, gives_logits=False, fails_after=None):
        super().__init__(name)
        torch.manual_seed(seed)
        self.network = nn.Conv2d(3, 5, 4, stride=4)
        self.head = nn.Conv2d(5, 2, 1) if gives_logits else None
        self.seen, self.fails_after = 0, fails_after
        self.freeze()

    def preprocessing(self):
        return {"size": None}

    def forward(self, image):
        self.seen += len(image)
        if self.fails_after is not None and self.seen > self.fails_after:
            raise KeyboardInterrupt
        grid = self.network(image)
        logits = None if self.head is None else self.head(grid)
        return TeacherFeatures(grid, grid.mean((2, 3)), logits)


def chain(top=255.0):
    return Compose(
        [
            load_rgb("image"),
            load_mask("label"),
            ScaleIntensityRanged("image", 0.0, top, 0.0, 1.0, clip=True),
        ]
    )


def write_items(folder, count=12, groups=None, labelled=None, informative=True, seed=0):
    """Write images whose red channel shows the mask (unless not informative) and their masks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        cells = rng.random((GRID, GRID)) < 0.5
        mask = cells.repeat(SIZE // GRID, 0).repeat(SIZE // GRID, 1)
        pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        if informative:
            pixels[..., 0] = np.where(mask, 200, 40) + rng.integers(-30, 30, mask.shape)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{i:02d}_mask.png")
        item = {"image": str(folder / f"{i:02d}.png"), "id": f"{i:02d}", "group": groups[i] if groups else f"g{i}"}
        if labelled is None or labelled[i]:
            item["label"] = str(folder / f"{i:02d}_mask.png")
        items.append(item)
    return items


def decoded(items, folder, top=255.0):
    return DecodedDataset(items, chain(top), folder)
