"""Each foundation teacher prepares real, non-square images as its authors do, said again with other tools."""

import numpy as np
import pytest
import torch
from helpers import shared_data
from PIL import Image
from scipy import ndimage
from teachers.tiny_teachers import tiny
from torchvision import transforms

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
POLYPS = ("cju0rx1idathl0835detmsp84.jpg", "cju13fwthn9mq0835gacxgy01.jpg")


@pytest.fixture(scope="module", params=[*POLYPS, "fundus", "upright", "small"])
def photo(request):
    if request.param == "fundus":
        path = sorted(shared_data("APTOS2019_standin_IDRiD", "train_images").iterdir())[0]
    else:
        path = shared_data("Kvasir-SEG", "images", request.param if request.param in POLYPS else POLYPS[0])
    picture = Image.open(path).convert("RGB")
    if request.param == "upright":
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    if request.param == "small":
        picture = picture.crop((100, 80, 250, 190))
    assert picture.width != picture.height
    return picture


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None].float() / 255  # (1, 3, H, W)


def imagenet(pixels):
    """(H, W, 3) in [0, 255] -> (1, 3, H, W)."""
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1)[None]


def assert_same(prepared, expected):
    assert prepared.shape == expected.shape
    np.testing.assert_allclose(prepared.numpy(), expected, atol=2e-6)


def test_medsam_squashes_by_spline_and_scales_by_minimum_and_maximum(photo):
    """Gaussian with sigma (factor - 1) / 2 where it shrinks, cubic spline at pixel centres, clipped, 8 bit, min-max."""
    size = 256
    pixels = np.asarray(photo).astype(np.float64)
    factors = np.array(pixels.shape[:2]) / size
    sigma = [*np.maximum(0, (factors - 1) / 2), 0]
    smooth = ndimage.gaussian_filter(pixels, sigma, mode="mirror")
    zoom = [size / pixels.shape[0], size / pixels.shape[1], 1]
    resized = ndimage.zoom(smooth, zoom, order=3, mode="mirror", grid_mode=True)
    resized = resized.clip(pixels.min(), pixels.max()).astype(np.uint8).astype(np.float64)
    expected = (resized - resized.min()) / (resized.max() - resized.min())
    prepared = tiny("medsam", image_size=size).prepare(tensor(photo)).numpy()
    assert prepared.min() == 0 and prepared.max() == 1
    np.testing.assert_allclose(prepared, expected.transpose(2, 0, 1)[None], atol=1.5 / 255)
    assert np.abs(prepared - expected.transpose(2, 0, 1)[None]).mean() < 1e-4


def test_medsam_scales_each_image_of_a_batch_by_itself_and_takes_a_flat_one():
    teacher = tiny("medsam")
    dark, flat = torch.rand(1, 3, 64, 64) * 0.2, torch.full((1, 3, 64, 64), 0.4)
    both = teacher.prepare(torch.cat([dark, flat]))
    torch.testing.assert_close(both[:1], teacher.prepare(dark))
    assert both[0].max() == 1 and not both[1].any()


@pytest.mark.parametrize(("size", "short"), [(224, 256), (112, 128), (256, 256)])
def test_retfound_resizes_the_shorter_side_and_crops_the_centre(photo, size, short):
    steps = [transforms.Resize(short, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    expected = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(photo)[None]
    teacher = tiny("retfound", image_size=size, framing="crop")
    assert_same(teacher.prepare(tensor(photo)), expected.numpy())


@pytest.mark.parametrize("which", ["usfm", "retfound", "biomedparse"])
def test_squashed_to_a_square(photo, which):
    expected = imagenet(np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float64))
    assert_same(tiny(which, image_size=224).prepare(tensor(photo)), expected)


def test_usfm_segmentation_resizes_bilinearly_without_smoothing(photo):
    """Half-pixel centres, two neighbours per axis, borders repeated, rounded to 8 bit."""
    pixels, size = np.asarray(photo).astype(np.float64), 512

    def weights(length):
        at = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        low = np.floor(at).astype(int)
        matrix = np.zeros((size, length))
        matrix[np.arange(size), low] += 1 - (at - low)
        matrix[np.arange(size), np.minimum(low + 1, length - 1)] += at - low
        return matrix

    exact = np.einsum("yh,hwc,xw->yxc", weights(pixels.shape[0]), pixels, weights(pixels.shape[1]), optimize=True)
    prepared = tiny("usfm_upernet", image_size=size).prepare(tensor(photo)).numpy()
    levels = (prepared[0].transpose(1, 2, 0) * STD + MEAN) * 255
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    np.testing.assert_allclose(levels, exact, atol=0.501)


def test_colours_keep_their_order():
    red = torch.zeros(1, 3, 30, 20)
    red[:, 0] = 1
    for which in ("retfound", "retfound_dinov2", "usfm", "usfm_upernet", "biomedparse"):
        prepared = tiny(which).prepare(red)
        np.testing.assert_allclose(prepared[0].mean((1, 2)), (np.array([1, 0, 0]) - MEAN) / STD, atol=1e-5)
    prepared = tiny("medsam").prepare(red)[0]
    assert prepared[0].min() > 0.99 and not prepared[1:].any()  # the cast to 8 bit truncates
