"""Generated pictures, masks and volumes: right against an independent statement, or refused in one sentence."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from helpers import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image, ImageOps

from amkd_monai.files.masks import IGNORED, read_mask
from amkd_monai.files.pictures import read_picture
from amkd_monai.files.volumes import read_label_volume, read_volume, reorder, write_mask_volume

FUZZ = settings(max_examples=150, deadline=None, database=None, derandomize=True)


class Folder:
    """A temporary folder for one example."""

    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp())
        return self.path

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.path)


def one_sentence(error, name):
    """Whether an error is one line for a person that names the file."""
    text = str(error)
    return name in text and "\n" not in text and "Traceback" not in text and len(text) < 600


MODES = {
    "L": lambda v: v[..., 0],
    "RGB": lambda v: v,
    "RGBA": lambda v: np.dstack([v, np.full(v.shape[:2], 255, np.uint8)]),
    "LA": lambda v: np.dstack([v[..., 0], np.full(v.shape[:2], 255, np.uint8)]),
    "I;16": lambda v: v[..., 0].astype(np.uint16) * 257,
    "P": None,
    "CMYK": None,
    "1": None,
}


@FUZZ
@given(
    mode=st.sampled_from(sorted(MODES)),
    suffix=st.sampled_from(["png", "tif", "bmp", "jpg"]),
    tag=st.integers(0, 9),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 17, 256]),
    seed=st.integers(0, 999),
    cut=st.sampled_from([0, 0, 0, 1, 30]),
)
def test_a_picture_is_what_viewers_show_or_refused(mode, suffix, tag, height, width, levels, seed, cut):
    pixels = np.random.default_rng(seed).integers(0, levels, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if MODES[mode] is None else Image.fromarray(MODES[mode](pixels))
    if MODES[mode] is None:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = tag
    with Folder() as folder:
        path = folder / f"p.{suffix}"
        try:
            image.save(path, exif=exif.tobytes()) if tag else image.save(path)
        except OSError:
            return  # no file of this mode and kind
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        try:
            found = read_picture(path)
        except ValueError as error:
            few = len(np.unique(np.asarray(image.convert("RGB")))) <= 17
            assert one_sentence(error, path.name) and (cut or few), error
            return
        with Image.open(path) as again:
            again.filename = ""  # Pillow scrambles turned TIFF files that it maps into memory
            shown = ImageOps.exif_transpose(again)
            expected = np.asarray(shown)
            expected = expected // 257 if shown.mode.startswith("I") else np.asarray(shown.convert("RGB"))
        np.testing.assert_array_equal(found, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2))


@FUZZ
@given(
    values=st.lists(st.sampled_from([0, 1, 2, 3, 7, 38, 75, 128, 200, 254, 255]), min_size=1, max_size=4, unique=True),
    classes=st.integers(2, 4),
    codes=st.sampled_from(["auto", "nonzero", "indices", "one_based", "inverted", "threshold"]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    seed=st.integers(0, 999),
)
def test_a_mask_is_what_its_rule_says_or_refused(values, classes, codes, dtype, seed):
    drawn = np.random.default_rng(seed).choice(values, (13, 17))
    stated = {
        "nonzero": (drawn != 0).astype(int),
        "inverted": (drawn == 0).astype(int),
        "indices": drawn,
        "one_based": np.where(drawn == IGNORED, IGNORED, drawn - 1),
    }
    with Folder() as folder:
        path = folder / ("m.tif" if dtype == np.float32 else "m.png")
        Image.fromarray(drawn.astype(dtype)).save(path)
        try:
            found = read_mask([path], classes=classes, codes=codes)
        except ValueError as error:
            assert one_sentence(error, path.name), error
            return
    assert set(np.unique(found)) <= {*range(classes), IGNORED}
    if codes == "threshold":
        assert set(np.unique(found)) <= {0, 1} and (found[drawn == 0] == 0).all()
    elif codes in stated:
        np.testing.assert_array_equal(found, stated[codes])
    else:  # guessed: every value has one class, the order of values is that of classes, 0 is background
        table = {int(v): set(np.unique(found[drawn == v])) for v in np.unique(drawn)}
        assert all(len(of_value) == 1 for of_value in table.values())
        assert table.get(0, {0}) == {0}
        low = [min(table[v]) for v in sorted(table) if v != 255]
        assert low == sorted(low)
        if classes == 2 and {1, 2} & set(table) and len(table) > 2:
            assert not {1, 2} <= set(table), "two classes are not merged"


@FUZZ
@given(
    axes=st.permutations(["R", "A", "S"]),
    flips=st.tuples(*[st.booleans()] * 3),
    label_axes=st.permutations(["R", "A", "S"]),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.703125, 1.37, 2.5, 5.0])] * 3),
    unit=st.sampled_from(["mm", "meter", "micron", "unknown"]),
    suffix=st.sampled_from([".nii", ".nii.gz", ".NII.GZ"]),
    extra=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_volume_lies_where_itk_says_whatever_its_order(
    axes, flips, label_axes, dtype, shape, spacing, unit, suffix, extra, seed
):
    itk = needs("SimpleITK")
    opposite = dict(zip("RAS", "LPI", strict=True))
    order = "".join(opposite[a] if flip else a for a, flip in zip(axes, flips, strict=True))
    rng = np.random.default_rng(seed)
    volume, mask = rng.integers(0, 200, shape).astype(dtype), (rng.random(shape) < 0.3).astype(np.uint8)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = rng.uniform(-90, 90, 3).round(2)
    size = {"mm": 1.0, "unknown": 1.0, "meter": 1e-3, "micron": 1e3}[unit]

    def stored(array, codes):
        start = nibabel.Nifti1Image(array, affine)
        turned = start.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
        data = np.asanyarray(turned.dataobj)
        image = nibabel.Nifti1Image(data[..., None] if extra else data, np.diag([size] * 3 + [1]) @ turned.affine)
        image.header.set_xyzt_units(unit)
        return image

    with Folder() as folder:
        path, label, out = folder / f"v{suffix}", folder / f"l{suffix}", folder / "m.nii.gz"
        for file, array, codes in ((path, volume, order), (label, mask, "".join(label_axes))):
            plain = folder / f"plain{suffix.lower()}"
            nibabel.save(stored(array, codes), plain)
            plain.rename(file)
        array, grid = read_volume(path)
        np.testing.assert_array_equal(reorder(array, grid, "RAS"), volume.astype(np.float32))
        np.testing.assert_allclose(grid.reordered("RAS").affine, affine, atol=1e-3)
        try:
            found, _ = read_label_volume(label, grid)
        except ValueError as error:  # foreground along the whole border, or everywhere
            assert one_sentence(error, label.name) and mask.mean() > 0.2, error
            return
        np.testing.assert_array_equal(reorder(found, grid, "RAS"), mask)
        write_mask_volume(out, found, grid)
        image = itk.ReadImage(str(out))
        for index in np.argwhere(mask)[:5]:  # each voxel of the mask is where the world has it
            world = (affine @ [*index, 1])[:3]  # ITK knows the unit
            place = image.TransformPhysicalPointToIndex([float(-world[0]), float(-world[1]), float(world[2])])
            assert image[place] == 1


@FUZZ
@given(
    content=st.binary(max_size=400), head=st.booleans(), suffix=st.sampled_from(["png", "tif", "jpg", "nii", "nii.gz"])
)
def test_bytes_of_any_kind_are_refused_in_one_sentence(content, head, suffix):
    starts = {
        "png": b"\x89PNG\r\n\x1a\n",
        "tif": b"II*\0",
        "jpg": b"\xff\xd8\xff\xe0",
        "nii": b"\\\x01\0\0",
        "nii.gz": b"\x1f\x8b",
    }
    with Folder() as folder:
        path = folder / f"odd.{suffix}"
        path.write_bytes((starts[suffix] if head else b"") + content)
        try:
            (read_volume if suffix.startswith("nii") else read_picture)(path)
        except ValueError as error:
            assert one_sentence(error, path.name), error
        else:
            raise AssertionError("read")
