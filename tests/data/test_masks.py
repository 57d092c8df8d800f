"""Masks of every mode and scale: none becomes empty, none is guessed."""

import numpy as np
import pytest
from PIL import Image

from amkd_monai.data.transforms import load_mask
from amkd_monai.files.masks import read_mask

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
    np.testing.assert_array_equal(np.asarray(loaded), inside()[None])


def saved(tmp_path, picture):
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(tmp_path / "mask.png")
    return [tmp_path / "mask.png"]


def refused(files, **options):
    with pytest.raises(ValueError, match=r"mask\.png cannot be used.*mask_codes"):
        read_mask(files, **options)
    return True


@pytest.mark.parametrize("codes", [(1, 2), (1, 2, 3), (38, 75), (85, 170, 255), (128, 255), (100,)])
def test_several_classes_are_merged_where_that_is_asked_for(tmp_path, codes):
    levels = np.zeros(SIZE, np.uint8)
    for row, code in enumerate(codes, start=1):
        levels[row, 3:9] = code
    files = saved(tmp_path, levels)
    assert refused(files)
    np.testing.assert_array_equal(read_mask(files, codes="nonzero"), levels > 0)
    loaded = load_mask(codes="nonzero")({"label": [str(files[0])]})["label"]
    np.testing.assert_array_equal(np.asarray(loaded)[0], levels > 0)


def test_coloured_classes_are_merged_whatever_their_luminance_where_that_is_asked_for(tmp_path):
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[1, 3:9] = 0, 0, 255
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), picture.any(axis=2))
    picture[3, 2:5] = 128, 0, 0
    expected = picture.any(axis=2)
    files = saved(tmp_path, picture)
    assert refused(files)
    np.testing.assert_array_equal(read_mask(files, codes="nonzero"), expected)


def test_a_palette_holds_indices_and_black_comes_first(tmp_path):
    palette = Image.fromarray(inside().astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    np.testing.assert_array_equal(read_mask(saved(tmp_path, palette)), inside())
    palette.putpalette([255, 255, 255, 0, 0, 0])
    files = saved(tmp_path, palette)
    assert refused(files)
    np.testing.assert_array_equal(read_mask(files, codes="indices"), inside())
    np.testing.assert_array_equal(read_mask(files, codes="inverted"), ~inside())


def test_what_is_transparent_is_background(tmp_path):
    picture = np.full((*SIZE, 4), 255, np.uint8)
    picture[..., 3] = inside() * 255
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), inside())


def test_an_empty_and_a_full_mask(tmp_path):
    assert not read_mask(saved(tmp_path, Image.new("L", (5, 4)))).any()
    for full in (Image.new("L", (5, 4), 255), Image.new("1", (5, 4), 1)):
        files = saved(tmp_path, full)
        assert refused(files)
        assert (read_mask(files, codes="nonzero") == 1).all()


def test_what_looks_inverted_is_refused_unless_it_is_said(tmp_path):
    files = saved(tmp_path, ~inside())
    assert refused(files)
    np.testing.assert_array_equal(read_mask(files, codes="inverted"), inside())
    np.testing.assert_array_equal(read_mask(files, codes="nonzero"), ~inside())


def test_codes_that_are_given_are_taken_at_their_word(tmp_path):
    files = saved(tmp_path, inside().astype(np.uint8) + 1)
    assert refused(files)
    np.testing.assert_array_equal(read_mask(files, codes="one_based"), inside())
    levels = np.where(inside(), 75, 0).astype(np.uint8)
    levels[6] = 38
    files = saved(tmp_path, levels)
    np.testing.assert_array_equal(
        read_mask(files, codes={"0": 0, "75": 1, "38": "ignore"}), np.where(levels == 38, 255, inside())
    )
    with pytest.raises(ValueError, match=r"mask\.png.* 38\b.*mask_codes"):
        read_mask(files, codes={"0": 0, "75": 1})
    assert not read_mask(files, codes="threshold").any()
    for wrong in ("binary", {"0": 0, "75": 2, "38": 1}):
        with pytest.raises(ValueError, match="mask_codes"):
            read_mask(files, codes=wrong)


def test_255_beside_class_indices_is_no_label(tmp_path):
    levels = inside().astype(np.uint8)
    levels[6] = 255
    np.testing.assert_array_equal(read_mask(saved(tmp_path, levels)), levels)
    levels[4] *= 2
    np.testing.assert_array_equal(read_mask(saved(tmp_path, levels), classes=3), levels)
    levels[0, 0] = 3
    with pytest.raises(ValueError, match=r"mask\.png.* 3.*classes 0 to 2"):
        read_mask(saved(tmp_path, levels), classes=3)


@pytest.mark.parametrize("codes", ["auto", "indices", {"0": 0, "1": 1, "2": 2}])
def test_colours_and_transparency_do_not_say_which_of_three_classes_is_meant(tmp_path, codes):
    indices = inside().astype(np.uint8)
    indices[4] *= 2
    read = [np.repeat(indices[..., None], 3, -1)]
    refused = [np.stack([indices, 0 * indices, 0 * indices], -1)]  # in the red channel alone
    refused.append(np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[indices])
    refused.append(np.dstack([np.zeros((*indices.shape, 3), np.uint8), 255 * (indices > 0)]).astype(np.uint8))
    for pixels in read:
        np.testing.assert_array_equal(read_mask(saved(tmp_path, pixels), classes=3, codes=codes), indices)
    for pixels in refused:
        with pytest.raises(ValueError, match=r"mask\.png.*(colours|transparency).*class indices"):
            read_mask(saved(tmp_path, pixels), classes=3, codes=codes)


def test_classes_beside_255_are_no_grey_scale(tmp_path):
    levels = inside().astype(np.uint8)
    levels[4] *= 2
    levels[6] = 255  # no label, as in Pascal VOC
    assert refused(saved(tmp_path, levels))


def test_a_dim_grey_picture_is_no_mask(tmp_path):
    Image.fromarray(np.arange(84, dtype=np.uint8).reshape(SIZE)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png cannot be used"):
        read_mask([tmp_path / "mask.png"])


def test_negative_values_are_no_mask(tmp_path):
    Image.fromarray(inside().astype(np.int32) * -1).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match=r"mask\.tif cannot be used.*negative"):
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
    with pytest.raises(ValueError, match=r"mask\.png cannot be read"):
        read_mask([path])
