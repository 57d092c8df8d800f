"""Pictures as viewers show them, whatever their mode, depth and orientation."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from amkd_monai.files.pictures import UNDONE, eight_bits, picture_frame, read_picture, turned, write_png

SIZE = (40, 56)


def scene(seed=0, size=SIZE):
    """A picture (H, W, 3) that has no symmetry."""
    y, x = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(seed).normal(0, 4, (*size, 3))
    return (np.dstack([3 * x + 20, 4 * y + 10, 2 * x + 2 * y]) + noise).clip(0, 255).astype(np.uint8)


def save(path, array, orientation=None, **options):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_every_exif_orientation_is_shown_upright(tmp_path, orientation, suffix):
    path = save(tmp_path / f"p.{suffix}", scene(), orientation, **({"quality": 100} if suffix == "jpg" else {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = read_picture(path)
    np.testing.assert_array_equal(found, expected)
    assert picture_frame(path) == ((expected.shape[1], expected.shape[0]), orientation)
    if suffix == "png":
        np.testing.assert_array_equal(found, turned(scene(), orientation))


@pytest.mark.parametrize(
    ("name", "array", "tolerance"),
    [
        ("grey8.png", scene()[..., 0], 0),
        ("grey16.png", scene()[..., 0].astype(np.uint16) * 257, 0),
        ("grey12.png", scene()[..., 0].astype(np.uint16) * 16, 1),
        ("float01.tif", scene()[..., 0].astype(np.float32) / 255, 0),
        ("float255.tif", scene()[..., 0].astype(np.float32), 0),
        ("int32.tif", scene()[..., 0].astype(np.int32), 0),
    ],
)
def test_grey_levels_of_every_depth_keep_their_scale(tmp_path, name, array, tolerance):
    Image.fromarray(array).save(tmp_path / name)
    found = read_picture(tmp_path / name).astype(int)
    assert np.abs(found - scene()[..., :1]).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "P"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_turned_tiff_files_are_not_scrambled(tmp_path, mode, compression, orientation):
    grey = scene()[..., 0].astype(np.uint16) * 257 if mode == "I;16" else scene()[..., 0]
    stored = np.ascontiguousarray(turned(scene() if mode == "RGB" else grey, UNDONE.get(orientation, 1)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(stored)
    (image.convert("P") if mode == "P" else image).save(tmp_path / "x.tif", exif=exif, compression=compression)
    expected = scene() if mode == "RGB" else np.repeat(scene()[..., :1], 3, 2)
    np.testing.assert_array_equal(read_picture(tmp_path / "x.tif"), expected)


def test_what_is_transparent_is_black_and_other_modes_keep_their_colours(tmp_path):
    rgba = np.dstack([scene(), np.full(SIZE, 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = scene()
    expected[:10] = 0
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), expected)
    Image.fromarray(scene()).quantize(200).save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        np.testing.assert_array_equal(read_picture(tmp_path / "p.png"), np.asarray(image.convert("RGB")))
    Image.fromarray(scene()).convert("CMYK").save(tmp_path / "c.jpg", quality=98)
    assert np.abs(read_picture(tmp_path / "c.jpg").astype(int) - scene()).mean() < 6


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("black.png", np.zeros(SIZE, np.uint8)),
        ("white.png", np.full((*SIZE, 3), 255, np.uint8)),
        ("two.png", (scene()[..., 0] > 90).astype(np.uint8) * 255),
        ("negative.tif", scene()[..., 0].astype(np.float32) - 100),
        ("nan.tif", np.where(np.eye(*SIZE) > 0, np.nan, scene()[..., 0]).astype(np.float32)),
        ("huge.tif", scene()[..., 0].astype(np.int32) * 1000),
        ("overshoot.tif", scene()[..., 0].astype(np.float32) / 150),
    ],
)
def test_what_has_no_scale_or_no_levels_is_refused_by_name(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        read_picture(tmp_path / name)


def test_a_deep_tiff_whose_white_is_0_is_refused(tmp_path):
    photometric, content = b"\x06\x01\x03\x00\x01\x00\x00\x00", {}
    for name, array in (("deep.tif", scene()[..., 0].astype(np.uint16) * 257), ("flat.tif", scene()[..., 0])):
        Image.fromarray(array).save(tmp_path / name)
        content[name] = (tmp_path / name).read_bytes()
        assert content[name].count(photometric + b"\x01") == 1
        (tmp_path / name).write_bytes(content[name].replace(photometric + b"\x01", photometric + b"\x00"))
    with pytest.raises(ValueError, match=r"deep\.tif.*MinIsWhite"):  # Pillow turns 8 bits only
        read_picture(tmp_path / "deep.tif")
    np.testing.assert_array_equal(read_picture(tmp_path / "flat.tif")[..., 0], 255 - scene()[..., 0])


def test_a_tiff_of_signed_bytes_is_refused(tmp_path):
    Image.fromarray(scene()[..., 0]).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    with pytest.raises(ValueError, match=r"signed\.tif.*signed"):
        read_picture(tmp_path / "signed.tif")


@pytest.mark.parametrize("chunk", ["eXIf", "tEXt"])
def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path, chunk):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    raw = save(tmp_path / "p.png", scene()).read_bytes()
    if chunk == "tEXt":
        content = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(content), content.hex().encode())
    else:
        content = content.removeprefix(b"Exif\0\0")
    name = chunk.encode()
    late = len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    (tmp_path / "p.png").write_bytes(raw[:-12] + late + raw[-12:])
    assert picture_frame(tmp_path / "p.png") == (SIZE, 6)
    np.testing.assert_array_equal(read_picture(tmp_path / "p.png"), turned(scene(), 6))


def test_several_pages_and_damaged_files_are_refused_by_name(tmp_path):
    pages = [Image.fromarray(scene(seed)) for seed in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"pages\.tif.* 2 pages"):
        read_picture(tmp_path / "pages.tif")
    whole = save(tmp_path / "whole.png", scene()).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=name):
            read_picture(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "missing.png")


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_large_picture_of_one_colour_channel_has_levels(tmp_path, channel):
    picture = np.zeros((1000, 1000, 3), np.uint8)  # as of a fluorescent stain
    picture[..., channel] = np.linspace(0, 255, 1000)
    save(tmp_path / "stain.png", picture)
    np.testing.assert_array_equal(read_picture(tmp_path / "stain.png"), picture)


def test_small_pictures_may_have_few_levels(tmp_path):
    save(tmp_path / "one.png", scene()[:1, :1])
    assert read_picture(tmp_path / "one.png").shape == (1, 1, 3)


def test_eight_bits_of_16_are_what_they_were():
    levels = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(eight_bits(levels), levels // 257)


def test_a_written_picture_says_who_wrote_it(tmp_path):
    write_png(tmp_path / "x.png", scene())
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["Software"] == "amkd_monai prediction"
