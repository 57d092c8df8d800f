import re

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from amkd_monai.teachers.base import resize
from amkd_monai.teachers.timm_encoder import OPENMMLAB_SAM, TimmTeacher
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


TINY_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}
HALF = [0.5, 0.5, 0.5]
MODERN = {
    "RETFound-Green": {
        "model": "vit_small_patch14_reg4_dinov2",
        "model_args": TINY_VIT,
        "mean": HALF,
        "std": HALF,
        "global_pool": "avg",
    },
    "DINOv3 ViT": {"model": "vit_small_patch16_dinov3", "model_args": TINY_VIT},
    "DINOv3 ConvNeXt": {"model": "convnext_tiny", "model_args": {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64]}},
    "UltraSam": {"model": "samvit_base_patch16", "model_args": {**TINY_VIT, "global_attn_indexes": [1]}},
    "PanDerm": {
        "model": "beit_base_patch16_224",
        "model_args": {**TINY_VIT, "use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0.1},
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
"""The architectures of today's medical and general encoders, made small."""


def modern(which, weights="random", **options):
    torch.manual_seed(0)
    return TimmTeacher("t", weights=weights, **{**MODERN[which], **options})


@pytest.mark.parametrize("size", [112, (112, 224)], ids=str)
@pytest.mark.parametrize("which", MODERN)
def test_a_planted_square_is_where_it_was_planted(which, size):
    """In the map of any size and of images of another shape; class and register tokens are no cells."""
    teacher, plain = modern(which, image_size=size, stride=8), image(96, 72, batch=1)
    planted = plain.clone()
    planted[:, :, 72:, :18] = 1 - planted[:, :, 72:, :18]
    grid = teacher(plain).grid
    assert teacher.image_size == size and grid.shape[-2] <= 14
    change = (teacher(planted).grid - grid).abs().mean(1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row / change.shape[0] >= 0.7 and column / change.shape[1] < 0.25, change


@pytest.mark.parametrize("which", MODERN)
def test_statistics_and_size_reach_the_network(which):
    teacher, seen = modern(which, image_size=112, interpolation="bicubic"), []
    first = next(m for m in teacher.network.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    teacher(image())
    config = timm.get_pretrained_cfg(MODERN[which]["model"])
    mean, std = MODERN[which].get("mean", config.mean), MODERN[which].get("std", config.std)
    sized = nn.functional.interpolate(image(), (112, 112), mode="bicubic", antialias=True).clamp(0, 1)
    expected = (sized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)
    assert not torch.equal(resize(image(), 112), sized)


@pytest.mark.parametrize("which", ["RETFound-Green", "PanDerm"])
def test_the_files_positions_decide_the_size_and_are_resized_to_another(which, tmp_path):
    patch = 14 if which == "RETFound-Green" else 16
    official = timm.create_model(
        MODERN[which]["model"], num_classes=0, img_size=6 * patch, **MODERN[which]["model_args"]
    )
    nn.init.normal_(official.pos_embed)
    torch.save(official.state_dict(), tmp_path / "weights.pth")
    teacher = modern(which, tmp_path / "weights.pth")
    assert teacher.image_size == 6 * patch and torch.equal(teacher.network.pos_embed, official.pos_embed)
    larger = modern(which, tmp_path / "weights.pth", image_size=[6 * patch, 9 * patch])
    prefix = 0 if which == "RETFound-Green" else 1
    expected = resample_abs_pos_embed(official.pos_embed, [6, 9], num_prefix_tokens=prefix)
    torch.testing.assert_close(larger.network.pos_embed, expected)
    assert larger.fingerprint != teacher.fingerprint
    torch.save({**official.state_dict(), "pos_embed": torch.zeros(1, 42, 48)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="pos_embed"):
        modern(which, tmp_path / "weights.pth")


def test_the_pooled_vector_is_pooled_as_asked():
    x, by = image(batch=1), {}
    for pool in ("avg", "token", "max"):
        teacher = modern("RETFound-Green", image_size=56, global_pool=pool)
        by[pool], tokens = teacher(x).pooled, teacher.network.forward_features(teacher.prepare(x))
        patches = tokens[:, 5:]
        expected = {"avg": patches.mean(1), "max": patches.amax(1), "token": tokens[:, 0]}[pool]
        torch.testing.assert_close(by[pool], expected)
    assert not torch.allclose(by["avg"], by["token"])


def test_ultrasams_file_fills_the_image_encoder(tmp_path):
    """Its image encoder has OpenMMLab's names, beside a decoder; the authors' conversion is undone, name by name."""
    teacher = modern("UltraSam")
    state = {key: torch.randn_like(value) for key, value in teacher.network.state_dict().items()}
    renames = [("blocks.", "layers."), ("patch_embed.proj.", "patch_embed.projection."), ("norm", "ln")]
    renames += [("neck", "channel_reduction"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")]
    official = {}
    for key, value in state.items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        official[f"backbone.{key}"] = value
    file = {"meta": {"dataset_meta": {}}, "state_dict": official | {"bbox_head.iou_token.weight": torch.zeros(1, 4)}}
    torch.save(file, tmp_path / "UltraSam.pth")
    loaded = modern("UltraSam", tmp_path / "UltraSam.pth").network.state_dict()
    assert len(OPENMMLAB_SAM) == len(renames) and all(torch.equal(loaded[key], state[key]) for key in state)
    del file["state_dict"]["backbone.layers.1.ln2.bias"]
    torch.save(file, tmp_path / "UltraSam.pth")
    with pytest.raises(CheckpointError, match=re.escape("blocks.1.norm2.bias")):
        modern("UltraSam", tmp_path / "UltraSam.pth")


def test_layouts_that_timm_converts_are_converted_and_no_kernel_is_resized(tmp_path):
    """DINOv2's own file holds a mask token, and a class position in front of the others'."""
    network = modern("RETFound-Green", image_size=56).network
    state = {k.replace("reg_token", "register_tokens"): torch.randn_like(v) for k, v in network.state_dict().items()}
    positions = torch.randn(1, 17, 48)
    torch.save({**state, "pos_embed": positions, "mask_token": torch.zeros(1, 48)}, tmp_path / "weights.pth")
    loaded = modern("RETFound-Green", tmp_path / "weights.pth")
    assert loaded.image_size == 56 and torch.equal(loaded.network.pos_embed, positions[:, 1:])
    torch.testing.assert_close(loaded.network.cls_token, state["cls_token"] + positions[:, :1])
    state["patch_embed.proj.weight"] = torch.zeros(48, 3, 16, 16)
    torch.save({**state, "pos_embed": positions, "mask_token": torch.zeros(1, 48)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="another shape"):
        modern("RETFound-Green", tmp_path / "weights.pth")


def test_bfloat16_is_near_and_another_fingerprint():
    exact, rough = modern("PanDerm"), modern("PanDerm", precision="bfloat16")
    one, other = exact(image()), rough(image())
    assert other.grid.dtype == other.pooled.dtype == torch.float32 and not torch.equal(one.grid, other.grid)
    torch.testing.assert_close(one.grid, other.grid, rtol=0.05, atol=0.05)
    assert exact.fingerprint != rough.fingerprint


@pytest.mark.parametrize(
    ("which", "options", "word"),
    [
        ("RETFound-Green", {"image_size": 100}, "multiples of 14"),
        ("UltraSam", {"image_size": 100}, "multiples of 16"),
        ("PanDerm", {"image_size": "224"}, "image_size"),
        ("PanDerm", {"image_size": 0}, "image_size"),
        ("PanDerm", {"image_size": [1, 2, 3]}, "image_size"),
        ("PanDerm", {"interpolation": "nearest"}, "nearest"),
        ("PanDerm", {"mean": [0.5]}, "mean"),
        ("PanDerm", {"std": [0.5, 0.5, 0]}, "std"),
        ("DINOv3 ConvNeXt", {"global_pool": "token"}, "global_pool"),
        ("PanDerm", {"global_pool": "sum"}, "global_pool"),
        ("PanDerm", {"model_args": {"no_such": 1}}, "no_such"),
    ],
)
def test_a_wrong_option_of_a_modern_encoder_is_named(which, options, word):
    with pytest.raises(ValueError, match=word):
        modern(which, **options)
