"""Prediction without torch: its steps give what MONAI's transforms give; a class is written so that it can be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, KeepLargestConnectedComponent, Resize, Spacing, SpatialPad
from PIL import Image

from amkd_monai.data.transforms import CtWindowd
from amkd_monai.export.predict import write_captioned
from amkd_monai.export.translate import preprocessing
from amkd_monai.files.steps import largest_component, prepare
from amkd_monai.files.volumes import Grid


@pytest.mark.parametrize(("old", "new"), [((61, 47), (32, 32)), ((20, 70), (32, 32)), ((20, 21), (64, 32))])
def test_resizing_there_and_back(old, new):
    image = np.random.default_rng(0).random((3, *old), np.float32)
    expected = Resize(new, mode="bilinear", anti_aliasing=True)(torch.from_numpy(image))
    there, inverses = prepare(image, [{"step": "resize", "size": new, "anti_aliasing": True}])
    np.testing.assert_allclose(there, expected.numpy(), atol=2e-6)
    back = Resize(old, mode="bilinear")(expected)
    np.testing.assert_allclose(inverses[0](there), back.numpy(), atol=2e-6)


def turn(first, second, angle):
    affine = np.eye(4)
    affine[[first, second], [first, second]] = np.cos(angle)
    affine[first, second], affine[second, first] = -np.sin(angle), np.sin(angle)
    return affine


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "oblique"])
@pytest.mark.parametrize("spacing", [(1.0, 1.25, 1.3705), (3.0, 0.7, 1.37), (2.5, 2.5, 2.5), (1.25, 0.625, 0.685)])
def test_volumes_are_resampled_cropped_and_padded(spacing, turned):
    volume = np.random.default_rng(0).random((1, 24, 31, 20), np.float32)
    affine = torch.diag(torch.tensor([-spacing[0], spacing[1], spacing[2], 1.0], dtype=torch.float64))
    if turned:  # about two axes, in the 32 bits of a header, whose rounding tilts the axes
        affine = torch.from_numpy(np.float64(np.float32(turn(0, 2, 0.5) @ turn(1, 2, 0.6) @ affine.numpy())))
    transforms = (Spacing((2.5, 1.25, 1.37)), CenterSpatialCrop((11, 24, 16)), SpatialPad((-1, 24, 16)))
    steps = [
        {"step": "spacing", "pixdim": (2.5, 1.25, 1.37)},
        {"step": "crop", "size": (11, 24, 16)},
        {"step": "pad", "size": (-1, 24, 16)},
    ]
    expected = MetaTensor(torch.from_numpy(volume), affine=affine)
    for transform in transforms:
        expected = transform(expected)
    there, inverses = prepare(volume, steps, Grid(volume.shape[1:], affine.numpy()))
    assert there.shape == expected.shape
    np.testing.assert_allclose(there, expected.numpy(), atol=1e-5)
    for transform, inverse in zip(reversed(transforms), reversed(inverses), strict=True):
        expected, there = transform.inverse(expected), inverse(there)
    np.testing.assert_allclose(there, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("size", "old", "new"), [(24, 1.2, 0.8), (24, 1.4, 0.4), (8, 1.2, 0.8)])
def test_a_number_of_voxels_between_two_is_rounded_as_in_monai(size, old, new):
    volume, affine = np.random.default_rng(0).random((1, size, size, 2), np.float32), np.diag([-old, old, 1.0, 1.0])
    affine[:3, 3] = 61.7, -98.123, 10.4
    expected = Spacing((new, new, 1.0))(MetaTensor(torch.from_numpy(volume), affine=torch.from_numpy(affine)))
    there, _ = prepare(volume, [{"step": "spacing", "pixdim": (new, new, 1.0)}], Grid(volume.shape[1:], affine))
    assert there.shape == expected.shape
    np.testing.assert_allclose(there, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("hounsfield", [True, False])
def test_ct_volumes_are_windowed_and_turned(axes, hounsfield):
    low, high = (-1500, 500) if hounsfield else (0, 255)
    volume = np.random.default_rng(0).uniform(low, high, (1, 9, 12, 7)).astype(np.float32)
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[3, 3] = 1
    for column, (axis, size) in enumerate(zip(axes, (1.0, 2.0, 4.0), strict=True)):
        row = next(i for i, pair in enumerate(("RL", "AP", "SI")) if axis in pair)
        affine[row, column] = size if axis in "RAS" else -size
    there, without = zip(
        *(
            preprocessing(target, settings)
            for target, settings in (
                ("amkd_monai.data.transforms.CtWindowd", {"keys": "image"}),
                ("Orientationd", {"keys": "image", "axcodes": "SPL", "labels": None}),
                ("Spacingd", {"keys": "image", "pixdim": (3.0, 1.5, 1.5), "mode": "bilinear"}),
            )
        ),
        strict=True,
    )
    parser = ConfigParser({"chain": {"_target_": "Compose", "transforms": [t for ts in there for t in ts]}})
    expected = parser.get_parsed_content("chain")({"image": MetaTensor(torch.from_numpy(volume), affine=affine)})
    ours = CtWindowd("image")({"image": torch.from_numpy(volume)})["image"]
    assert ours.min() >= 0 and ours.max() <= 1 and ours.std() > 0.2
    grid = Grid(volume.shape[1:], affine.numpy())
    found, inverses = prepare(volume, [s for ss in without for s in ss], grid)
    assert grid.axes == axes, "the caller's grid stays"
    np.testing.assert_allclose(found, expected["image"].numpy(), atol=1e-5)
    turned = prepare(volume, [s for ss in without[:2] for s in ss], grid)
    np.testing.assert_allclose(turned[1][0](turned[0]), ours.numpy(), atol=1e-6)
    assert inverses[1](found).shape == turned[0].shape


def test_only_the_largest_part_stays():
    mask = (np.random.default_rng(0).random((12, 14, 10)) > 0.9).astype(np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    expected = KeepLargestConnectedComponent(applied_labels=[1])(torch.from_numpy(mask)[None])[0]
    np.testing.assert_array_equal(largest_component(mask, 1), expected.numpy())


def test_an_unknown_step_is_refused():
    with pytest.raises(ValueError, match="no step 'fold'"):
        prepare(np.zeros((3, 4, 4)), [{"step": "fold"}])


@pytest.mark.parametrize(("height", "width"), [(90, 60), (400, 1000)])
def test_the_picture_is_whole_and_the_caption_fits_below_it(tmp_path, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    bands = {}
    for caption in ("no DR  0.93", "severe  0.93", "a class whose name is longer than most of the others  0.93"):
        write_captioned(tmp_path / "x.png", image, caption)
        written = np.asarray(Image.open(tmp_path / "x.png"), int)
        factor = written.shape[1] // width
        picture, band = np.split(written, [height * factor])
        np.testing.assert_array_equal(picture[::factor, ::factor], image)
        letters = band.max(-1) > 128
        columns, rows = np.flatnonzero(letters.any(0)), np.flatnonzero(letters.any(1))
        assert columns[0] > 0 and columns[-1] < written.shape[1] - 1, "nothing is cut"
        assert rows[0] > 0 and rows[-1] < len(band) - 1
        assert len(caption) > 20 or rows[-1] - rows[0] >= 12, "pixels, the height of a letter"
        bands[caption] = band
    first, second, _ = bands.values()
    assert (first != second).any()
