"""The student's frame at finer sampling, against the chains that it is made from."""

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Orientationd,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    SpatialPadd,
)
from PIL import Image

from amkd_monai.data.frames import finer
from amkd_monai.data.transforms import CropFundusd, NeighbourSlicesd, load_mask, load_rgb, load_volume

KEYS = ["image", "label"]
TO_UNIT = ScaleIntensityRanged("image", 0.0, 255.0, 0.0, 1.0, clip=True)


def picture_chain(size, *cut):
    shrink = Resized("image", size, mode="bilinear", anti_aliasing=True)
    nearest = Resized("label", size, mode="nearest", allow_missing_keys=True)
    return Compose([load_rgb("image"), load_mask("label"), *cut, TO_UNIT, shrink, nearest])


def volume_chain(size):
    """Anisotropic spacing in plane and across, then crop and pad: what the bundles of volumes do."""
    return Compose(
        [
            load_volume(KEYS),
            Orientationd(KEYS, axcodes="RAS", labels=None, allow_missing_keys=True),
            ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True),
            Spacingd(KEYS, pixdim=[2.5, 1.25, 1.4], mode=["bilinear", "nearest"], allow_missing_keys=True),
            CenterSpatialCropd(KEYS, [-1, *size], allow_missing_keys=True),
            SpatialPadd(KEYS, [-1, *size], allow_missing_keys=True),
        ]
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A wide noisy picture whose mask is a rectangle, within a dark border."""
    folder = tmp_path_factory.mktemp("picture")
    pixels = np.random.default_rng(0).integers(0, 255, (61, 93, 3), np.uint8)
    pixels[:, :9] = pixels[:, -20:] = 0
    mask = np.zeros((61, 93), np.uint8)
    mask[12:30, 40:58] = 255
    for name, array in (("image", pixels), ("label", mask)):
        Image.fromarray(array).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in KEYS}


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume in another order of axes, with a bright block that is its label."""
    folder = tmp_path_factory.mktemp("volume")
    values = np.random.default_rng(0).random((60, 50, 30), np.float32) * 100
    label = np.zeros(values.shape, np.uint8)
    label[20:34, 22:34, 10:20] = 1
    values += label * np.float32(400)
    affine = np.array([[0, 0, 3.0, 5], [-0.8, 0, 0, 1], [0, 0.7, 0, 2], [0, 0, 0, 1]])
    for name, array in (("image", values), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    return {name: str(folder / f"{name}.nii.gz") for name in KEYS}


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (80, 128)])
def test_at_the_students_size_a_picture_is_what_the_chain_gives(picture, size):
    chain = picture_chain(size, CropFundusd("image"))
    own, same = chain(dict(picture)), finer(chain, size)(dict(picture))
    torch.testing.assert_close(same["image"], own["image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(same["image"].affine, own["image"].affine)


def test_at_the_students_size_a_volume_is_what_the_chain_gives_within_the_file(volume):
    chain = volume_chain((28, 36))
    own, same = chain(dict(volume)), finer(chain, (28, 36))(dict(volume))
    inside = own["image"][..., 3:-3, 6:-6] - same["image"][..., 3:-3, 6:-6]
    assert own["image"].shape == same["image"].shape == (1, 36, 28, 36)
    assert float(inside.abs().max()) < 1e-4
    torch.testing.assert_close(same["image"].affine, own["image"].affine)


def coarse(values, factors):
    """Mean of blocks of a map (H, W)."""
    (height, width), (h, w) = values.shape, factors
    return np.asarray(values, np.float32).reshape(height // h, h, width // w, w).mean((1, 3))


def test_image_and_label_of_a_picture_lie_where_the_students_do(picture):
    chain = picture_chain((32, 32))
    own, fine = chain(dict(picture)), finer(chain, (128, 96))(dict(picture))
    assert fine["image"].shape == (3, 128, 96) and fine["label"].shape == (1, 128, 96)
    assert set(fine["label"].unique().tolist()) == {0.0, 1.0}
    assert np.abs(coarse(fine["label"][0], (4, 3)) - own["label"][0].numpy()).mean() < 0.02
    moved = np.abs(coarse(fine["label"][0], (4, 3)) - np.roll(own["label"][0].numpy(), 1, 0)).mean()
    assert moved > 0.02  # a student's pixel would be seen
    noise = [
        float(image[:, n // 4 : -n // 4, n // 4 : -n // 2].std())
        for image, n in ((fine["image"], 96), (own["image"], 32))
    ]
    assert noise[0] > 1.5 * noise[1]  # which the student cannot see


def test_image_and_label_of_a_volume_lie_where_the_students_do(volume):
    chain = volume_chain((28, 36))
    own, fine = chain(dict(volume)), finer(chain, (84, 72))(dict(volume))
    assert fine["image"].shape == fine["label"].shape == (1, 36, 84, 72)
    student = own["label"][0].numpy()
    middle = int(np.argmax(student.sum((1, 2))))
    block = coarse(fine["label"][0, middle], (3, 2))
    centre = [np.average(n, weights=w) for w in (block, student[middle]) for n in np.indices(w.shape)]
    np.testing.assert_allclose(centre[:2], centre[2:], atol=0.5)
    bright = np.asarray(fine["image"][0, middle]) > 0.5
    assert (bright == np.asarray(fine["label"][0, middle], bool)).mean() > 0.98
    assert float(fine["image"][..., :6].abs().max()) == 0.0  # padding stays 0


def test_a_frame_is_no_finer_than_file_and_student(picture, volume):
    of_picture, of_volume = finer(picture_chain((32, 32)), (512, 512)), finer(volume_chain((28, 36)), (512, 512))
    for chain, item, largest in ((of_picture, picture, (93, 93)), (of_volume, volume, (56, 72))):
        *own, last = chain.transforms
        frame = last.frame(Compose(own)(dict(item)))
        assert frame.within_file((512, 512)) == pytest.approx(largest, abs=1)
        assert frame.within_file((40, 60))[0] == 40  # the frame keeps its proportions


def test_slices_can_be_read_alone(volume):
    chain = finer(volume_chain((28, 36)), (56, 72))
    *own, last = chain.transforms
    data = Compose(own)(dict(volume))
    whole, frame = chain(dict(volume))["image"], last.frame(data).at((56, 72), smooth=False)
    torch.testing.assert_close(frame.read(slices=range(4, 7)).as_tensor(), whole[:, 4:7].as_tensor())


@pytest.mark.parametrize(
    ("chain", "named"),
    [
        (Compose([load_rgb("image"), TO_UNIT, Resized("label", (8, 8))]), "sampling"),
        (Compose([load_rgb("image"), Resized("image", (8, 8)), TO_UNIT]), "ScaleIntensityRanged"),
        (Compose([*volume_chain((8, 8)).transforms, NeighbourSlicesd("image")]), "NeighbourSlicesd"),
        (lambda data: data, "Compose"),
    ],
)
def test_a_chain_that_is_not_understood_is_refused_by_name(chain, named):
    with pytest.raises(ValueError, match=named):
        finer(chain, (16, 16))
