import pytest
import torch

from amkd_monai.networks import ClassStudent, Student


def image(height=64, width=96, batch=2, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student():
    network = ClassStudent(num_classes=5).eval()
    network.temperature.fill_(2.0)
    network.offsets.copy_(torch.arange(5) / 5)
    return network


def test_it_is_light_and_shares_the_encoder_of_the_student_for_masks():
    network = ClassStudent(num_classes=3)
    assert 2.5e6 < sum(p.numel() for p in network.parameters()) < 4e6
    other = Student()
    assert network.strides == other.strides and network.channels_at(16) == other.channels_at(16)
    network.eval()
    other.eval()
    assert all(torch.equal(a, b) for a, b in zip(network.encode(image()), other.encode(image()), strict=True))


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 160)])
def test_it_gives_one_answer_per_image_of_any_size(student, size):
    logits = student(image(*size))
    assert logits.shape == (2, 5) and torch.isfinite(logits).all()


def test_the_calibration_changes_the_answer_but_not_what_is_trained(student):
    levels = student.encode(image())
    torch.testing.assert_close((student(image()) - torch.arange(5) / 5) * 2, student.decode(levels, [64, 96]))
    assert float(student.state_dict()["temperature"]) == 2.0
    assert not {"temperature", "offsets"} & dict(student.named_parameters()).keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_and_exported_it_gives_the_same_calibrated_logits(student):
    torch.testing.assert_close(torch.jit.script(student)(image(65, 97)), student(image(65, 97)))
    program = torch.export.export(student, (image(),))
    torch.testing.assert_close(program.module()(image(seed=1)), student(image(seed=1)))


def test_dropout_and_seed_take_effect():
    network = ClassStudent(dropout=0.5, weights="random").train()
    levels = [torch.ones(2, c, 2, 2) for c in network.encoder_channels]
    assert not torch.equal(network.decode(levels, [8, 8]), network.decode(levels, [8, 8]))
    heads = [ClassStudent(weights="random", seed=s).head.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
