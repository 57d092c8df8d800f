import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amkd_monai.distillation import losses
from amkd_monai.distillation.interface import Faults

SHAPE = (3, 4, 5, 7)


def tensor(seed=0, shape=SHAPE, scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(x, axis=1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_output_loss_is_t_squared_times_kl(temperature):
    student, teacher = tensor(0), tensor(1)
    p = softmax(teacher.double().numpy() / temperature)
    q = softmax(student.double().numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1)
    np.testing.assert_allclose(
        losses.output_loss(student, teacher, temperature).numpy(), expected, rtol=1e-4, atol=1e-5
    )


def test_the_overlap_loss_is_one_minus_the_dice_of_probabilities_over_the_foreground():
    student, teacher = tensor(0), tensor(1)
    p, q = (softmax(x.double().numpy())[:, 1:] for x in (teacher, student))
    both, squares = (p * q).sum((2, 3)), (p**2).sum((2, 3)) + (q**2).sum((2, 3))
    expected = (1 - (2 * both + 0.1) / (squares + 0.1)).mean(1)
    np.testing.assert_allclose(losses.overlap_loss(student, teacher, 2.0)[:, 0, 0].numpy(), expected, rtol=1e-4)
    sure = torch.full((1, 2, 16, 16), -9.0)
    sure[:, 0] = 9.0
    small = sure.clone()
    small[..., 3:5, 3:5] = sure[..., 3:5, 3:5].flip(1)
    assert losses.overlap_loss(sure, small, 2.0) > 0.95, "a missed target of 4 in 256 cells costs all of the loss"
    assert losses.overlap_loss(sure, sure, 2.0) < 1e-4, "images without foreground agree"


@pytest.mark.parametrize("loss", [losses.output_loss, losses.overlap_loss])
def test_losses_of_answers_are_zero_for_equal_ones_positive_otherwise_and_finite_for_constant_ones(loss):
    a, b = tensor(0), tensor(1)
    assert loss(a, a, 2.0).abs().max() < 1e-5 and (loss(a, b, 2.0) >= 0).all() and loss(a, b, 2.0).mean() > 0.1
    flat = torch.zeros(SHAPE, requires_grad=True)
    loss(flat, b, 2.0).sum().backward()
    assert torch.isfinite(flat.grad).all()
    together = loss(a, torch.stack([b, a]), 2.0)
    torch.testing.assert_close(together[0], loss(a, b, 2.0))


def test_teachers_of_one_grid_are_compared_together():
    student, teachers = tensor(0), tensor(1, (2, *SHAPE))
    together = losses.output_loss(student, teachers, 2.0)
    for one, teacher in zip(together, teachers, strict=True):
        torch.testing.assert_close(one, losses.output_loss(student, teacher, 2.0))
    a, b, c = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 1, 1)
    groups = losses.by_size({"a": a, "c": c, "b": b})
    assert [(size, list(group)) for size, group in groups.items()] == [((3, 4), ["a", "b"]), ((1, 1), ["c"])]
    assert groups[3, 4]["b"] is b


def test_the_output_loss_is_zero_for_equal_answers_positive_otherwise_and_not_symmetric():
    a, b = tensor(0), tensor(1)
    assert losses.output_loss(a, a, 2.0).abs().max() < 1e-5
    assert losses.output_loss(a, a + 5.0, 2.0).abs().max() < 1e-4  # logits are known up to a constant
    assert (losses.output_loss(a, b, 2.0) > 0).all()
    assert not torch.allclose(losses.output_loss(a, b, 2.0), losses.output_loss(b, a, 2.0), rtol=0.05)


def test_the_feature_loss_is_half_cosine_half_smooth_l1():
    a, t = tensor(0), tensor(1)
    x, y = a.double().numpy(), t.double().numpy()
    cosine = 1 - (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    difference = np.abs(x - y)
    smooth = np.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean(1)
    np.testing.assert_allclose(losses.feature_loss(a, t).numpy(), 0.5 * cosine + 0.5 * smooth, rtol=1e-4, atol=1e-5)


def test_the_feature_loss_is_zero_for_equal_features_and_positive_otherwise():
    assert losses.feature_loss(tensor(0), tensor(0)).abs().max() < 1e-5
    assert (losses.feature_loss(tensor(0), tensor(1)) > 0).all()
    assert (losses.feature_loss(tensor(0), 2 * tensor(0)) > 0.01).all()  # direction alone is not enough


def test_features_that_are_all_zero_have_finite_gradients():
    a = torch.zeros(SHAPE, requires_grad=True)
    losses.feature_loss(a, tensor(1)).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().sum() > 0


def test_the_task_loss_is_soft_dice_plus_cross_entropy():
    logits = tensor(0, (3, 3, 9, 11))
    label = torch.randint(0, 3, (3, 1, 9, 11), generator=torch.Generator().manual_seed(1))
    p, y = softmax(logits.double().numpy()), label[:, 0].numpy()
    expected = []
    for i in range(3):
        dice = []
        for c in (1, 2):
            true = y[i] == c
            dice.append(1 - (2 * (p[i, c] * true).sum() + 1) / (p[i, c].sum() + true.sum() + 1))
        entropy = -np.log(np.take_along_axis(p[i], y[i][None], 0)).mean()
        expected.append(np.mean(dice) + entropy)
    np.testing.assert_allclose(losses.segmentation_task_loss(logits, label).numpy(), expected, rtol=1e-4)


def test_the_task_loss_is_near_zero_for_right_answers_and_large_for_wrong_ones():
    label = torch.zeros(2, 1, 16, 16, dtype=torch.long)
    label[0, :, 4:9, 4:9] = 1
    sure = torch.nn.functional.one_hot(label[:, 0], 2).permute(0, 3, 1, 2) * 40.0
    assert losses.segmentation_task_loss(sure, label).max() < 1e-3  # with and without foreground
    assert losses.segmentation_task_loss(-sure, label).min() > 10


@pytest.mark.parametrize("value", [2, 254, -1])
def test_a_label_out_of_range_is_named(value):
    label = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    label[1, 0, 3, 3] = value
    with pytest.raises(ValueError) as error:
        faults = Faults()
        losses.note_classes(faults, torch.zeros_like(label), 2)
        faults.read()
        losses.note_classes(faults, label, 2)
        losses.note_classes(faults, torch.zeros_like(label), 2)  # a later step without a fault hides none
        faults.read()
    faults.read()  # raised once
    text = str(error.value)
    assert str(value) in text and "0 to 1" in text and "\n" not in text and text.endswith(".")


def test_area_targets_are_fractions():
    label = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    label[0, 0, :2, 0] = 1
    label[0, 0, 2:, 2:] = 2
    fractions = losses.one_hot_area(label, 3, (2, 2))
    expected = torch.tensor([[[0.5, 1], [1, 0]], [[0.5, 0], [0, 0]], [[0, 0], [0, 1.0]]])
    assert torch.equal(fractions[0], expected)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_class_that_does_not_exist_has_no_area(wrong):
    with pytest.raises(ValueError, match=f"holds the class {wrong}, the student has classes 0 to 2"):
        losses.one_hot_area(torch.tensor([[[[0, wrong]]]]), 3, (1, 1))


def test_the_cosine_is_that_of_torch_and_0_for_nothing():
    a, b = tensor(0), tensor(1)
    torch.testing.assert_close(losses.cosine(a, b), torch.cosine_similarity(a, b, dim=1))
    assert torch.equal(losses.cosine(torch.zeros_like(a), b), torch.zeros(a.shape[0], *a.shape[2:]))


def test_soft_cross_entropy_of_hard_targets_is_cross_entropy():
    logits = tensor(0)
    label = torch.randint(0, 4, (3, 1, 5, 7), generator=torch.Generator().manual_seed(1))
    soft = losses.soft_cross_entropy(losses.one_hot_area(label, 4, (5, 7)), logits.log_softmax(1))
    torch.testing.assert_close(soft, torch.nn.functional.cross_entropy(logits, label[:, 0], reduction="none"))


def test_logits_are_area_pooled():
    logits = tensor(0, (2, 2, 6, 8))
    expected = logits.numpy().reshape(2, 2, 3, 2, 4, 2).mean((3, 5))
    np.testing.assert_allclose(losses.area_logits(logits, (3, 4)).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert losses.area_logits(logits, (6, 8)) is logits


@settings(max_examples=25, deadline=None, database=None)
@given(
    batch=st.integers(1, 5),
    classes=st.integers(2, 4),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    fill=st.sampled_from(["background", "foreground", "mixed"]),
    seed=st.integers(0, 1000),
)
def test_all_losses_are_finite_and_shaped(batch, classes, height, width, dtype, fill, seed):
    shape = (batch, classes, height, width)
    a, b = tensor(seed, shape, 20).to(dtype).requires_grad_(), tensor(seed + 1, shape, 20).to(dtype).requires_grad_()
    mixed = torch.randint(0, classes, (batch, 1, height, width), generator=torch.Generator().manual_seed(seed))
    label = {"background": torch.zeros_like(mixed), "foreground": torch.full_like(mixed, classes - 1), "mixed": mixed}[
        fill
    ]
    task = losses.segmentation_task_loss(a, label)
    output, feature = losses.output_loss(a, b, 2.0), losses.feature_loss(a, b)
    assert task.shape == (batch,) and output.shape == feature.shape == (batch, height, width)
    for loss in (task, output, feature):
        assert loss.dtype == torch.float32 and torch.isfinite(loss).all() and (loss >= -1e-5).all()
    (task.sum() + output.sum() + feature.sum()).backward()
    assert torch.isfinite(a.grad).all() and b.grad is None


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("classes", [2, 3])
def test_pixels_without_a_label_count_in_no_loss(batch_dice, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, classes, 8, 12, generator=generator, requires_grad=True)
    label = torch.randint(0, classes, (3, 1, 8, 12), generator=generator)
    part = label.clone()
    part[..., 7:] = losses.UNLABELLED
    found = losses.task_loss(logits, part, batch_dice)
    torch.testing.assert_close(found, losses.task_loss(logits[..., :7], label[..., :7], batch_dice))
    found.sum().backward()
    assert not logits.grad[..., 7:].any() and logits.grad[..., :7].abs().min() > 0
    faults = Faults()
    losses.note_classes(faults, part, classes)
    faults.read()


def test_areas_are_those_of_the_labelled_part_of_a_cell():
    label = torch.zeros(1, 1, 4, 8, dtype=torch.long)
    label[..., :2, :4], label[..., 2:, :2], label[..., 4:] = 1, losses.UNLABELLED, losses.UNLABELLED
    found = losses.one_hot_area(label, 2, (1, 2))[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 0], [2 / 3, 0]]))
