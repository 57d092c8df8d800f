"""Small photographs, masks and volumes on disk, with the chains that decode them."""

import nibabel
import numpy as np
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resized, ScaleIntensityRanged
from PIL import Image

from amkd_monai.data.transforms import load_mask, load_rgb

KEYS = ["image", "label"]


def photo_chain(size=(24, 40), image_mode="bilinear"):
    return Compose(
        [
            load_rgb("image"),
            load_mask("label"),
            ScaleIntensityRanged(KEYS, 0.0, 255.0, 0.0, 1.0, clip=True, allow_missing_keys=True),
            Resized("image", size, mode=image_mode),
            Resized("label", size, mode="nearest", allow_missing_keys=True),
        ]
    )


def volume_chain():
    return Compose(
        [
            LoadImaged(KEYS, reader="NibabelReader", allow_missing_keys=True),
            EnsureChannelFirstd(KEYS, channel_dim="no_channel", allow_missing_keys=True),
            ScaleIntensityRanged("image", 0.0, 100.0, 0.0, 1.0, clip=True),
        ]
    )


def write_photo(folder, name, size=(24, 40), seed=0, label=True):
    """Write an image of height x width and the mask of its upper left part; returns a datalist item."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    item = {"image": str(folder / f"{name}.png"), "id": name, "group": f"patient of {name}"}
    if label:
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 2, : size[1] // 4] = 255
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
        item["label"] = str(folder / f"{name}_mask.png")
    return item


def write_volume(folder, name, shape=(4, 10, 14), seed=0, label=True, values=None):
    """Write a volume (D, H, W) whose slice d is d times 10 everywhere, unless given; slice 1 has foreground."""
    pixels = np.broadcast_to(np.arange(shape[0])[:, None, None] * 10.0 + seed, shape) if values is None else values
    nibabel.save(nibabel.Nifti1Image(np.array(pixels, np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    item = {"image": str(folder / f"{name}.nii.gz"), "id": name, "group": name}
    if label:
        mask = np.zeros(shape, np.uint8)
        mask[1, 2:5, 3:9] = 1
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"{name}_label.nii.gz")
        item["label"] = str(folder / f"{name}_label.nii.gz")
    return item
