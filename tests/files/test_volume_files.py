"""Volumes in every array order, with every header; labels on the grid of their image; masks on that of the input."""

from __future__ import annotations

import itertools
import math

import nibabel
import numpy as np
import pytest
from helpers import needs
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from amkd_monai.files.volumes import (
    Grid,
    check_grid,
    ct_range,
    read_label_volume,
    read_volume,
    reorder,
    seen_slice,
    volume_grid,
    write_mask_volume,
)

SHAPE = (12, 15, 9)
AFFINE = np.array([[2.5, 0, 0, -40], [0, 1.25, 0, -30], [0, 0, 1.37, 10], [0, 0, 0, 1.0]])
VOLUME = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
MASK = np.zeros(SHAPE, np.uint8)
MASK[2:7, 3:9, 1:4] = 1
ORDERS = ["".join(axes) for order in itertools.permutations(("RL", "AP", "SI")) for axes in itertools.product(*order)]


def stored(array, axes, affine=AFFINE):
    image = nibabel.Nifti1Image(array, affine)
    return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))


def write(path, image, **header):
    for name, value in header.items():
        getattr(image.header, name)(*value)
    nibabel.save(image, path)
    return path


def test_there_are_48_orders():
    assert len(set(ORDERS)) == 48


@pytest.mark.parametrize("axes", ORDERS)
def test_an_order_is_read_written_and_brought_back(tmp_path, axes):
    path = write(tmp_path / "v.nii.gz", stored(VOLUME, axes))
    array, grid = read_volume(path)
    assert grid.axes == axes and array.dtype == np.float32
    np.testing.assert_array_equal(reorder(array, grid, "RAS"), VOLUME)
    np.testing.assert_allclose(grid.reordered("RAS").affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(sorted(grid.spacing), sorted((2.5, 1.25, 1.37)), rtol=1e-6)
    label = write(tmp_path / "l.nii.gz", stored(MASK, "PIR"))
    found, on = read_label_volume(label, grid)
    assert on is grid
    np.testing.assert_array_equal(reorder(found, grid, "RAS"), MASK)
    write_mask_volume(tmp_path / "m.nii.gz", found, grid)
    again = nibabel.as_closest_canonical(nibabel.load(tmp_path / "m.nii.gz"))
    np.testing.assert_array_equal(np.asarray(again.dataobj), MASK)
    np.testing.assert_allclose(nibabel.load(tmp_path / "m.nii.gz").affine, nibabel.load(path).affine, atol=1e-6)


@pytest.mark.parametrize("thick", [None, 0, 1, 2])
def test_the_slice_to_look_at_lies_across_the_longest_side_of_the_voxels_in_every_order(tmp_path, thick):
    sizes, axis = np.ones(3), 2 if thick is None else thick
    sizes[axis] = 1 if thick is None else 4
    for axes in ORDERS[::5]:
        array, grid = read_volume(write(tmp_path / "v.nii.gz", stored(VOLUME, axes, np.diag([*sizes, 1]))))
        image, mask = seen_slice(array, read_volume(write(tmp_path / "m.nii.gz", stored(MASK, axes)))[0], grid)
        turned = VOLUME[::-1, ::-1, ::-1], MASK[::-1, ::-1, ::-1]  # to the left, the back and the feet
        most = int((turned[1] > 0).sum(tuple({0, 1, 2} - {axis})).argmax())
        for found, whole in ((image, turned[0]), (mask, turned[1])):
            np.testing.assert_array_equal(found, whole.take(most, axis).T)


def _qform_differs(image):
    other = AFFINE.copy()
    other[0, 0] *= -1
    image.set_sform(AFFINE, 1)
    image.set_qform(other, 1)


def _qform_alone(image):
    image.set_qform(AFFINE, 1)
    image.set_sform(None, 0)


HEADERS = {
    "plain": lambda image: None,
    "qform alone": _qform_alone,
    "qform differs": _qform_differs,
    "scaled": lambda image: image.header.set_slope_inter(0.5, 250),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize(("unit", "size"), [("mm", 1.0), ("meter", 0.001), ("micron", 1000.0)])
def test_a_mask_has_the_header_geometry_of_its_image_in_nibabel_and_itk(tmp_path, kind, unit, size):
    itk = needs("SimpleITK")
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    HEADERS[kind](image)
    scaled = np.diag([size, size, size, 1.0])
    sform, qform = image.header.get_sform(coded=True), image.header.get_qform(coded=True)
    image.header["pixdim"][1:4] *= size
    for form, name in ((sform, "set_sform"), (qform, "set_qform")):
        getattr(image, name)(None if form[0] is None else scaled @ form[0], int(form[1]))
    path = write(tmp_path / "v.nii.gz", image, set_xyzt_units=(unit,))
    grid = read_volume(path)[1]
    np.testing.assert_allclose(grid.affine, AFFINE, atol=1e-3)
    write_mask_volume(tmp_path / "m.nii.gz", MASK, grid)
    a, b = nibabel.load(path), nibabel.load(tmp_path / "m.nii.gz")
    np.testing.assert_allclose(b.affine, a.affine, rtol=1e-5)
    for name in ("get_sform", "get_qform"):
        (x, cx), (y, cy) = (getattr(i.header, name)(coded=True) for i in (a, b))
        assert cx == cy and (x is None or np.allclose(x, y, rtol=1e-5))
    assert b.header.get_xyzt_units()[0] == unit
    x, y = (itk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in "vm")
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(x, name)(), getattr(y, name)(), rtol=1e-4, atol=1e-6)


def rotated(angle):
    c, s = math.cos(angle), math.sin(angle)
    turn = np.eye(4)
    turn[:2, :2] = [[c, -s], [s, c]]
    return turn @ AFFINE


def test_oblique_volumes_are_read_and_sheared_ones_refused(tmp_path):
    grid = read_volume(write(tmp_path / "o.nii.gz", nibabel.Nifti1Image(VOLUME, rotated(0.2))))[1]
    np.testing.assert_allclose(grid.spacing, (2.5, 1.25, 1.37), rtol=1e-6)
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.5
    with pytest.raises(ValueError, match=r"s\.nii\.gz.*sheared"):
        volume_grid(write(tmp_path / "s.nii.gz", nibabel.Nifti1Image(VOLUME, sheared)))


def _without_orientation():
    image = nibabel.Nifti1Image(VOLUME, None)
    image.header.set_zooms((2.5, 1.25, 1.37))
    return image


def _singular():
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header["srow_y"] = 0
    return nibabel.Nifti1Image(VOLUME, None, image.header)


def _colours():
    array = np.zeros(SHAPE, [(c, "u1") for c in "RGB"])
    array["R"] = VOLUME // 4
    return array


REFUSED = {
    "complex.nii.gz": lambda: nibabel.Nifti1Image(VOLUME.astype(np.complex64), AFFINE),
    "colours.nii.gz": lambda: nibabel.Nifti1Image(_colours(), AFFINE),
    "time.nii.gz": lambda: nibabel.Nifti1Image(np.stack([VOLUME] * 2, -1), AFFINE),
    "flat.nii.gz": lambda: nibabel.Nifti1Image(VOLUME[..., 0], AFFINE),
    "nan.nii.gz": lambda: nibabel.Nifti1Image(np.where(VOLUME > 800, np.nan, VOLUME).astype(np.float32), AFFINE),
    "unset.nii.gz": _without_orientation,
    "huge.nii.gz": lambda: nibabel.Nifti1Image(VOLUME, np.diag([2500.0, 1250, 1370, 1])),
    "singular.nii.gz": lambda: _singular(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_or_lies_nowhere_is_refused_by_name(tmp_path, name):
    nibabel.save(REFUSED[name](), tmp_path / name)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_volume(tmp_path / name)


def test_axes_of_length_1_and_names_in_capitals_and_other_byte_orders_are_read(tmp_path):
    write(tmp_path / "one.nii.gz", nibabel.Nifti1Image(VOLUME[..., None], AFFINE))
    for name in ("ONE.NII.GZ", "Mixed.Nii.Gz"):
        (tmp_path / name).write_bytes((tmp_path / "one.nii.gz").read_bytes())
    big = nibabel.Nifti1Image(VOLUME.astype(">i2"), AFFINE, nibabel.Nifti1Header(endianness=">"))
    for path in (tmp_path / "ONE.NII.GZ", tmp_path / "Mixed.Nii.Gz", write(tmp_path / "big.nii", big)):
        np.testing.assert_array_equal(read_volume(path)[0], VOLUME)


def test_damaged_files_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "w.nii.gz", nibabel.Nifti1Image(VOLUME, AFFINE)).read_bytes()
    plain = write(tmp_path / "p.nii", nibabel.Nifti1Image(VOLUME, AFFINE)).read_bytes()
    cases = {
        "cut.nii.gz": whole[:-900],
        "cut.nii": plain[:-9],
        "packed.nii": whole,
        "text.nii.gz": b"text",
        "no.nii": b"",
        "pair.nii": plain[:344] + b"ni1\0" + plain[348:352],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_volume(tmp_path / name)
    (tmp_path / "more.nii.gz").write_bytes(whole + b"\0" * 64)
    np.testing.assert_array_equal(read_volume(tmp_path / "more.nii.gz")[0], VOLUME)


def test_a_header_of_more_voxels_than_memory_is_refused_with_a_reason(tmp_path):
    nibabel.save(nibabel.Nifti1Image(VOLUME, AFFINE), tmp_path / "huge.nii")
    content = bytearray((tmp_path / "huge.nii").read_bytes())
    content[42:48] = np.full(3, 30_000, "<i2").tobytes()  # dim[1:4]
    (tmp_path / "huge.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"huge\.nii.*\(\S.*\)"):
        read_volume(tmp_path / "huge.nii")


def test_a_flipped_bit_of_a_packed_file_is_noticed(tmp_path):
    whole = write(tmp_path / "w.nii.gz", nibabel.Nifti1Image(VOLUME, AFFINE)).read_bytes()
    for place in np.linspace(60, len(whole) - 5, 25).astype(int):
        (tmp_path / "odd.nii.gz").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"odd\.nii\.gz"):
            read_volume(tmp_path / "odd.nii.gz")


def test_an_sform_and_pixdim_of_other_sizes_are_refused(tmp_path):
    image = nibabel.Nifti1Image(VOLUME, AFFINE)
    image.header["pixdim"][1:4] = 1
    image = nibabel.Nifti1Image(VOLUME, None, image.header)
    with pytest.raises(ValueError, match=r"odd\.nii.*pixdim"):
        volume_grid(write(tmp_path / "odd.nii", image))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a @ np.diag([1, 0.8, 1, 1]), "posterior to anterior"),
        (lambda a: a + np.array([[0, 0, 0, 20.0], [0] * 4, [0] * 4, [0] * 4]), "left to right"),
        (lambda a: rotated(0.02), "posterior to anterior"),
        (lambda a: np.diag([-1, 1, 1, 1]) @ a, "left to right"),
        (lambda a: np.eye(4), "left to right"),
    ],
)
def test_a_label_on_another_grid_is_refused_by_what_differs(tmp_path, change, word):
    label = write(tmp_path / "label.nii.gz", nibabel.Nifti1Image(MASK, change(AFFINE)))
    with pytest.raises(ValueError, match=rf"label\.nii\.gz.*({word})"):
        read_label_volume(label, Grid(SHAPE, AFFINE))


def test_a_label_of_another_shape_is_refused_and_rounding_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"l\.nii .*8 voxels from inferior to superior"):
        check_grid("l.nii", Grid((12, 15, 8), AFFINE), Grid(SHAPE, AFFINE))
    check_grid("l.nii", Grid(SHAPE, AFFINE.astype(np.float32) + 1e-4 * np.eye(4)), Grid(SHAPE, AFFINE))


@pytest.mark.parametrize(
    ("values", "right"),
    [
        (MASK * 255, True),
        (MASK.astype(np.float32) * 0.9999, True),
        (MASK.astype(np.float64), True),
        (MASK + 1, False),
        (MASK * 3, False),
        (1 - MASK * 1.0, False),
        (MASK * -1.0, False),
        (MASK * 0.5, False),
        (np.ones(SHAPE, np.uint8), False),
    ],
)
def test_codings_of_labels(tmp_path, values, right):
    path = write(tmp_path / "label.nii.gz", nibabel.Nifti1Image(values, AFFINE))
    if right:
        np.testing.assert_array_equal(read_label_volume(path)[0], MASK)
    else:
        with pytest.raises(ValueError, match=r"label\.nii\.gz"):
            read_label_volume(path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((-1000, 400), (-1250, 250)),
        ((-2000, -1000, 400), (-1250, 250)),
        ((-2000, 0, 3071), None),
        ((-3024, -900, 3000), (-1250, 250)),
        ((0, 255), (0, 255)),
        ((3, 200), (0, 255)),
        ((0, 1), (0, 1)),
        ((24, 1424), None),
        ((0, 3071), None),
        ((1, 121), None),
        ((0, 0.4), None),
        ((-160, 240), None),
        ((-2.5, 4.0), None),
    ],
)
def test_values_of_a_ct_are_recognised_or_refused(values, expected):
    volume = np.array(values, float)
    if expected is None:
        with pytest.raises(ValueError, match="Hounsfield"):
            ct_range(volume, -1250, 250)
    else:
        assert ct_range(volume, -1250, 250) == expected
    assert ct_range(volume, -1250, 250, "hu") == (-1250, 250)
    with pytest.raises(ValueError, match="grey"):
        ct_range(volume, -1250, 250, "grey")
