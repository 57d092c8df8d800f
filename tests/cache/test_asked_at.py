"""Teachers of a larger input than the student's see the files, in the student's frame."""

import sys
from pathlib import Path

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
    Spacingd,
    SpatialPadd,
)
from PIL import Image
from torch import nn
from toy_dataset import chain as unresized_chain
from toy_dataset import write_items

from amkd_monai.cache.build import ask, cache_teacher, shown_to, view_matrix, view_set
from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.frames import FinerImages
from amkd_monai.data.sampling import warp
from amkd_monai.data.transforms import load_mask, load_rgb, load_volume
from amkd_monai.teachers.base import Teacher, TeacherFeatures, resize

sys.path.append(str(Path(__file__).parent.parent / "teachers"))
from tiny_teachers import TINY, tiny

SIZE = (28, 36)
KEYS = ["image", "label"]
SQUARE = (slice(24, 40), slice(110, 134))  # of a picture of 112 x 180: neither in the middle nor symmetric


class Strided(Teacher):
    """A grid of local means of squared contrast: it sees what a small image has lost."""

    settings = ("image_size",)

    def __init__(self, name="strided", image_size=112):
        super().__init__(name)
        self.image_size, self.network, self.shown = image_size, nn.Identity(), []

    def forward(self, image):
        self.shown.append(tuple(image.shape[-2:]))
        pixels = resize(image, self.image_size)
        contrast = (pixels - nn.functional.avg_pool2d(pixels, 3, 1, 1)) ** 2
        grid = nn.functional.adaptive_avg_pool2d(contrast, 8)
        return TeacherFeatures(grid, grid.mean((2, 3)))


def picture_chain():
    shrink = Resized("image", SIZE, mode="bilinear", anti_aliasing=True)
    nearest = Resized("label", SIZE, mode="nearest", allow_missing_keys=True)
    to_unit = ScaleIntensityRanged("image", 0.0, 255.0, 0.0, 1.0, clip=True)
    return Compose([load_rgb("image"), load_mask("label"), to_unit, shrink, nearest])


def volume_chain():
    return Compose(
        [
            load_volume(KEYS),
            Orientationd(KEYS, axcodes="RAS", labels=None, allow_missing_keys=True),
            ScaleIntensityRanged("image", 0.0, 1000.0, 0.0, 1.0, clip=True),
            Spacingd(KEYS, pixdim=[2.0, 2.0, 1.6], mode=["bilinear", "nearest"], allow_missing_keys=True),
            CenterSpatialCropd(KEYS, [-1, *SIZE], allow_missing_keys=True),
            SpatialPadd(KEYS, [-1, *SIZE], allow_missing_keys=True),
        ]
    )


def write_pictures(folder, contents, mask):
    for name, pixels in contents.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / "mask.png")
    item = {"label": str(folder / "mask.png")}
    return [{**item, "image": str(folder / f"{name}.png"), "id": name, "group": name} for name in contents]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The same wide noisy picture with and without a bright square, whose mask both have."""
    folder = tmp_path_factory.mktemp("pictures")
    plain = np.random.default_rng(0).integers(60, 140, (112, 180, 3), np.uint8)
    plain[50:60, 60:70], plain[50:60, 70:80] = 0, 255  # some teachers take the range of an image
    planted, mask = plain.copy(), np.zeros(plain.shape[:2], np.uint8)
    planted[SQUARE], mask[SQUARE] = 250, 255
    items = write_pictures(folder, {"plain": plain, "planted": planted}, mask)
    return DecodedDataset(items, picture_chain(), folder / "cache")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """The same for volumes, anisotropic and in another order of axes; the block is in slices 5 to 8 of 14."""
    folder, items = tmp_path_factory.mktemp("volumes"), []
    plain = np.random.default_rng(0).integers(200, 500, (70, 64, 14)).astype(np.float32)
    plain[30:36, 20:26], plain[30:36, 26:32] = 0, 1000
    label = np.zeros(plain.shape, np.uint8)
    label[14:26, 40:54, 5:9] = 1
    affine = np.array([[0, 0, 2.0, 5], [-0.8, 0, 0, 1], [0, 0.8, 0, 2], [0, 0, 0, 1]])
    for name, values in (("plain", plain), ("planted", np.where(label, 990, plain).astype(np.float32))):
        paths = {key: str(folder / f"{name}_{key}.nii.gz") for key in KEYS}
        nibabel.save(nibabel.Nifti1Image(values, affine), paths["image"])
        nibabel.save(nibabel.Nifti1Image(label, affine), paths["label"])
        items.append({**paths, "id": name, "group": name})
    return DecodedDataset(items, volume_chain(), folder / "cache")


class Outlining(Strided):
    """Answers with a mask of what is bright."""

    def forward(self, image):
        return TeacherFeatures(logits=resize(image, self.image_size).mean(1, keepdim=True))


def off_by(change, mask):
    """Cells (2,) from the centre of a mask (H, W) to that of the cells (h, w) that change most."""
    strongest = np.where(change >= 0.6 * change.max(), change, 0)
    found, wanted = (
        np.array([(np.average(n, weights=w) + 0.5) / n.shape[axis] for axis, n in enumerate(np.indices(w.shape))])
        for w in (strongest, mask)
    )
    return (found - wanted) * change.shape


@pytest.mark.parametrize("which", [*TINY, "outlining"])
@pytest.mark.parametrize("of", ["picture", "slice", "view"])
def test_a_planted_square_is_where_the_students_mask_is(pictures, volumes, which, of):
    options = {"framing": "squash"} if which == "retfound_dinov2" else {}
    teacher, matrices = Outlining() if which == "outlining" else tiny(which, **options), None
    dataset, plain, planted = pictures, 0, 1
    if of == "slice":
        plain = int(np.argmax(volumes.labels[: len(volumes) // 2].sum((1, 2, 3))))
        dataset, planted = volumes, plain + len(volumes) // 2
    mask = torch.from_numpy(np.array(dataset.labels[planted]))[None].float()
    if of == "view":
        matrices = np.stack([view_matrix(view_set(4)[2], "planted", "0", SIZE)] * 2)
        mask = warp(mask, torch.from_numpy(matrices[:1]), mode="nearest")
    finer, about = shown_to(teacher.facts(), dataset)
    assert finer is not None and about["images"] == "files"
    said = ask(teacher, dataset, [plain, planted], "cpu", matrices, finer.image)
    of_both = said["logits" if which == "outlining" else "grid"]
    off = off_by(np.abs(of_both[1] - of_both[0]).mean(0), mask[0, 0].numpy())
    assert (np.abs(off) <= (2.0 if which == "outlining" else 1.0)).all()  # 112 cells a side, or 4


@pytest.mark.parametrize("of", ["pictures", "volumes"])
def test_finer_images_are_the_students_in_more_samples(pictures, volumes, of):
    dataset = {"pictures": pictures, "volumes": volumes}[of]
    finer = FinerImages(dataset, 56)
    indices = [0, 1] if of == "pictures" else [0, 5, 13, len(dataset) - 1]
    for index in indices:
        image = finer.image(index)
        assert image.dtype == np.uint8 and image.shape == (3, 56, 72) == (3, *finer.size)
        small = nn.functional.avg_pool2d(torch.from_numpy(image).float(), 2).numpy()
        for channel, neighbour in enumerate(dataset.image(index)):  # previous slice, slice, next slice
            cut = (slice(3, -3), slice(3, -3))
            assert np.corrcoef(small[channel][cut].ravel(), neighbour[cut].ravel())[0, 1] > 0.7


def test_a_detail_that_the_student_cannot_see_reaches_the_teacher(tmp_path):
    grey = np.full((112, 180, 3), 128, np.uint8)
    grey[:8] = np.linspace(0, 255, 180).astype(np.uint8)[:, None]  # levels enough to be a picture
    fine = grey.copy()
    fine[40:88, 100:148] = np.where(np.arange(48) % 2, 255, 1).astype(np.uint8)[:, None, None]
    items = write_pictures(tmp_path, {"grey": grey, "striped": fine}, np.zeros((112, 180), np.uint8))
    dataset = DecodedDataset(items, picture_chain(), tmp_path)
    assert np.abs(dataset.image(1).astype(int) - dataset.image(0))[:, 11:21, 21:29].max() <= 3
    teacher = Strided()
    seen = cache_teacher(teacher, dataset, tmp_path).read("grid", [0, 1]).astype(float)
    assert set(teacher.shown) == {(112, 144)}
    lost = ask(teacher, dataset, [0, 1], "cpu")["grid"]
    assert np.abs(seen[1] - seen[0]).max() > 0.05 > 20 * np.abs(lost[1] - lost[0]).max()


def test_images_are_no_larger_than_their_files_and_may_differ_in_size(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"small": (20, 30), "middle": (40, 50), "large": (300, 400)}
    pixels = {name: rng.integers(0, 255, (*size, 3), np.uint8) for name, size in sizes.items()}
    for name, size in sizes.items():
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / f"{name}_mask.png")
    items = write_pictures(tmp_path, pixels, np.zeros((5, 5), np.uint8))
    items = [{**item, "label": str(tmp_path / f"{item['id']}_mask.png")} for item in items]
    dataset, teacher = DecodedDataset(items, picture_chain(), tmp_path), Strided()
    store = cache_teacher(teacher, dataset, tmp_path, batch_size=3)
    assert set(teacher.shown) == {(28, 36), (40, 51), (112, 144)}
    finer = FinerImages(dataset, 112)
    assert np.array_equal(finer.image(0), dataset.image(0))
    for index in range(3):
        alone = ask(teacher, dataset, [index], "cpu", image=finer.image)["grid"]
        np.testing.assert_allclose(store.read("grid", [index]), alone, atol=1e-3)


def test_the_asked_size_is_in_the_key_and_small_teachers_keep_theirs(pictures, tmp_path):
    stores = [cache_teacher(Strided(image_size=n), pictures, tmp_path, views=2) for n in (16, 28, 40)]
    assert [store.key.get("asked_at") for store in stores] == [None, None, {"images": "files", "size": [40, 51]}]
    again = Strided(image_size=40)
    assert cache_teacher(again, pictures, tmp_path, views=2).directory == stores[2].directory and not again.shown


def test_a_chain_that_is_not_understood_is_said(tmp_path, caplog):
    dataset = DecodedDataset(write_items(tmp_path / "in", 3), unresized_chain(), tmp_path)
    teacher = Strided(image_size=64)
    cache_teacher(teacher, dataset, tmp_path)
    assert set(teacher.shown) == {(16, 16)} and "16 x 16 of 64 pixels" in caplog.text
    assert "sampling" in shown_to(teacher.facts(), dataset)[1]["because"]


def test_a_file_that_changes_after_decoding_is_refused(tmp_path):
    folder, rng = tmp_path, np.random.default_rng(0)
    items = write_pictures(
        folder, {"one": rng.integers(0, 255, (112, 180, 3), np.uint8)}, np.zeros((112, 180), np.uint8)
    )
    dataset = DecodedDataset(items, picture_chain(), folder)
    Image.fromarray(rng.integers(0, 255, (112, 180, 3), np.uint8)).save(items[0]["image"])
    with pytest.raises(ValueError, match=r"one\.png"):
        cache_teacher(Strided(), dataset, folder)


def test_boxes_of_labels_lie_on_finer_images(pictures):
    teacher = tiny("medsam", prompt="label_box")
    label = torch.from_numpy(np.array(pictures.labels[1]))[None]
    own, finer = (teacher.boxes(torch.zeros(1, 3, *size), label) for size in (SIZE, (64, 82)))
    torch.testing.assert_close(own, finer)
    said = ask(teacher, pictures, [1], "cpu", image=FinerImages(pictures, 64).image)
    assert said["logits"].shape == (1, 2, 16, 16)
