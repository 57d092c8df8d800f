"""CPU time per image of the data path, against the usual MONAI way. Paired, alternated, one thread.

Training: an image and its mask from the decoded memory map, augmented per batch, against CacheDataset with MONAI's
random dictionary transforms. Decoding: a 3216 x 2136 photograph to 512 x 512 in one step, against LoadImaged + Resized.

python benchmarks/data_path.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import (
    Compose,
    LoadImaged,
    RandAdjustContrastd,
    RandFlipd,
    RandRotated,
    RandScaleIntensityd,
    RandZoomd,
    Resized,
    ScaleIntensityRanged,
)
from paired import Row, paired, print_table
from PIL import Image

from amkd_monai.data.datasets import get_task
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.sampling import Augmentation, warp
from amkd_monai.data.transforms import load_mask, load_rgb

LIMIT = 1 / 3
SIDE, BATCH, COUNT = 256, 8, 32
LARGE = (2136, 3216)
KEYS = ["image", "label"]


def chain(size: tuple[int, int]) -> Compose:
    """The deterministic part, as in the 2D bundles."""
    return Compose(
        [
            load_rgb("image"),
            load_mask("label"),
            ScaleIntensityRanged("image", 0.0, 255.0, 0.0, 1.0, clip=True),
            Resized("image", size, mode="bilinear", anti_aliasing=True),
            Resized("label", size, mode="nearest"),
        ]
    )


def training(folder: Path, rounds: int) -> Row:
    """Batches of augmented images and masks."""
    polyps = get_task("kvasir_seg")
    items = polyps.layout.find_items(polyps.write_phantom(folder, count=COUNT, size=(240, 360)))
    decoded = DecodedDataset(items, chain((SIDE, SIDE)), folder / "cache")
    loader = DataLoader(decoded, batch_size=BATCH, shuffle=True)
    warped = {"rotation": 0.5, "scale": 0.25, "shift": 0.05, "flip_height": True, "flip_width": True}
    augmentation = Augmentation(**warped, gain=0.2, offset=0.1, gamma=0.4)
    generator = torch.Generator().manual_seed(0)

    def ours() -> int:
        count = 0
        for batch in loader:
            image = batch["image"].float() / 255
            theta = augmentation.sample(len(image), (SIDE, SIDE), generator)
            image = augmentation.photometric(warp(image, theta), generator)
            label = warp(batch["label"].float(), theta, mode="nearest")
            count += len(image) * (label.shape[-1] == SIDE)
        return count

    random = Compose(
        [
            chain((SIDE, SIDE)),
            RandFlipd(KEYS, 0.5, 0),
            RandFlipd(KEYS, 0.5, 1),
            RandRotated(KEYS, 0.5, prob=1.0, mode=["bilinear", "nearest"], padding_mode="reflection"),
            RandZoomd(KEYS, 1.0, 0.8, 1.25, mode=["bilinear", "nearest"], padding_mode="reflect"),
            RandScaleIntensityd("image", 0.2, prob=1.0),
            RandAdjustContrastd("image", prob=1.0, gamma=(0.7, 1.4)),
        ]
    )
    cached = DataLoader(CacheDataset(items, random, progress=False), batch_size=BATCH, shuffle=True)
    times = paired(ours, lambda: sum(len(b["image"]) for b in cached), rounds)
    return Row(f"augmented batch, {SIDE} x {SIDE}, against MONAI", "ms/image", *times, limit=LIMIT)


def decoding(folder: Path, suffix: str, anti_aliasing: bool, limit: float | None, rounds: int) -> Row:
    """One large photograph to 512 x 512; ours is always anti-aliased."""
    path = folder / f"large.{suffix}"
    if not path.is_file():
        photograph(np.random.default_rng(0)).save(path, **({"quality": 90} if suffix == "jpg" else {}))
    direct = load_rgb("image", size=(512, 512))
    resize = Resized("image", (512, 512), anti_aliasing=anti_aliasing)
    usual = Compose([LoadImaged("image", ensure_channel_first=True), resize])
    times = paired(
        lambda: sum(direct({"image": str(path)})["image"].shape[0] == 3 for _ in range(3)),
        lambda: sum(usual({"image": str(path)})["image"].shape[0] == 3 for _ in range(3)),
        rounds,
    )
    aliased = "anti-aliased" if anti_aliasing else "aliased"
    return Row(f"decoding a large {suffix}, against MONAI {aliased}", "ms/image", *times, limit=limit)


def photograph(rng: np.random.Generator) -> Image.Image:
    """A fundus-like photograph: a bright disc with texture and sensor noise on black."""
    height, width = LARGE
    y, x = np.mgrid[-1 : 1 : height * 1j, -width / height : width / height : width * 1j]
    coarse = np.asarray(Image.fromarray(rng.normal(0, 30, (40, 60)).astype(np.float32)).resize((width, height), 2))
    disc = (np.hypot(x, y) < 0.98)[..., None]
    colour = np.array([180.0, 90.0, 50.0]) * (1 - 0.3 * (x**2 + y**2))[..., None] + coarse[..., None]
    return Image.fromarray(((colour + rng.normal(0, 2, (*LARGE, 1))) * disc).clip(0, 255).astype(np.uint8))


def measure(rounds: int) -> list[Row]:
    """All comparisons."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [training(Path(folder), rounds)]
        rows += [decoding(Path(folder), suffix, True, LIMIT, rounds) for suffix in ("jpg", "png")]
        rows += [decoding(Path(folder), "jpg", False, LIMIT, rounds)]
        # no limit: inflating a PNG takes most of either, aliased or not
        return [*rows, decoding(Path(folder), "png", False, None, rounds)]


def main() -> int:
    """Run all comparisons; exit code 1 if one is above the limit."""
    arguments = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    return print_table(measure(rounds))


if __name__ == "__main__":
    raise SystemExit(main())
