"""Images as the authors prepare them: 8-bit RGB, squashed by Pillow's bicubic filter, ImageNet statistics."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from amkd_monai.teachers.images import each_image, imagenet_normalised, squash

MULTIPLE = 32


def to_pixels(image: Tensor, size: int | None) -> Tensor:
    """Return normalised pixels (B, 3, S, S) of images (B, 3, H, W), RGB in [0, 1].

    Without a size the images keep their own and are padded with zeros after normalising, right and below, to
    multiples of 32.
    """
    pixels = imagenet_normalised(each_image(image, lambda one: one if size is None else squash(one, size)))
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
