"""Small photographs, masks and volumes on disk, with the chains that decode them."""

import nibabel
import numpy as np
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resized, ScaleIntensityRanged
from PIL import Image

from amkd_monai.data.transforms import load_mask, load_rgb, load_volume

KEYS = ["image", "label"]


def photo_chain(size=(24, 40), image_mode="bilinear"):
    return Compose(
        [
            load_rgb("image"),
            load_mask("label"),
            ScaleIntensityRanged("image", 0.0, 255.0, 0.0, 1.0, clip=True),
            Resized("image", size, mode=image_mode),
            Resized("label", size, mode="nearest", allow_missing_keys=True),
        ]
    )


def volume_chain(own=False):
    """Volumes by the package's reader, which checks labels itself, or by MONAI's, which checks nothing."""
    monai = [
        LoadImaged(KEYS, reader="NibabelReader", allow_missing_keys=True),
        EnsureChannelFirstd(KEYS, channel_dim="no_channel", allow_missing_keys=True),
    ]
    load = [load_volume(KEYS)] if own else monai
    return Compose([*load, ScaleIntensityRanged("image", 0.0, 100.0, 0.0, 1.0, clip=True)])


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
    """Write a volume (D, H, W) whose slice d is d times 10 in its first voxel and up to 2.4 more elsewhere.

    Other values may be given. Slice 1 has foreground.
    """
    if values is None:
        texture = np.arange(shape[1] * shape[2]).reshape(shape[1:]) % 7 * 0.4
        values = np.arange(shape[0])[:, None, None] * 10.0 + seed + texture
    nibabel.save(nibabel.Nifti1Image(np.array(values, np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    item = {"image": str(folder / f"{name}.nii.gz"), "id": name, "group": name}
    if label:
        mask = np.zeros(shape, np.uint8)
        mask[1, 2:5, 3:9] = 1
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"{name}_label.nii.gz")
        item["label"] = str(folder / f"{name}_label.nii.gz")
    return item
