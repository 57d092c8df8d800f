"""Encoders of Hugging Face's transformers, made small and saved as their library saves them."""

import json

import pytest
import torch
from helpers import needs
from safetensors.torch import load_file, save_file

from amkd_monai.teachers.base import build_teacher
from amkd_monai.weights import CheckpointError

transformers = needs("transformers")

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ENCODERS = {
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(image_size=64, **VIT)),
    "DeiT": lambda: transformers.DeiTModel(transformers.DeiTConfig(image_size=64, **VIT)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(image_size=56, patch_size=14, **VIT)),
    "DINOv3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(image_size=64, num_register_tokens=4, **VIT)
    ),
    "DINOv3 ConvNeXt": lambda: transformers.DINOv3ConvNextModel(
        transformers.DINOv3ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1])
    ),
    "Swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(image_size=224, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2])
    ),
}
STATED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    network = ENCODERS[request.param]().eval()
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STATED))
    return folder, network


def build(folder, **options):
    return build_teacher({"name": "t", "kind": "transformers", "model": str(folder), **options})


def image(seed=0):
    return torch.rand((1, 3, 96, 72), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_librarys_network_on_images_as_stated(encoder):
    folder, network = encoder
    teacher = build(folder)
    assert teacher.image_size == network.config.image_size and not teacher.is_random
    assert teacher.weights_file["file"] == "model.safetensors"
    pixels = torch.nn.functional.interpolate(image(), (teacher.image_size,) * 2, mode="bilinear", antialias=True)
    pixels = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.3, 0.2, 0.1]).view(3, 1, 1)
    with torch.inference_mode():
        said, features = network(pixels), teacher(image())
    torch.testing.assert_close(features.pooled, said.pooler_output.flatten(1))
    cells = features.grid.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
    if network.config.model_type not in ("dinov3_convnext", "swin"):  # whose maps come before the last norm
        torch.testing.assert_close(cells, said.last_hidden_state[:, -cells.shape[1] :])


def test_a_planted_square_is_where_it_was_planted(encoder):
    teacher, planted = build(encoder[0], image_size=[224, 448], grid_limit=32), image()
    planted[:, :, 72:, :18] = 1 - planted[:, :, 72:, :18]
    grid = teacher(image()).grid
    assert grid.shape[-1] == 2 * grid.shape[-2]
    change = (teacher(planted).grid - grid).abs().mean(1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row / change.shape[0] >= 0.7 and column / change.shape[1] < 0.25


def test_options_come_before_what_is_stated(encoder):
    folder, _ = encoder
    teachers = [build(folder), build(folder, mean=[0, 0, 0]), build(folder, precision="bfloat16")]
    assert teachers[1].mean.flatten().tolist() == [0, 0, 0] and teachers[1].std.flatten()[2] == pytest.approx(0.1)
    assert len({teacher.fingerprint for teacher in teachers}) == 3 and teachers[2](image()).grid.dtype == torch.float32
    assert build(folder, weights="random").is_random
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in build(folder).parameters())


@pytest.fixture
def vit(tmp_path):
    ENCODERS["ViT"]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**STATED, "size": {"shortest_edge": 32}}))
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_flip_channel_order", True), ("include_top", True), ("do_rescale", None), ("rescale_factor", 1)],
)
def test_preprocessing_that_is_not_repeated_is_refused(vit, key, value):
    file = vit / "preprocessor_config.json"
    stated = {**json.loads(file.read_text()), "do_normalize": True, "rescale_factor": 1 / 255, "include_top": None}
    file.write_text(json.dumps(stated))
    assert build(vit).image_size == 32
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"{vit} asks for .*{key}"):
        build(vit)


@pytest.mark.parametrize("normalises", [False, None])
def test_images_that_are_not_normalised_stay_as_they_are(vit, normalises):
    file = vit / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_normalize": normalises}))
    teacher = build(vit)
    assert teacher.mean.flatten().tolist() == [0, 0, 0] and teacher.std.flatten().tolist() == [1, 1, 1]
    assert build(vit, mean=[0.5] * 3).mean.flatten().tolist() == [0.5] * 3


def test_the_size_of_a_crop_that_is_not_made_is_no_size(vit):
    file = vit / "preprocessor_config.json"
    stated = {**json.loads(file.read_text()), "crop_size": {"height": 48, "width": 48}}
    for crops, size in ((True, (48, 48)), (False, 32)):
        file.write_text(json.dumps({**stated, "do_center_crop": crops}))
        assert build(vit).image_size == size


def changed(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_pooler_is_not_taken_at_random(vit):
    teacher = build(vit)
    assert teacher.image_size == 32
    changed(vit, lambda state: [state.pop(key) for key in list(state) if key.startswith("pooler.")])
    features = build(vit)(image())
    torch.testing.assert_close(features.pooled, features.grid.mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("layernorm.weight"), "layernorm.weight"),
        (lambda state: state.update({"layernorm.bias": torch.full((48,), torch.nan)}), "NaN"),
    ],
)
def test_weights_that_are_not_whole_are_refused(change, word, vit):
    changed(vit, change)
    with pytest.raises(CheckpointError, match=word):
        build(vit)


def test_what_cannot_teach_is_refused_before_the_first_image(vit, tmp_path_factory):
    for options, word in (
        ({"image_size": 50}, "multiple of 16"),
        ({"weights": "w.pth"}, "w.pth"),
        ({"image_size": -1}, "image_size"),
    ):
        with pytest.raises(ValueError, match=word):
            build(vit, **options)
    with pytest.raises(CheckpointError, match="no/such"):
        build("no/such")
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="give mean and std"):
        build(vit)
    other = tmp_path_factory.mktemp("other")
    tower = {**VIT, "projection_dim": 8}
    transformers.CLIPConfig(text_config={**tower, "vocab_size": 99}, vision_config=tower).save_pretrained(other)
    with pytest.raises(ValueError, match="CLIPModel"):
        build(other, weights="random", **{"mean": [0.5] * 3, "std": [0.5] * 3})
    transformers.ViTMAEModel(transformers.ViTMAEConfig(image_size=64, **VIT)).save_pretrained(other)
    with pytest.raises(ValueError, match="tokens"):  # it shows itself a random part of each image
        build(other, mean=[0.5] * 3, std=[0.5] * 3)
