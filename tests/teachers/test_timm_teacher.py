import pytest
import torch
from torch import nn

from amkd_monai.teachers.timm_encoder import TimmTeacher
from amkd_monai.weights import CheckpointError


@pytest.fixture(scope="module")
def lite1():
    return TimmTeacher("lite1", "tf_efficientnet_lite1")


def image(height=64, width=96, batch=2, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_training_step_of_a_parent_leaves_it_as_it_was(lite1):
    parent = nn.ModuleDict({"teacher": lite1, "student": nn.Conv2d(3, 4, 1)})
    before = snapshot(lite1)
    parent.train()
    assert not any(m.training for m in lite1.modules())
    optimiser = torch.optim.SGD(parent.parameters(), lr=1.0, weight_decay=0.1)
    loss = parent["student"](image()).mean() + lite1(image()).grid.mean()
    loss.backward()
    optimiser.step()
    assert before.keys() == lite1.state_dict().keys()
    for name, value in lite1.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in lite1.parameters())
    assert parent["student"].weight.grad is not None


def test_it_answers_alike_before_and_after_train_is_called(lite1):
    before = lite1(image())
    lite1.train()
    after = lite1(image())
    assert torch.equal(before.grid, after.grid) and torch.equal(before.pooled, after.pooled)
    assert not before.grid.requires_grad and before.logits is None


def test_the_grid_is_the_stage_of_the_stride_asked_for(lite1):
    channels = {s["reduction"]: s["num_chs"] for s in lite1.network.feature_info}
    assert lite1(image()).grid.shape == (2, channels[16], 4, 6)
    finer = TimmTeacher("x", "tf_efficientnet_lite1", weights="random", stride=8)
    assert finer(image()).grid.shape == (2, channels[8], 8, 12)
    between = TimmTeacher("x", "tf_efficientnet_lite1", weights="random", stride=20)
    assert between(image()).grid.shape == (2, channels[16], 4, 6)


def test_the_pooled_vector_is_what_the_classifier_would_see(lite1):
    with torch.inference_mode():
        expected = lite1.network.forward_head(lite1.network.forward_features(image() * 2 - 1), pre_logits=True)
        torch.testing.assert_close(lite1(image()).pooled, expected)


def test_grids_are_pooled_down_and_never_up():
    teacher = TimmTeacher("x", "tf_efficientnet_lite1", weights="random", grid_limit=4)
    wide = TimmTeacher("x", "tf_efficientnet_lite1", weights="random", grid_limit=64)
    wide.load_state_dict(teacher.state_dict())
    x = image(64, 160, batch=1)
    full, pooled = wide(x).grid, teacher(x).grid
    assert full.shape[-2:] == (4, 10)
    assert pooled.shape[-2:] == (4, 4)
    torch.testing.assert_close(pooled, nn.functional.adaptive_avg_pool2d(full, (4, 4)))


def test_images_are_squashed_to_the_size_asked_for():
    teacher = TimmTeacher("x", "tf_efficientnet_lite1", weights="random", image_size=128)
    assert teacher(image(40, 200)).grid.shape[-2:] == (8, 8)


def test_colours_are_not_interchangeable(lite1):
    rgb, bgr = lite1(image()).grid, lite1(image().flip(1)).grid
    assert nn.functional.cosine_similarity(rgb.flatten(1), bgr.flatten(1)).max() < 0.98


def test_a_network_of_fixed_size_takes_any_image():
    teacher = TimmTeacher("vit", "vit_tiny_patch16_224", weights="random")
    assert teacher.image_size == 224
    features = teacher(image(50, 80, batch=1))
    assert features.grid.shape == (1, 192, 14, 14)
    assert features.pooled.shape == (1, 192)
    assert not any(m.training for m in teacher.modules())


def test_the_fingerprint_is_stable_over_instances_and_sees_weights_and_preprocessing(lite1, tmp_path):
    again = TimmTeacher("another name", "tf_efficientnet_lite1")
    assert again.fingerprint == lite1.fingerprint == lite1.fingerprint
    changed = {k: v.clone() for k, v in lite1.network.state_dict().items()}
    changed["conv_stem.weight"][0, 0, 0, 0] += 1e-3
    torch.save(changed, tmp_path / "changed.pth")
    others = [
        TimmTeacher("lite1", "tf_efficientnet_lite1", weights=tmp_path / "changed.pth"),
        TimmTeacher("lite1", "tf_efficientnet_lite1", image_size=128),
        TimmTeacher("lite1", "tf_efficientnet_lite1", grid_limit=8),
        TimmTeacher("lite1", "tf_efficientnet_lite1", stride=8),
        TimmTeacher("lite1", "tf_efficientnet_lite2"),
    ]
    assert len({t.fingerprint for t in [lite1, *others]}) == len(others) + 1


def test_the_fingerprint_does_not_change_by_use(lite1):
    before = lite1.fingerprint
    lite1.train()
    lite1(image())
    assert lite1.fingerprint == before


def test_random_weights_are_marked_and_licences_known(lite1):
    assert not lite1.is_random and lite1.licence == "Apache-2.0"
    assert TimmTeacher("x", "tf_efficientnet_lite1", weights="random").is_random
    assert TimmTeacher("x", "resnet18", weights="random").licence == "unknown"


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="no_such_network"):
        TimmTeacher("x", "no_such_network")
    with pytest.raises(CheckpointError, match="resnet18"):
        TimmTeacher("x", "resnet18")
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        TimmTeacher("x", "resnet18", weights=tmp_path / "absent.pth")
