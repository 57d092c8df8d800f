import pytest
import timm
import torch

from amkd_monai.networks import Student
from amkd_monai.weights import CheckpointError, state_hash


@pytest.fixture(scope="module")
def student():
    return Student().eval()


def image(height, width, batch=2, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def test_it_is_light():
    parameters = sum(p.numel() for p in Student(weights="random").parameters())
    assert 2.5e6 < parameters < 4e6


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (96, 50), (33, 160)])
@pytest.mark.parametrize("stride", [2, 4])
def test_logits_have_the_size_of_the_image(height, width, stride):
    network = Student(num_classes=3, stride=stride, weights="random").eval()
    with torch.inference_mode():
        logits = network(image(height, width))
    assert logits.shape == (2, 3, height, width)
    assert torch.isfinite(logits).all()


def test_features_are_listed_by_stride(student):
    with torch.inference_mode():
        features = student.features(image(64, 96))
    assert {s: tuple(f.shape[1:]) for s, f in features.items()} == {
        s: (student.channels_at(s), 64 // s, 96 // s) for s in (4, 8, 16, 32)
    }


def test_a_finer_stride_adds_the_level_of_stride_two():
    fine = Student(stride=2, weights="random")
    assert fine.strides == [2, 4, 8, 16, 32]
    assert Student(weights="random").strides == [4, 8, 16, 32]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_gives_the_same_logits(student, tmp_path):
    scripted = torch.jit.script(student)
    scripted.save(str(tmp_path / "student.ts"))
    loaded = torch.jit.load(str(tmp_path / "student.ts"))
    with torch.inference_mode():
        for x in (image(64, 64), image(65, 97, batch=1)):
            torch.testing.assert_close(loaded(x), student(x))


def test_export_gives_the_same_logits(student):
    x = image(64, 96)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(student, (x,), dynamic_shapes=({0: batch},))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), student(x), rtol=1e-4, atol=1e-5)
        y = image(64, 96, batch=3, seed=1)
        torch.testing.assert_close(program.module()(y), student(y), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    network = Student(weights="random").train()
    network(image(64, 64)).square().mean().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert "encoder.conv_stem.weight" not in dead
    assert not [name for name in dead if not name.endswith("bias")], dead


def test_initial_values_follow_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = state_hash(Student(seed=1).state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert state_hash(Student(seed=1).state_dict()) == first
    assert state_hash(Student(seed=2).state_dict()) != first


def test_packaged_weights_are_those_of_imagenet(student):
    from amkd_monai.networks.student import create_encoder, load_encoder_weights

    whole = create_encoder("tf_efficientnet_lite0")
    load_encoder_weights(whole, "tf_efficientnet_lite0", "packaged")
    torch.testing.assert_close(student.encoder.conv_stem.weight, whole.conv_stem.weight, rtol=0, atol=0)
    last = [v for k, v in student.encoder.state_dict().items() if k.endswith("conv_pwl.weight")][-1]
    torch.testing.assert_close(last, whole.blocks[6][0].conv_pwl.weight, rtol=0, atol=0)
    assert not torch.equal(student.encoder.conv_stem.weight, Student(weights="random").encoder.conv_stem.weight)


def test_normalisation_is_inside_and_not_in_the_state_dict(student):
    assert student.mean.flatten().tolist() == [0.5] * 3
    assert student.std.flatten().tolist() == [0.5] * 3
    names = set(student.state_dict())
    parameters = {name for name, _ in student.named_parameters()}
    assert {n.rsplit(".", 1)[-1] for n in names - parameters} == {"running_mean", "running_var", "num_batches_tracked"}
    x = image(64, 64)
    with torch.inference_mode():
        expected = student.decode(student.encoder(x * 2 - 1), [64, 64])
        torch.testing.assert_close(student(x), expected)


def test_another_encoder_brings_its_own_statistics():
    network = Student("efficientnet_b0", weights="random").eval()
    config = timm.get_pretrained_cfg("efficientnet_b0")
    torch.testing.assert_close(network.mean.flatten(), torch.tensor(config.mean))
    torch.testing.assert_close(network.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(network.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    with torch.inference_mode():
        assert network(image(64, 64)).shape == (2, 2, 64, 64)
    assert sum(p.numel() for p in network.parameters()) < 10e6


def test_weights_come_from_a_file_too(tmp_path):
    from amkd_monai.networks.student import create_encoder

    whole = create_encoder("efficientnet_b0")
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "b0.pth")
    network = Student("efficientnet_b0", weights=tmp_path / "b0.pth")
    torch.testing.assert_close(network.encoder.conv_stem.weight, whole.conv_stem.weight, rtol=0, atol=0)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="stride must be 2 or 4, not 8"):
        Student(stride=8, weights="random")
    with pytest.raises(ValueError, match="tf_efficientnet_light0"):
        Student("tf_efficientnet_light0")
    with pytest.raises(CheckpointError, match="efficientnet_b0"):
        Student("efficientnet_b0")
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        Student(weights="absent.pth")
