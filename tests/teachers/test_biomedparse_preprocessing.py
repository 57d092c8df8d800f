"""Images as the authors prepare them, said again in Pillow and NumPy."""

import numpy as np
import pytest
import torch
from helpers import shared_data
from PIL import Image

from amkd_monai.teachers.biomedparse import to_pixels

MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255


def as_the_authors(picture, size):
    """Pillow's bicubic filter on 8-bit RGB, aspect ratio not kept, then ImageNet's statistics of 8-bit values."""
    squashed = picture.resize((size, size), Image.BICUBIC)
    return ((np.asarray(squashed, dtype=np.float64) - MEAN) / STD).transpose(2, 0, 1)


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255  # (H, W, 3) -> (1, 3, H, W)


@pytest.fixture(scope="module")
def picture():
    files = sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))
    pictures = (Image.open(file).convert("RGB") for file in files)
    return next(p for p in pictures if p.width > 1.1 * p.height)


def test_real_images_that_are_not_square(picture):
    turned = picture.transpose(Image.ROTATE_90)
    for source in (picture, turned):
        assert source.width != source.height
        for size in (1024, 256):
            pixels = to_pixels(tensor(source), size)
            assert pixels.shape == (1, 3, size, size)
            np.testing.assert_allclose(pixels[0].numpy(), as_the_authors(source, size), atol=1e-5)


def test_other_ways_to_resize_are_not_the_same(picture):
    ours = to_pixels(tensor(picture), 1024)[0].numpy()
    for way in (Image.BILINEAR, Image.LANCZOS, Image.NEAREST):
        other = np.asarray(picture.resize((1024, 1024), way), dtype=np.float64)
        assert np.abs(ours - ((other - MEAN) / STD).transpose(2, 0, 1)).mean() > 1e-3


def test_without_a_size_only_zeros_are_added(picture):
    source = picture.crop((0, 0, 75, 40))
    pixels = to_pixels(tensor(source), None)
    assert pixels.shape == (1, 3, 64, 96)
    inside = ((np.asarray(source, dtype=np.float64) - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[0, :, :40, :75].numpy(), inside, atol=1e-5)
    assert not pixels[..., 40:, :].any() and not pixels[..., 75:].any()


def test_a_batch_is_prepared_as_its_images_are():
    images = torch.rand((3, 3, 30, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_pixels(images, 64), torch.cat([to_pixels(one[None], 64) for one in images]))
