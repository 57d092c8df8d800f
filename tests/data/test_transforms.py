import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from amkd_monai.data.transforms import CtWindowd, NeighbourSlicesd, SaveMaskd, load_mask, load_rgb, load_volume

SIZE = (5, 9)  # height, width


def load(loader, path, key):
    return np.asarray(loader({key: str(path)})[key])


def ramp():
    return np.arange(45, dtype=np.uint8).reshape(SIZE) * 5


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_photos_of_any_mode_become_rgb(tmp_path, mode):
    grey = ramp()
    Image.fromarray(grey).convert(mode).save(tmp_path / "photo.png")
    image = load(load_rgb(), tmp_path / "photo.png", "image")
    assert image.shape == (3, *SIZE)
    np.testing.assert_array_equal(image, np.broadcast_to(grey, (3, *SIZE)))


def test_palettes_and_bilevel_photos_become_rgb(tmp_path):
    indices = Image.fromarray((ramp() > 100).astype(np.uint8), mode="P")
    indices.putpalette([10, 20, 30, 200, 150, 100])
    indices.save(tmp_path / "p.png")
    image = load(load_rgb(), tmp_path / "p.png", "image")
    assert image[:, 0, 0].tolist() == [10, 20, 30] and image[:, -1, -1].tolist() == [200, 150, 100]
    bilevel = ramp()[:4] > 100  # of more pixels, two levels would show nothing
    Image.fromarray(bilevel).save(tmp_path / "1.png")
    np.testing.assert_array_equal(load(load_rgb(), tmp_path / "1.png", "image"), np.stack([bilevel * 255] * 3))


@pytest.mark.parametrize("levels", [1, 2, 16, 17])
def test_photos_of_almost_no_levels_are_refused(tmp_path, levels):
    pixels = np.arange(40 * 30).reshape(40, 30) % levels * 15
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photo.png")
    if levels > 16:
        assert load(load_rgb(), tmp_path / "photo.png", "image").max() == 240
        return
    with pytest.raises(ValueError, match=rf"photo\.png .*only {levels} of 256 levels"):
        load(load_rgb(), tmp_path / "photo.png", "image")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_photos_of_sixteen_bits_keep_their_range(tmp_path, suffix):
    deep = ramp().astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    image = load(load_rgb(), tmp_path / f"deep.{suffix}", "image")
    np.testing.assert_allclose(image, np.broadcast_to(ramp(), (3, *SIZE)), atol=1)


def test_colours_keep_their_order(tmp_path):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[0, 8] = 255, 100, 0
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    assert load(load_rgb(), tmp_path / "photo.png", "image")[:, 0, 8].tolist() == [255, 100, 0]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "16-bit", "16-bit tif"])
def test_masks_of_any_mode_are_class_indices(tmp_path, mode):
    inside = np.zeros(SIZE, bool)
    inside[1:3, 4:9] = True
    path = tmp_path / ("mask.tif" if mode.endswith("tif") else "mask.png")
    if mode.startswith("16-bit"):
        Image.fromarray(inside.astype(np.uint16) * 65535).save(path)
    elif mode == "P":
        picture = Image.fromarray(inside.astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
        picture.save(path)
    else:
        Image.fromarray(inside.astype(np.uint8) * 255).convert(mode).save(path)
    mask = load(load_mask(), path, "label")
    np.testing.assert_array_equal(mask, inside[None])


def test_grey_levels_are_cut_at_127(tmp_path):
    levels = np.array([[0, 1, 126, 127], [128, 129, 254, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "mask.png")
    assert load(load_mask(), tmp_path / "mask.png", "label")[0].tolist() == [[0] * 4, [1] * 4]


def test_the_ringing_of_a_jpeg_mask_is_no_foreground(tmp_path):
    y, x = np.mgrid[:64, :96]
    inside = (y - 30) ** 2 + (x - 50) ** 2 < 15**2
    Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=75)
    stored = np.asarray(Image.open(tmp_path / "mask.jpg"))
    assert (stored > 0).sum() > 1.1 * inside.sum()  # what a cut at > 0 would give
    mask = load(load_mask(), tmp_path / "mask.jpg", "label")[0] > 0
    assert abs(int(mask.sum()) - int(inside.sum())) <= 0.01 * inside.sum()


def test_a_missing_label_is_left_out(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "photo.png")
    assert set(load_mask()({"image": str(tmp_path / "photo.png")})) == {"image"}


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
def test_volumes_that_cannot_be_resampled_are_refused(tmp_path, value):
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    voxels = np.ones((3, 4, 5), np.float32)
    voxels[0, 0, 0] = 7.0 if value is None else value
    volume = nibabel.Nifti1Image(voxels, affine)
    nibabel.save(volume, tmp_path / "v.nii")
    if value is None:
        assert load_volume("image")({"image": str(tmp_path / "v.nii")})["image"].shape == (1, 3, 4, 5)
        header = volume.header.copy()
        header["srow_y"] = header["srow_x"] * 0.5
        header["sform_code"], header["qform_code"] = 1, 0
        content = (tmp_path / "v.nii").read_bytes()
        (tmp_path / "v.nii").write_bytes(header.binaryblock + content[len(header.binaryblock) :])
    expected = "singular affine" if value is None else "not finite"
    with pytest.raises(ValueError, match=rf"v\.nii (has|holds) .*{expected}"):
        load_volume("image")({"image": str(tmp_path / "v.nii")})


def test_ct_is_windowed_once():
    hu = MetaTensor(torch.tensor([[[[-2000.0, -1250.0, -500.0, 250.0, 3000.0]]]]))
    assert CtWindowd("image")({"image": hu})["image"].flatten().tolist() == [0, 0, 0.5, 1, 1]
    windowed = MetaTensor(torch.tensor([[[[0.0, 51.0, 255.0]]]]), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    result = CtWindowd("image")({"image": windowed, "id": "a"})
    assert result["image"].flatten().tolist() == pytest.approx([0, 0.2, 1]) and result["id"] == "a"
    assert torch.equal(result["image"].affine, windowed.affine)
    shares = MetaTensor(torch.tensor([[[[0.0, 0.2, 1.0]]]]))
    assert CtWindowd("image")({"image": shares})["image"].flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_a_ct_of_another_scale_is_named_unless_its_scale_is_given():
    shifted = MetaTensor(torch.tensor([[[[0.0, 250.0, 1024.0]]]]), meta={"filename_or_obj": "in/a.nii.gz"})
    with pytest.raises(ValueError, match=r"in/a\.nii\.gz: .*1024"):
        CtWindowd("image")({"image": shifted})
    result = CtWindowd("image", values="hu")({"image": shifted})["image"]
    assert result.flatten().tolist() == pytest.approx([1250 / 1500, 1, 1])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_each_slice_gets_its_neighbours(depth):
    volume = torch.arange(depth).view(1, depth, 1, 1).expand(1, depth, 3, 4).float()
    stacked = NeighbourSlicesd("image")({"image": volume})["image"]
    assert stacked.shape == (3, depth, 3, 4)
    at = np.arange(depth)
    expected = [np.maximum(at - 1, 0), at, np.minimum(at + 1, depth - 1)]
    np.testing.assert_array_equal(np.asarray(stacked)[:, :, 0, 0], expected)


def test_neighbours_keep_the_meta_data_and_agree_with_the_decoded_dataset(tmp_path):
    from toy_images import volume_chain, write_volume

    from amkd_monai.data.decoded import DecodedDataset

    affine = torch.diag(torch.tensor([2.0, 1.5, 1.0, 1.0]))
    volume = MetaTensor(torch.rand(1, 4, 3, 5), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    stacked = NeighbourSlicesd("image")({"image": volume, "other": 1})
    assert torch.equal(stacked["image"].affine, volume.affine) and stacked["other"] == 1
    assert stacked["image"].meta["filename_or_obj"] == "a.nii.gz"

    item = write_volume(tmp_path, "v")
    chain = volume_chain()
    decoded = DecodedDataset([item], chain, tmp_path / "cache")
    stacked = NeighbourSlicesd("image")(chain(item))["image"]
    for d in range(4):
        np.testing.assert_allclose(decoded.image(d) / 255, np.asarray(stacked)[:, d], atol=1 / 255)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_written_png_has_the_size_and_content_of_the_input(tmp_path, classes):
    Image.fromarray(np.stack([ramp()] * 3, -1)).save(tmp_path / "in.png")
    inside = np.zeros(SIZE, np.uint8)
    inside[0, 6:] = 1
    inside[2, 3:] = classes - 1
    image = load_rgb()({"image": str(tmp_path / "in.png")})["image"]
    prediction = MetaTensor(torch.from_numpy(inside)[None], meta=image.meta)
    SaveMaskd("pred", tmp_path / "out", classes=classes)({"pred": prediction, "image": image})
    (file,) = (tmp_path / "out").iterdir()
    written = Image.open(file)
    assert file.name == "in_mask.png" and written.size == (9, 5)
    np.testing.assert_array_equal(np.asarray(written.convert("L")), inside * 255 if classes == 2 else inside)
    np.testing.assert_array_equal(load(load_mask(classes=classes), file, "label")[0], inside)


def test_a_written_volume_has_the_grid_and_content_of_the_input(tmp_path):
    affine = np.array([[0, 0, -2.0, 5], [1.5, 0, 0, 6], [0, -1.0, 0, 7], [0, 0, 0, 1]])
    voxels = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "in.nii.gz")
    image = load_volume("image")({"image": str(tmp_path / "in.nii.gz")})["image"]
    inside = torch.from_numpy(voxels > 40)[None].float()
    SaveMaskd("pred", tmp_path / "out")({"pred": inside, "image": image, "id": "a"})
    (file,) = (tmp_path / "out").iterdir()
    written = nibabel.load(file)
    assert file.name == "a_mask.nii.gz"
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(written.dataobj), voxels > 40)


def test_a_label_of_another_order_is_turned_onto_its_image(tmp_path):
    voxels = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    image = nibabel.Nifti1Image(voxels, np.diag([1.0, 1.5, 2.0, 1.0]))
    nibabel.save(image, tmp_path / "in.nii.gz")
    mask = nibabel.Nifti1Image((voxels > 40).astype(np.uint8), image.affine)
    turned = mask.as_reoriented([[1, -1], [2, 1], [0, -1]])
    assert turned.shape != mask.shape
    nibabel.save(turned, tmp_path / "label.nii.gz")
    item = {"image": str(tmp_path / "in.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    data = load_volume(["label", "image"])(item)
    np.testing.assert_array_equal(np.asarray(data["label"])[0], voxels > 40)
    np.testing.assert_array_equal(np.asarray(data["image"])[0], voxels)
    np.testing.assert_allclose(np.asarray(data["label"].affine), image.affine)
    away = nibabel.Nifti1Image((voxels > 40).astype(np.uint8), np.diag([1.0, 1.5, 2.5, 1.0]))
    nibabel.save(away, tmp_path / "label.nii.gz")
    with pytest.raises(ValueError, match=r"label\.nii\.gz cannot be used.*2\.5 mm"):
        load_volume(["image", "label"])(item)


def test_a_volume_that_does_not_say_where_its_axes_point_is_refused(tmp_path):
    volume = nibabel.Nifti1Image(np.ones((3, 4, 5), np.float32), None)
    assert not int(volume.header["sform_code"]) and not int(volume.header["qform_code"])
    nibabel.save(volume, tmp_path / "v.nii.gz")
    with pytest.raises(ValueError, match=r"v\.nii\.gz .*sform and qform"):
        load_volume("image")({"image": str(tmp_path / "v.nii.gz")})
