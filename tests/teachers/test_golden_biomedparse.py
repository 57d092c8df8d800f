"""The network against what the authors' code answers with the same weights, and mistakes against the same figures."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference.biomedparse_fill import GOLDEN, KEYS, filled, gap, image_a, tolerance
from torch import nn

from amkd_monai.teachers import biomedparse
from amkd_monai.teachers.biomedparse import UNUSED, BiomedParse, Sizes
from amkd_monai.teachers.official import each_image, imagenet_normalised, squash
from amkd_monai.weights import load_strict

IDS = torch.tensor(GOLDEN["token_ids"][0])
IMAGE = torch.from_numpy(image_a()).permute(2, 0, 1)[None] / 255  # (H, W, 3) -> (1, 3, H, W)


def to_pixels(image):
    return imagenet_normalised(each_image(image, lambda pixels: squash(pixels, 256)))


def fits(name, value):
    return gap(value, GOLDEN["tensors"][name]) <= tolerance(name)


def test_every_key_of_the_official_file_is_used_or_named_as_unused():
    with torch.device("meta"):
        own = {key: tuple(value.shape) for key, value in BiomedParse(Sizes()).state_dict().items()}
    unused = {key for key in KEYS if key.startswith(UNUSED)}
    assert own == {key: shape for key, shape in KEYS.items() if key not in unused}
    assert all(any(key.startswith(prefix) for key in unused) for prefix in UNUSED)
    assert len(KEYS) == 1132 and sum(torch.Size(shape).numel() for shape in own.values()) == 340_360_953


@pytest.fixture(scope="module", autouse=True)
def plain_kernels():
    """Without oneDNN: its kernels differ between processors by more than the mask's bound, where a logit's sign flips.

    On an AVX2 machine the mask differs by 5e-5 without it; the features agree with it as well.
    """
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def network():
    """The network at its full size, loaded strictly from a state dict with every official key."""
    state = {
        key: torch.zeros(()).expand(shape) if key.startswith(UNUSED) else filled(key, shape)
        for key, shape in KEYS.items()
    }
    full = BiomedParse(Sizes()).requires_grad_(False).eval()
    load_strict(full, state, "the reference state dict", allow_unexpected=UNUSED)
    return full


@pytest.fixture(scope="module")
def pixels():
    return to_pixels(IMAGE)


@pytest.fixture(scope="module")
def image(network, pixels):
    return network.look(pixels)


@pytest.fixture(scope="module")
def words(network):
    return network.read(IDS)


@contextmanager
def hooked(layers, change):
    handles = [layer.register_forward_pre_hook(change) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def decoded(network, image, words):
    predictor = network.sem_seg_head["predictor"]
    embeddings, masks = predictor(image, words)
    similarity = predictor.similarity(embeddings, words[:, -1])
    matched = network.segment(image, words)
    return {
        "pred_captions": embeddings[0],
        "similarity": similarity[0],
        "pred_masks_all": masks[0],
        "mask_logits_matched": matched[0],
        "mask_logits_full": F.interpolate(matched, GOLDEN["image_size"], mode="bilinear")[0],
    }


@pytest.mark.slow
def test_the_network_answers_as_the_authors_code_does(network, pixels, image, words):
    maps, features = image
    values = {
        "pixels": pixels,
        "transformer_encoder_features": features.encoded,
        "mask_features": features.mask_features,
    }
    values |= {f"res{level}": grid for level, grid in enumerate(maps, start=2)}
    values |= {f"multi_scale_{i}": scale for i, scale in enumerate(features.scales)}
    values |= {"grounding_tokens": words[0], "class_emb": words[:, -1]}
    values |= decoded(network, features, words)
    assert values.keys() == GOLDEN["tensors"].keys()
    gaps = {name: gap(value, GOLDEN["tensors"][name]) for name, value in values.items()}
    print({name: f"{found:.1e}" for name, found in gaps.items()})
    assert all(gaps[name] <= tolerance(name) for name in gaps), gaps
    assert values["similarity"].argmax(0).tolist() == GOLDEN["matched_id"]
    positive = (values["mask_logits_full"] > 0).double().mean((1, 2)).tolist()
    assert positive == pytest.approx(GOLDEN["fraction_positive"], abs=1e-4)


@pytest.mark.slow
@torch.backends.mkldnn.flags(enabled=True)  # without oneDNN a bfloat16 convolution takes minutes
@torch.inference_mode()
def test_bfloat16_rounds_the_pixel_decoder_alone_and_says_nearly_the_same(network, image, words):
    """With random weights mask logits near 0 decide what a query sees next, so the mask jumps where one changes sign.

    Smaller noise than bfloat16's on the exact features can do it too, in float32 throughout; whether it happens here
    depends on the processor's kernels. So the mask is compared with the float32 decoder's on the same features.
    """
    _, exact = image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network.sem_seg_head["pixel_decoder"](image[0])
        mask = network.segment(rough, words)
    pairs = [(exact.mask_features, rough.mask_features), *zip(exact.scales, rough.scales, strict=True)]
    assert rough.mask_features.dtype == torch.bfloat16
    assert min(cosine(*pair) for pair in pairs) > 0.9999
    assert torch.equal(mask, network.segment(rough.float(), words))  # the mask decoder stays in float32
    assert cosine(network.segment(exact, words), mask) > 0.99


def cosine(one, other):
    return F.cosine_similarity(one.float().flatten(1), other.float().flatten(1)).min()


@pytest.mark.slow
class TestMistakesAreSeen:
    def first_map(self, network, pixels):
        with replaced(network.backbone, "layers", network.backbone.layers[:1]):
            return network.backbone(pixels)[0]

    def test_control(self, network, pixels):
        assert fits("res2", self.first_map(network, pixels))

    def test_bgr(self, network):
        pixels = to_pixels(IMAGE.flip(1))
        assert not fits("pixels", pixels)
        assert not fits("res2", self.first_map(network, pixels))

    def test_no_norm_on_a_stage(self, network, pixels):
        with replaced(network.backbone, "norm0", nn.Identity()):
            assert not fits("res2", self.first_map(network, pixels))

    def test_modulator_not_scaled(self, network, pixels):
        with replaced(network.backbone.layers[0].blocks[0].modulation, "normalize_modulator", False):
            assert not fits("res2", self.first_map(network, pixels))

    def test_another_epsilon_in_one_block(self, network, pixels):
        with replaced(network.backbone.layers[0].blocks[0].norm1_post, "eps", 1e-6):
            assert not fits("res2", self.first_map(network, pixels))

    def test_layer_scales_swapped_in_one_block(self, network, pixels):
        block = network.backbone.layers[0].blocks[1]
        with replaced(block, "ls1", block.ls2), replaced(block, "ls2", block.ls1):
            assert not fits("res2", self.first_map(network, pixels))

    def test_gelu_in_the_text_encoder(self, network):
        with replaced(biomedparse, "quick_gelu", F.gelu):
            words = network.read(IDS)
        assert not fits("grounding_tokens", words[0]) and not fits("class_emb", words[:, -1])

    def test_another_epsilon_in_the_text_encoder(self, network, words):
        """Too small for the general tolerance, so the text encoder is held to a narrower one."""
        golden = GOLDEN["tensors"]["class_emb"]
        assert gap(words[:, -1], golden) < 1e-5
        with ExitStack() as stack:
            for layer in network.sem_seg_head["predictor"].lang_encoder.lang_encoder.modules():
                if isinstance(layer, nn.LayerNorm):
                    stack.enter_context(replaced(layer, "eps", 1e-5))
            assert gap(network.read(IDS)[:, -1], golden) > 2e-5

    def test_words_that_see_the_future(self, network):
        blocks = network.sem_seg_head["predictor"].lang_encoder.lang_encoder.resblocks
        with hooked(blocks, lambda _, args: (args[0], torch.zeros_like(args[1]))):
            assert not fits("grounding_tokens", network.read(IDS)[0])

    def test_query_and_value_swapped_in_one_text_block(self, network):
        attention = network.sem_seg_head["predictor"].lang_encoder.lang_encoder.resblocks[5].attn
        query, key, value = attention.in_proj_weight.chunk(3)
        swapped = nn.Parameter(torch.cat([value, key, query]), requires_grad=False)
        with replaced(attention, "in_proj_weight", swapped):
            assert not fits("class_emb", network.read(IDS)[:, -1])

    def test_words_without_position(self, network, image, words):
        layers = network.sem_seg_head["predictor"].transformer_self_attention_layers
        unplaced = torch.cat([torch.ones(101, 1), torch.zeros(words.shape[1], 1)])

        def unplace(_, args):
            placed, _, tokens = args
            changed = tokens + (placed - tokens) * unplaced
            return changed, changed, tokens

        with hooked([layer["self_attn"] for layer in layers], unplace):
            values = decoded(network, image[1], words)
        assert not fits("pred_captions", values["pred_captions"])
        assert not fits("mask_logits_matched", values["mask_logits_matched"])

    def test_queries_that_look_everywhere(self, network, image, words):
        with replaced(biomedparse, "_outside", lambda _, scale: torch.zeros(1, 101, scale[0, 0].numel()) > 0):
            values = decoded(network, image[1], words)
        assert not fits("mask_logits_matched", values["mask_logits_matched"])

    def test_levels_in_the_wrong_order(self, network, image, words):
        levels = network.sem_seg_head["predictor"].level_embed
        with replaced(levels, "weight", nn.Parameter(levels.weight.flip(0), requires_grad=False)):
            assert not fits("pred_captions", decoded(network, image[1], words)["pred_captions"])

    def test_positions_added_to_the_values_of_the_pixel_decoder(self, network, image):
        decoder = network.sem_seg_head["pixel_decoder"]
        attention = decoder.transformer["encoder"]["layers"][0].self_attn
        with hooked([attention], lambda _, args: (args[0], args[1], args[1])):
            assert not fits("transformer_encoder_features", decoder(image[0]).encoded)

    def test_smooth_upsampling_in_the_pyramid(self, network, image):
        def smooth(x, size, mode):
            return F.interpolate(x, size, mode="bilinear")

        with replaced(biomedparse, "F", SimpleNamespace(interpolate=smooth, relu=F.relu)):
            features = network.sem_seg_head["pixel_decoder"](image[0])
        assert fits("multi_scale_0", features.scales[0]) and not fits("multi_scale_1", features.scales[1])
