"""Masks of every coding are read rightly or refused by name."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from amkd_monai.files.masks import IGNORED, coding_problem, decode, read_mask
from amkd_monai.files.pictures import UNDONE, turned

SIZE = (40, 60)
Y, X = np.mgrid[: SIZE[0], : SIZE[1]]
DISC = (Y - 15) ** 2 + (X - 20) ** 2 <= 100
RING = ((Y - 15) ** 2 + (X - 20) ** 2 <= 144) & ~DISC
VOID = np.where(RING, 255, DISC).astype(np.uint8)


def grey(values, dtype=np.uint8):
    return Image.fromarray(np.asarray(values).astype(dtype))


def palette(values, *colours):
    image = grey(values)
    image.putpalette([c for colour in colours for c in colour] + [0] * (768 - 3 * len(colours)))
    return image


def rgba(rgb, alpha):
    return Image.fromarray(np.dstack([np.broadcast_to(rgb, (*SIZE, 3)), alpha]).astype(np.uint8))


def instances(step):
    result, count = np.zeros(SIZE, np.uint8), 0
    for cy in range(4, 40, 8):
        for cx in range(4, 60, 6):
            count += 1
            result[(Y - cy) ** 2 + (X - cx) ** 2 <= 4] = count * step
    return result


RIGHT = {
    "zero_one.png": grey(DISC),
    "zero_255.png": grey(DISC * 255),
    "mode_1.png": Image.fromarray(DISC),
    "u16_one.png": grey(DISC, np.uint16),
    "u16_full.png": grey(DISC * 65535, np.uint16),
    "u16_1000.png": grey(DISC * 1000, np.uint16),
    "float.tif": grey(DISC, np.float32),
    "probability.tif": grey(DISC * 0.9 + 0.05, np.float32),
    "probability.png": grey(np.where(DISC, 230, 20) + X % 9),
    "rgb.png": grey(DISC * 255).convert("RGB"),
    "red.png": Image.fromarray((DISC[..., None] * np.array([200, 0, 0])).astype(np.uint8)),
    "rgba_white.png": rgba(DISC[..., None] * 255, DISC * 255),
    "translucent.png": rgba(DISC[..., None] * np.array([255, 0, 0]), DISC * 100),
    "translucent_black.png": rgba(np.zeros(3), DISC * 100),
    "veiled.png": rgba(DISC[..., None] * 255, np.full(SIZE, 100)),
    "alpha_only.png": rgba(np.zeros(3), DISC * 255),
    "opaque.png": rgba(DISC[..., None] * 255, np.full(SIZE, 255)),
    "palette.png": palette(DISC, (0, 0, 0), (128, 0, 0)),
    "palette_dark.png": palette(DISC, (0, 0, 0), (40, 0, 0)),
    "cmyk.jpg": grey(DISC * 255).convert("CMYK"),
    "jpeg50.jpg": grey(DISC * 255),
}


@pytest.mark.parametrize("name", RIGHT)
def test_codings_of_one_meaning_are_read_rightly(tmp_path, name):
    RIGHT[name].save(tmp_path / name, **({"quality": 50} if name.endswith("jpg") else {}))
    found = read_mask([tmp_path / name])
    assert found.dtype == np.uint8 and set(np.unique(found)) <= {0, 1}
    wrong = (found != DISC).sum()
    assert wrong <= (25 if name.endswith("jpg") else 0)


@pytest.mark.parametrize(
    "image", [grey(VOID), palette(VOID, (0, 0, 0), (128, 0, 0), *[(0, 0, 0)] * 253, (224, 224, 192))]
)
def test_255_beside_class_indices_is_no_label(tmp_path, image):
    image.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(read_mask([tmp_path / "voc.png"]), VOID)


REFUSED = {
    "one_based.png": grey(DISC + 1),
    "inverted.png": grey(~DISC * 255),
    "constant.png": grey(np.full(SIZE, 255)),
    "three_classes.png": grey(DISC + (X > 40) * 2),
    "codes.png": grey(DISC * 38 + (X > 40) * 75),
    "third_class_alone.png": grey(DISC * 2),
    "high_levels.png": grey(np.where(DISC, 255, 200)),
    "instances.png": grey(instances(1)),
    "instances4.png": grey(instances(4)),
    "palette_white.png": palette(DISC, (255, 255, 255), (255, 0, 0)),
    "palette_reversed.png": palette(DISC, (255, 255, 255), (0, 0, 0)),
    "colours.png": Image.fromarray(
        (DISC[..., None] * np.array([200, 0, 0]) + RING[..., None] * np.array([0, 200, 0])).astype(np.uint8)
    ),
    "two_reds.png": Image.fromarray((DISC[..., None] * [128, 0, 0] + RING[..., None] * [192, 0, 0]).astype(np.uint8)),
    "red_and_orange.png": Image.fromarray(
        (DISC[..., None] * [255, 0, 0] + RING[..., None] * [255, 128, 0]).astype(np.uint8)
    ),
    "red_and_grey.png": Image.fromarray((DISC[..., None] * [200, 0, 0] + RING[..., None] * [60] * 3).astype(np.uint8)),
    "plateau.png": grey(DISC * 255 + (X > 40) * 128 + (X == 50)),
    "negative.tif": grey(DISC * -1.0, np.float32),
    "ramp.png": grey(X * 4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_codings_of_several_meanings_are_refused_by_name(tmp_path, name):
    REFUSED[name].save(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name)):
        read_mask([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "codes", "expected"),
    [
        ("one_based.png", "one_based", DISC),
        ("one_based.png", {"1": 0, "2": 1}, DISC),
        ("inverted.png", "inverted", DISC),
        ("constant.png", "nonzero", np.ones(SIZE)),
        ("codes.png", "nonzero", DISC | (X > 40)),
        ("codes.png", {"0": 0, "38": 1, "75": 0, "113": 1}, DISC),
        ("codes.png", {"0": 0, "38": 1, "75": "ignore", "113": 1}, np.where(DISC, 1, np.where(X > 40, 255, 0))),
        ("instances4.png", "nonzero", instances(4) > 0),
        ("palette_white.png", "indices", DISC),
        ("colours.png", "nonzero", DISC | RING),
        ("ramp.png", "threshold", X * 4 > 127),
    ],
)
def test_a_given_rule_reads_them(tmp_path, name, codes, expected):
    REFUSED[name].save(tmp_path / name)
    np.testing.assert_array_equal(read_mask([tmp_path / name], codes=codes), expected)


def test_a_rule_that_does_not_explain_a_value_is_refused(tmp_path):
    grey(DISC * 7).save(tmp_path / "seven.png")
    for codes in ("indices", "one_based", {"0": 0, "1": 1}, {"0": 0, "7": 5}, {"0": 0, "7": 1.5}, "guess"):
        with pytest.raises(ValueError, match=r"seven\.png|guess"):
            read_mask([tmp_path / "seven.png"], codes=codes)


def test_three_classes_are_indices_or_refused():
    values = (DISC + (X > 40) * 2).astype(np.uint8)
    np.testing.assert_array_equal(decode(values, classes=3), values)
    np.testing.assert_array_equal(decode(np.where(RING, IGNORED, values), classes=3), np.where(RING, IGNORED, values))
    for wrong in (values * 100, np.where(DISC, 3, values)):
        with pytest.raises(ValueError, match="classes 0 to 2"):
            decode(wrong.astype(np.uint8), classes=3)


def test_one_set_of_masks_has_one_meaning_of_255(tmp_path):
    used: set[str] = set()
    for name, values in (("a.png", VOID), ("b.png", DISC), ("c.png", RING * 255)):
        grey(values).save(tmp_path / name)
        read_mask([tmp_path / name], used=used)
        assert bool(coding_problem(used)) == (name == "c.png")
    used.clear()
    grey(DISC * 255).save(tmp_path / "d.jpg", quality=60)  # holds 1 and 255, too, by its noise
    assert {1, 255} <= set(np.unique(Image.open(tmp_path / "d.jpg")))
    for name in ("c.png", "d.jpg"):
        read_mask([tmp_path / name], used=used)
    assert not coding_problem(used)


def test_a_value_or_the_foreground_has_one_colour_in_a_set_of_masks(tmp_path):
    """As optimised palettes or a colour per class give them: alone, each mask can be read."""
    green, red, orange = (0, 255, 0), (255, 0, 0), (255, 50, 0)
    for kind in ("palette", "colours"):
        used: set[str] = set()
        for name, colour in (("red", red), ("orange", orange), ("green", green)):
            if kind == "palette":
                picture = grey(DISC)
                picture.putpalette([0, 0, 0, *colour, *[0] * 762])
            else:
                picture = Image.fromarray(DISC[..., None] * np.array(colour, np.uint8))
            picture.save(tmp_path / f"{name}.png")
            np.testing.assert_array_equal(read_mask([tmp_path / f"{name}.png"], used=used), DISC)
            assert bool(coding_problem(used)) == (name == "green"), (kind, name)
        used.clear()
        for name in ("red", "green"):
            read_mask([tmp_path / f"{name}.png"], codes="nonzero", used=used)
        assert not coding_problem(used), "what is given is not guessed"


def test_no_label_in_one_of_several_masks_stays(tmp_path):
    grey(np.where(RING, 255, DISC)).save(tmp_path / "a.png")
    grey((X > 45) * 1).save(tmp_path / "b.png")
    expected = np.where(RING, 255, DISC | (X > 45))
    for order in ("ab", "ba"):
        np.testing.assert_array_equal(read_mask([tmp_path / f"{name}.png" for name in order]), expected)


def test_a_rule_that_finds_everything_or_nothing_is_refused(tmp_path):
    grey(DISC + 1).save(tmp_path / "one_based.png")
    grey(DISC).save(tmp_path / "indices.png")
    for name, codes in (("one_based", "nonzero"), ("indices", "threshold")):
        with pytest.raises(ValueError, match=name):
            read_mask([tmp_path / f"{name}.png"], codes=codes)


def test_several_masks_of_an_image_are_joined(tmp_path):
    grey(DISC * 255).save(tmp_path / "a.png")
    grey((X > 45) * 255).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_mask([tmp_path / "a.png", tmp_path / "b.png"]), DISC | (X > 45))
    grey(np.ones((8, 8)) * (np.eye(8) > 0)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png"):
        read_mask([tmp_path / "a.png", tmp_path / "small.png"])


def pair(folder, orientation, mask, mask_orientation=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = turned(np.dstack([Y * 5, X * 4, Y + X]).astype(np.uint8), UNDONE.get(orientation, 1))
    Image.fromarray(np.ascontiguousarray(stored)).save(folder / "image.png", exif=exif if orientation > 1 else None)
    tag = Image.Exif()
    if mask_orientation:
        tag[0x0112] = mask_orientation
    grey(np.ascontiguousarray(mask)).save(folder / "mask.png", exif=tag)
    return [folder / "mask.png"], folder / "image.png"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_on_its_picture_as_viewers_show_it(tmp_path, orientation):
    undone = turned(DISC, UNDONE.get(orientation, 1))
    np.testing.assert_array_equal(read_mask(*pair(tmp_path, orientation, DISC)), DISC)  # drawn on what viewers show
    np.testing.assert_array_equal(read_mask(*pair(tmp_path, orientation, undone, orientation)), DISC)  # both tagged
    if orientation >= 5:  # drawn on the stored pixels: the size tells
        np.testing.assert_array_equal(read_mask(*pair(tmp_path, orientation, undone)), DISC)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_tag_of_the_mask_alone_is_decided_by_size_or_refused(tmp_path, orientation):
    if orientation < 5:
        with pytest.raises(ValueError, match=r"mask\.png.*orientation"):
            read_mask(*pair(tmp_path, 1, DISC, orientation))
    else:
        np.testing.assert_array_equal(read_mask(*pair(tmp_path, 1, DISC, orientation)), DISC)
        np.testing.assert_array_equal(
            read_mask(*pair(tmp_path, 1, turned(DISC, UNDONE[orientation]), orientation)), DISC
        )


def test_a_mask_of_another_size_than_its_picture_is_refused(tmp_path):
    files, image = pair(tmp_path, 1, DISC[:, :-1])
    with pytest.raises(ValueError, match=r"mask\.png is 59x40"):
        read_mask(files, image)


@pytest.mark.parametrize("colour_type", [2, 4])  # RGB; grey with transparency
def test_colours_of_16_bits_are_refused_since_small_values_would_be_0(tmp_path, colour_type):
    pixels = np.zeros((*SIZE, {2: 3, 4: 2}[colour_type]), ">u2")
    pixels[DISC] = 255
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    (tmp_path / "deep.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"deep\.png.*16 bits"):
        read_mask([tmp_path / "deep.png"])


def test_a_jpeg_of_class_indices_is_refused(tmp_path):
    indices = np.zeros((40, 40), np.uint8)
    indices[8:20, 8:30], indices[24:34, 10:20] = 1, 2
    Image.fromarray(indices).save(tmp_path / "mask.jpg", quality=90)
    for codes in ("auto", "indices", "nonzero"):
        with pytest.raises(ValueError, match=r"mask\.jpg"):
            read_mask([tmp_path / "mask.jpg"], None, 3 if codes != "nonzero" else 2, codes)
    Image.fromarray(indices * 0).save(tmp_path / "black.jpg")
    assert not read_mask([tmp_path / "black.jpg"]).any()
