"""Masks of every mode and scale: none becomes empty, none grows by compression."""

import numpy as np
import pytest
from PIL import Image

from amkd_monai.files.masks import read_mask
from amkd_monai.data.transforms import load_mask

SIZE = (7, 12)


def inside():
    mask = np.zeros(SIZE, bool)
    mask[2:5, 3:9] = True
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_class_indices_are_not_empty(tmp_path, value, dtype):
    path = tmp_path / ("mask.tif" if dtype in (np.int32, np.float32) else "mask.png")
    Image.fromarray(inside().astype(dtype) * dtype(value)).save(path)
    loaded = load_mask()({"label": str(path)})["label"]
    np.testing.assert_array_equal(np.asarray(loaded), inside()[None] * 255.0)


@pytest.mark.parametrize("codes", [(1, 2, 3), (38, 75), (85, 170, 255), (128, 255), (100,)])
def test_several_classes_are_merged(codes):
    levels = np.zeros(SIZE, np.uint8)
    for row, code in enumerate(codes, start=1):
        levels[row, 3:9] = code
    np.testing.assert_array_equal(foreground(Image.fromarray(levels)), levels > 0)


def test_coloured_classes_are_merged_whatever_their_luminance():
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[1, 3:9], picture[3, 2:5] = (0, 0, 255), (128, 0, 0)
    expected = picture.any(axis=2)
    np.testing.assert_array_equal(foreground(Image.fromarray(picture)), expected)
    palette = Image.fromarray(expected.astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    np.testing.assert_array_equal(foreground(palette), expected)


def test_what_is_transparent_is_background():
    picture = np.full((*SIZE, 4), 255, np.uint8)
    picture[..., 3] = inside() * 255
    np.testing.assert_array_equal(foreground(Image.fromarray(picture)), inside())


def test_an_empty_and_a_full_mask():
    assert not foreground(Image.new("L", (5, 4))).any()
    assert foreground(Image.new("L", (5, 4), 255)).all()
    assert foreground(Image.new("1", (5, 4), 1)).all()


def test_a_dim_grey_picture_is_no_mask(tmp_path):
    Image.fromarray(np.arange(84, dtype=np.uint8).reshape(SIZE)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png cannot be used \(holds 84 grey levels up to 83, neither a mask"):
        read_mask([tmp_path / "mask.png"])


def test_negative_values_are_no_mask(tmp_path):
    Image.fromarray(inside().astype(np.int32) * -1).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match="negative or not finite"):
        read_mask([tmp_path / "mask.tif"])


def test_several_files_are_combined_by_or(tmp_path):
    other = np.zeros(SIZE, bool)
    other[0, :] = True
    for name, mask in (("a", inside()), ("b", other)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    loaded = load_mask()({"label": files})["label"]
    assert loaded.shape == (1, *SIZE)
    np.testing.assert_array_equal(np.asarray(loaded)[0] > 0, inside() | other)
    Image.new("1", (3, 3)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png has another size than .*a\.png"):
        read_mask([*files, tmp_path / "c.png"])


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_mask_is_named(tmp_path, content):
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8) * 255).save(path)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ValueError, match=r"Mask .*mask\.png cannot be used"):
        read_mask([path])
