"""The teacher on a tiny variant of the network."""

import json

import pytest
import torch
import torch.nn.functional as F
from reference.biomedparse_fill import filled

from amkd_monai.teachers.base import build_teacher
from amkd_monai.teachers.biomedparse import BiomedParse, BiomedParseTeacher, Sizes, _outside
from amkd_monai.weights import file_sha256

TINY = {"backbone": 16, "depths": [1, 1, 1, 1], "width": 64, "heads": 4, "hidden": 64}
TINY |= {"encoder_layers": 1, "decoder_layers": 4, "queries": 12, "text_layers": 2}
LIVER, VENTRICLE = [49406, 12639, 49407], [49406, 1823, 1936, 1240, 9511, 579, 530, 21256, 29717, 49407]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint of the tiny variant in the official layout, its values of a natural size."""
    with torch.device("meta"):
        state = BiomedParse(Sizes(**TINY)).state_dict()
    path = tmp_path_factory.mktemp("weights") / "biomedparse_v1.pt"
    torch.save({key: filled(key, tuple(value.shape)) for key, value in state.items()}, path)
    return path


def teacher(file, token_ids=(LIVER,), **options):
    return BiomedParseTeacher("b", file, token_ids=token_ids, sizes=TINY, **{"image_size": 96, **options})


def pictures(height, width, batch=1):
    coarse = torch.rand((batch, 3, 7, 9), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bilinear")


def assert_same(one, other):
    for name in ("grid", "pooled", "logits"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(96, 96), (37, 61), (301, 200)])
@torch.inference_mode()
def test_images_of_any_size_are_squashed(file, height, width):
    features = teacher(file, [LIVER, VENTRICLE])(pictures(height, width, batch=2))
    assert features.grid.shape == (2, 128, 3, 3)
    assert features.pooled.shape == (2, 128)
    assert features.logits.shape == (2, 3, 24, 24)
    assert all(value.isfinite().all() for value in (features.grid, features.pooled, features.logits))
    assert not features.logits[:, 0].any() and features.logits[:, 1:].std() > 0.1


@pytest.mark.parametrize("stride, channels", [(4, 16), (8, 32), (16, 64), (32, 128)])
@torch.inference_mode()
def test_the_grid_is_the_map_of_the_stride_asked_for(file, stride, channels):
    wide = teacher(file, stride=stride, grid_limit=64)(pictures(80, 90)).grid
    assert wide.shape == (1, channels, 96 // stride, 96 // stride)
    narrow = teacher(file, stride=stride, grid_limit=2)(pictures(80, 90)).grid
    torch.testing.assert_close(narrow, F.adaptive_avg_pool2d(wide, 2))


@torch.inference_mode()
def test_a_batch_is_answered_as_its_images_are(file):
    images, model = pictures(60, 80, batch=3), teacher(file, [LIVER, VENTRICLE])
    whole = model(images)
    for i in range(3):
        single = model(images[i : i + 1])
        torch.testing.assert_close(single.logits[0], whole.logits[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single.pooled[0], whole.pooled[i], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_prompts_do_not_change_each_other(file):
    images = pictures(60, 80, batch=2)
    both = teacher(file, [LIVER, VENTRICLE])(images).logits
    for channel, prompt in ((1, LIVER), (2, VENTRICLE)):
        alone = teacher(file, [prompt])(images).logits
        torch.testing.assert_close(alone[:, 1], both[:, channel])
        assert not alone[:, 0].any()
    assert (both[:, 1] - both[:, 2]).abs().max() > 0.1


def test_a_query_looks_inside_its_mask_or_everywhere():
    masks = torch.full((1, 3, 8, 8), -5.0)
    masks[0, 0, :4] = masks[0, 1] = 5.0
    blocked = _outside(masks, torch.zeros(1, 1, 2, 2))[0]
    assert blocked.tolist() == [[False, False, True, True], [False] * 4, [False] * 4]


@torch.inference_mode()
def test_two_classes_have_the_probability_of_the_mask(file):
    model = teacher(file)
    images = pictures(96, 96)
    _, features = model.network.look(model.prepare(images))
    mask = model.network.segment(features, model.network.read(torch.tensor(LIVER)))
    torch.testing.assert_close(model(images).logits.softmax(1)[:, 1:], mask.sigmoid())


@torch.inference_mode()
def test_padding_after_the_end_token_has_no_effect(file):
    assert_same(teacher(file, [LIVER + [49407] * 74])(pictures(60, 80)), teacher(file)(pictures(60, 80)))


@torch.inference_mode()
def test_colours_are_not_interchangeable(file):
    images = pictures(60, 80)
    rgb, bgr = teacher(file)(images).grid, teacher(file)(images.flip(1)).grid
    assert F.cosine_similarity(rgb.flatten(1), bgr.flatten(1)).max() < 0.99


@torch.inference_mode()
def test_bfloat16_says_nearly_the_same(file):
    images = pictures(60, 80, batch=2)
    exact, rough = teacher(file)(images), teacher(file, precision="bfloat16")(images)
    assert rough.logits.dtype == torch.float32 and not torch.equal(rough.logits, exact.logits)
    assert torch.equal(rough.grid, exact.grid) and torch.equal(rough.pooled, exact.pooled)
    one, other = exact.logits[:, 1].flatten(1), rough.logits[:, 1].flatten(1)
    assert F.cosine_similarity(one, other).min() > 0.9999


def test_a_description_of_plain_data_becomes_a_frozen_teacher(file):
    description = {"name": "biomedparse", "kind": "biomedparse", "weights": str(file), "token_ids": [LIVER]}
    model = build_teacher(json.loads(json.dumps({**description, "sizes": TINY, "image_size": 64})))
    assert isinstance(model, BiomedParseTeacher) and not model.is_random and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert not any(module.training for module in model.modules())


def test_random_weights_are_marked_and_files_remembered(file):
    random = BiomedParseTeacher("b", "random", token_ids=[LIVER], sizes=TINY)
    assert random.is_random and random.weights_file is None
    assert random.fingerprint == BiomedParseTeacher("b", "random", token_ids=[LIVER], sizes=TINY).fingerprint
    named = teacher(file)
    assert named.weights_file == {"file": "biomedparse_v1.pt", "sha256": file_sha256(file)}
    assert teacher(file.parent).fingerprint == named.fingerprint


def test_the_fingerprint_sees_prompts_size_and_weights(file):
    same = teacher(file).fingerprint
    others = [
        teacher(file, [VENTRICLE]),
        teacher(file, image_size=64),
        teacher(file, stride=16),
        teacher(file, precision="bfloat16"),
        BiomedParseTeacher("b", "random", token_ids=[LIVER], sizes=TINY, image_size=96),
    ]
    assert same not in [other.fingerprint for other in others]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"image_size": 100}, "multiple of 32"),
        ({"stride": 12}, "stride 12"),
        ({"precision": "float16"}, "precision"),
        ({"token_ids": None}, "prompts"),
        ({"token_ids": [[1, 2]]}, "prompt 1"),
        ({"token_ids": LIVER}, "prompt 1"),
        ({"token_ids": [[49406, 49407]]}, "prompt 1"),
        ({"token_ids": [LIVER, [49406, 60000, 49407]]}, "prompt 2"),
        ({"prompts": ["liver"]}, "token_ids"),
        ({"token_ids": None, "prompts": "liver"}, "list"),
    ],
)
def test_wrong_options_are_one_sentence(options, word):
    with pytest.raises(ValueError, match=word) as error:
        BiomedParseTeacher("b", "random", **{"token_ids": [LIVER], "sizes": TINY, **options})
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
