"""Preprocessing in 8-bit pixels, as the authors of the foundation teachers did it, and ImageNet's statistics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def each_image(image: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply a function of 8-bit pixels to every image of a batch.

    Args:
        image: (B, 3, H, W), RGB in [0, 1]; rounded to 256 steps.
        function: (H, W, 3) uint8 -> (h, w, 3).

    Returns:
        (B, 3, h, w) float32, in the function's units.
    """
    pixels = (image.detach().clamp(0, 1) * 255).round().byte()
    results = [function(one.permute(1, 2, 0).cpu().numpy()) for one in pixels]  # (3, H, W) -> (H, W, 3)
    stacked = torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)  # (B, h, w, 3) -> (B, 3, h, w)
    return stacked.to(image.device, torch.float32).contiguous()


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) with Pillow's bicubic filter; the aspect ratio is not kept."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def centre_crop(pixels: np.ndarray, size: int, fraction: float) -> np.ndarray:
    """Resize the shorter side to ``size / fraction`` (Pillow, bicubic), then cut the central (size, size, 3)."""
    height, width = pixels.shape[:2]
    short = int(size / fraction)
    new_width = short if width <= height else int(short * width / height)
    new_height = short if height <= width else int(short * height / width)
    pixels = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return pixels[top : top + size, left : left + size]


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """Scale (B, 3, h, w) from [0, 255] to [0, 1], subtract ImageNet's mean, divide by its standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(1, 3, 1, 1)
    return (pixels / 255 - mean) / std
