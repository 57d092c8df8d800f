import math

import numpy as np
import pytest
import torch

from amkd_monai.data.sampling import Augmentation, warp
from amkd_monai.engines.trainer import Recipe

ALL = Augmentation(
    rotation=0.6, scale=0.25, shift=0.1, flip_height=True, flip_width=True, gain=0.3, offset=0.2, colour=0.2
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(size, centre, radius):
    y, x = np.mgrid[: size[0], : size[1]]
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
    return torch.from_numpy(inside).float()[None, None]


def moments(mask):
    """Centre (row, column) and standard deviations along the main axes, in pixels."""
    points = np.argwhere(mask[0, 0].numpy() > 0.5).astype(float)
    return points.mean(0), np.sqrt(np.linalg.eigvalsh(np.cov(points.T)))


def test_changes_that_cannot_be_meant_are_refused_by_name_when_the_recipe_is_read():
    for name in ("rotation", "scale", "shift", "gain", "offset", "colour", "gamma", "flip_width"):
        for value in (-0.1, math.nan, math.inf, "no", [0.1], *([] if name == "flip_width" else [True])):
            with pytest.raises(ValueError, match=f"^recipe#augmentation#{name} is "):
                Recipe(augmentation={name: value})
    with pytest.raises(ValueError, match="rotatoin"):
        Recipe(augmentation={"rotatoin": 0.1})
    with pytest.raises(ValueError, match=r"recipe#augmentation.*together"):
        Recipe(slices=4, augmentation={"together": 2})  # it follows from the slices of a patch


def test_words_of_switches_are_understood_and_others_refused():
    for word, meant in {"false": False, "True": True, False: False, 1: True}.items():
        assert Recipe(batch_dice=word).batch_dice is meant
        assert Recipe(augmentation={"flip_width": word}).augment().flip_width is meant
    with pytest.raises(ValueError, match="recipe#batch_dice"):
        Recipe(batch_dice="pooled")
    with pytest.raises(ValueError, match="recipe#class_balance is 2"):
        Recipe(class_balance=2)


def test_stored_parameters_replay_exactly(tmp_path):
    image = torch.rand((4, 3, 20, 30), generator=generator())
    theta = ALL.sample(4, (20, 30), generator(3))
    torch.save(theta, tmp_path / "theta.pt")
    replayed = torch.load(tmp_path / "theta.pt", weights_only=True)
    assert torch.equal(warp(image, theta), warp(image, replayed))
    assert torch.equal(theta, ALL.sample(4, (20, 30), generator(3)))
    assert not torch.equal(theta, ALL.sample(4, (20, 30), generator(4)))
    torch.testing.assert_close(theta, torch.tensor(theta.numpy().astype("float64")).float(), rtol=0, atol=0)


def test_sampling_leaves_the_global_state_alone_and_differs_by_sample():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    theta = ALL.sample(6, (20, 30), generator())
    ALL.photometric(torch.rand(6, 3, 4, 4, generator=generator()), generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(t.flatten().tolist()) for t in theta}) == 6


def test_no_augmentation_changes_nothing():
    image = torch.rand((2, 3, 17, 31), generator=generator())
    theta = Augmentation().sample(2, (17, 31), generator())
    torch.testing.assert_close(warp(image, theta), image, atol=1e-5, rtol=0)
    assert torch.equal(warp(image, theta, mode="nearest"), image)
    assert torch.equal(Augmentation().photometric(image, generator()), image)


@pytest.mark.parametrize("size", [(60, 140), (140, 60), (80, 80)])
def test_rotation_is_rigid_on_images_of_any_shape(size):
    centre, radius = (size[0] / 2 - 8, size[1] / 2 + 6), 12
    mask, middle = disc(size, centre, radius), np.array([size[0] - 1, size[1] - 1]) / 2
    for seed in range(1, 7):
        theta = Augmentation(rotation=math.pi / 2).sample(1, size, generator(seed))
        moved, spread = moments(warp(mask, theta) * disc(size, middle, 28))  # without what the border mirrors
        np.testing.assert_allclose(spread, radius / 2, rtol=0.05)  # a disc stays a disc of its size
        distance = np.hypot(*(moved - middle))
        assert distance == pytest.approx(np.hypot(*(np.array(centre) - middle)), abs=0.5)
        assert np.abs(moved - np.array(centre)).max() > 0.2


def test_the_angle_is_the_one_drawn():
    size = (60, 140)
    theta = Augmentation(rotation=1.0).sample(1, size, generator(1))
    angle = math.atan2(float(theta[0, 1, 0]) * size[0] / size[1], float(theta[0, 0, 0]))
    assert 0.05 < abs(angle) <= 1.0
    before, after = np.array([0.0, 20.0]), moments(warp(disc(size, (29.5, 89.5), 6), theta))[0] - [29.5, 69.5]
    turned = math.atan2(after[0], after[1]) - math.atan2(before[0], before[1])
    assert abs(turned) == pytest.approx(abs(angle), abs=0.03)


def test_zoom_and_shift_have_their_units():
    size = (100, 200)
    zooms, shifts = [], []
    for seed in range(30):
        _, spread = moments(
            warp(disc(size, (49.5, 99.5), 20), Augmentation(scale=0.25).sample(1, size, generator(seed)))
        )
        zooms.append(spread.mean() / 10)
        centre, _ = moments(
            warp(disc(size, (49.5, 99.5), 20), Augmentation(shift=0.1).sample(1, size, generator(seed)))
        )
        shifts.append((centre - [49.5, 99.5]) / size)
    assert 1 / 1.27 < min(zooms) < 0.9 and 1.1 < max(zooms) < 1.27
    assert np.abs(shifts).max() < 0.105 and np.abs(shifts).max(0).min() > 0.05


@pytest.mark.parametrize(("option", "axis"), [("flip_height", -2), ("flip_width", -1)])
def test_flips_are_exact_and_happen_half_of_the_time(option, axis):
    image = torch.rand((64, 2, 9, 13), generator=generator())
    warped = warp(image, Augmentation(**{option: True}).sample(64, (9, 13), generator()))
    flipped = 0
    for before, after in zip(image, warped, strict=True):
        is_flip = torch.allclose(after, before.flip(axis), atol=1e-5)
        assert is_flip or torch.allclose(after, before, atol=1e-5)
        flipped += is_flip
    assert 20 <= flipped <= 44


def test_image_and_label_stay_aligned():
    size = (64, 96)
    label = (torch.rand((8, 1, 8, 12), generator=generator()) > 0.5).float()
    label = label.repeat_interleave(8, 2).repeat_interleave(8, 3)
    theta = ALL.sample(8, size, generator(5))
    image, moved = warp(label.expand(-1, 3, -1, -1), theta), warp(label, theta, mode="nearest")
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert ((image[:, :1] > 0.5) == (moved > 0.5)).float().mean() > 0.99


def test_maps_of_a_coarser_grid_move_with_the_image():
    fine = torch.nn.functional.interpolate(torch.rand((4, 1, 4, 6), generator=generator()), (64, 96), mode="bicubic")
    coarse = torch.nn.functional.adaptive_avg_pool2d(fine, (16, 24))
    theta = ALL.sample(4, (64, 96), generator(2))
    expected = torch.nn.functional.adaptive_avg_pool2d(warp(fine, theta), (16, 24))
    warped_error = (warp(coarse, theta) - expected).abs().mean()
    assert warped_error < 0.1 * (coarse - expected).abs().mean()


def test_beyond_the_border_the_image_is_mirrored():
    image = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    theta = torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0]]])  # by a quarter of the width
    assert warp(image, theta)[0, 0, 4].tolist() == pytest.approx([2, 3, 4, 5, 6, 7, 7, 6])


def test_photometric_changes_stay_in_range_differ_by_image_and_keep_the_input():
    image = torch.rand((16, 3, 8, 8), generator=generator())
    before = image.clone()
    changed = Augmentation(gain=0.9, offset=0.9, colour=0.9).photometric(image, generator(1))
    assert torch.equal(image, before)
    assert changed.min() >= 0 and changed.max() <= 1 and changed.shape == image.shape
    assert (changed - image).abs().flatten(1).max(1).values.min() > 0.01
    mild = Augmentation(gain=0.2, offset=0.1, colour=0.1)
    assert torch.equal(mild.photometric(image, generator(2)), mild.photometric(image, generator(2)))
    assert (mild.photometric(image, generator(2)) - image).abs().max() <= 0.2 + 0.1 + 0.1 + 1e-6


def test_geometry_options_leave_intensities_and_photometric_options_leave_geometry_alone():
    image = torch.rand((4, 3, 8, 8), generator=generator())
    geometric = Augmentation(rotation=1, scale=0.5, shift=0.3, flip_width=True)
    assert torch.equal(geometric.photometric(image, generator()), image)
    theta = Augmentation(gain=0.5, offset=0.5, colour=0.5).sample(4, (8, 8), generator())
    torch.testing.assert_close(theta, torch.eye(2, 3).expand(4, 2, 3))


def test_an_answer_for_the_whole_image_is_not_moved():
    theta = Augmentation(rotation=1.0, scale=0.3, shift=0.4, flip_width=True).sample(3, (8, 12), generator())
    answer = torch.randn(3, 5, 1, 1)
    assert torch.equal(warp(answer, theta), answer)
