"""RETFound in its layouts computes what its authors' code computed."""

import argparse

import pytest
import torch
from reference import fill, synthetic
from timm.layers import resample_abs_pos_embed

from amkd_monai.teachers.retfound import RETFoundTeacher

pytestmark = pytest.mark.slow


def image(size=224):
    return torch.from_numpy(fill.pattern(size)).float()[None]


def teacher_of(container, folder, name="RETFound_mae_natureCFP.pth", **options):
    torch.save(container, folder / name)
    teacher = RETFoundTeacher("retfound", folder / name, framing="squash", **options)
    (folder / name).unlink()
    return teacher


@torch.inference_mode()
def tokens(teacher, pixels=None):
    network = teacher.network
    blocks = network.forward_intermediates(
        teacher.prepare(image()) if pixels is None else pixels,
        indices=[11, 23],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    middle, last = (torch.cat([prefix, patches], 1) for patches, prefix in blocks)
    return {"tokens_block12": middle, "tokens_last_block": last, "cls_norm": network.norm(last)[:, 0]}


@pytest.fixture(scope="module")
def official():
    return synthetic.state("retfound")


@pytest.fixture(scope="module")
def retfound(official, tmp_path_factory):
    """As the authors' trainer saves it: with its options, and the decoder of the pretraining."""
    container = {"model": official, "epoch": 799, "args": argparse.Namespace(batch_size=224, mask_ratio=0.75)}
    return teacher_of(container, tmp_path_factory.mktemp("retfound"))


@pytest.fixture(scope="module")
def found(retfound):
    return tokens(retfound)


def test_all_outputs_agree(retfound, found):
    with torch.inference_mode():
        said = retfound(image())
    synthetic.assert_golden("retfound", {**found, "gap_fcnorm_identity": said.pooled})
    assert said.grid.shape == (1, 1024, 14, 14) and said.logits is None and not retfound.is_random
    torch.testing.assert_close(said.grid.flatten(2).transpose(1, 2), found["tokens_last_block"][:, 1:])


def test_mistakes_are_noticed(retfound, found):
    with synthetic.wrong_epsilon(retfound.network):
        wrong = tokens(retfound)
    synthetic.assert_epsilon_noticed("retfound", found, wrong)
    for mistake in (
        synthetic.query_value_swapped(retfound.network.blocks[20].attn),
        synthetic.norms_swapped(retfound.network.blocks[3]),
    ):
        with mistake:
            synthetic.assert_noticed("retfound", tokens(retfound))
    with torch.inference_mode():  # pooling what the pretrained norm gives
        normed = retfound.network.forward_features(retfound.prepare(image()))
    synthetic.assert_noticed("retfound", {"gap_fcnorm_identity": normed[:, 1:].mean(1)})
    synthetic.assert_noticed("retfound", tokens(retfound, pixels=retfound.prepare(image().flip(1))))
    synthetic.assert_golden("retfound", tokens(retfound), without=("gap_fcnorm_identity",))


def test_256_pixels_resize_positions_as_upstream(official, tmp_path):
    larger = teacher_of(official, tmp_path, image_size=256)
    with torch.inference_mode():
        synthetic.assert_golden("retfound_256", {"gap_fcnorm_identity": larger(image(256)).pooled})
        larger.network.pos_embed.copy_(resample_abs_pos_embed(official["pos_embed"], [16, 16]))  # timm's own rule
        synthetic.assert_noticed("retfound_256", {"gap_fcnorm_identity": larger(image(256)).pooled})


def test_a_fine_tuned_file_answers(official, tmp_path):
    shapes = fill.keys("retfound_aptos5")
    state = {k: official[k] if k in official else torch.from_numpy(fill.tensor(k, s)) for k, s in shapes.items()}
    once = teacher_of({"model": state}, tmp_path)
    with torch.inference_mode():
        said = once(image())
        once.fc_norm_applications = 2
        found = {"pooled": said.pooled, "logits_once": said.logits, "logits_forward": once(image()).logits}
    synthetic.assert_golden("retfound_aptos5", found)
    synthetic.assert_noticed("retfound_aptos5", {"logits_once": found["logits_forward"]})


def test_the_dinov2_variant_agrees(tmp_path):
    state = synthetic.state("retfound_dinov2")
    container = {"teacher": {**state, "dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.x": torch.zeros(1)}}
    teacher = teacher_of(container, tmp_path, "RETFound_dinov2_meh.pth", variant="dinov2_meh")

    @torch.inference_mode()
    def normed():
        said = teacher(image())
        return {"tokens_normed": torch.cat([said.pooled[:, None], said.grid.flatten(2).transpose(1, 2)], 1)}

    synthetic.assert_golden("retfound_dinov2", normed())
    with synthetic.wrong_epsilon(teacher.network):
        wrong = normed()
    synthetic.assert_epsilon_noticed("retfound_dinov2", normed(), wrong)
    block = teacher.network.blocks[5]
    with synthetic.exchanged(block.ls1.gamma, block.ls2.gamma):
        synthetic.assert_noticed("retfound_dinov2", normed())
    positions = state["backbone.pos_embed"]
    assert torch.equal(teacher.network.pos_embed, resample_abs_pos_embed(positions, [16, 16], antialias=False))
    with synthetic.exchanged(teacher.network.pos_embed, resample_abs_pos_embed(positions, [16, 16])):
        synthetic.assert_noticed("retfound_dinov2", normed())
