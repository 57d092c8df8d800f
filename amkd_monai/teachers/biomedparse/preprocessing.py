"""Images as the authors prepare them: 8-bit RGB, squashed by Pillow's bicubic filter, ImageNet statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)  # of the 8-bit values; the last one is 0.225 * 255
MULTIPLE = 32


def to_pixels(image: Tensor, size: int | None) -> Tensor:
    """Return normalised pixels (B, 3, S, S) of an image (B, 3, H, W), RGB in [0, 1].

    Pillow filters along the rows first and rounds to 8 bits after each direction; so does this, on any device. (Release
    13 starts along the columns where that is less work; the authors pin 9.4.) Without a size the image keeps its own
    and is padded with zeros after normalising, right and below, to multiples of 32.
    """
    eight_bit = (image.float() * 255).round().clamp(0, 255)
    if size is not None:
        for target in ((image.shape[-2], size), (size, size)):
            filtered = F.interpolate(eight_bit, size=target, mode="bicubic", antialias=True, align_corners=False)
            eight_bit = (filtered + 0.5).floor().clamp(0, 255)  # ties go up in Pillow, and are common at factors of 2
    mean, std = (torch.tensor(values, device=image.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    height, width = eight_bit.shape[-2:]
    return F.pad((eight_bit - mean) / std, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
