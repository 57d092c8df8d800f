"""USFM in its layouts computes what its authors' code computed."""

import pytest
import torch
from reference import fill, synthetic
from timm.layers import resize_rel_pos_bias_table

from amkd_monai.teachers.usfm import USFMTeacher, pyramid

pytestmark = pytest.mark.slow
TABLE = "rel_pos_bias.relative_position_bias_table"
IMAGE = torch.from_numpy(fill.pattern(224)).float()[None]


def teacher_of(state, folder, **options):
    path = folder / "USFM_latest.pth"
    torch.save(state, path)
    teacher = USFMTeacher("usfm", path, **options)
    path.unlink()
    return teacher


@torch.inference_mode()
def tokens(teacher, pixels=None):
    backbone = teacher.network["backbone"]
    pixels = teacher.prepare(IMAGE) if pixels is None else pixels
    blocks = backbone.forward_intermediates(
        pixels, indices=[3, 5, 7, 11], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    whole = [torch.cat([prefix, patches], 1) for patches, prefix in blocks]
    found = {f"tokens_block{n}": t for n, t in zip((4, 6, 8, 12), whole, strict=True)}
    return {**found, "cls_norm": backbone.norm(whole[-1])[:, 0]}


@pytest.fixture(scope="module")
def official():
    return synthetic.state("usfm")


@pytest.fixture(scope="module")
def usfm(official, tmp_path_factory):
    return teacher_of(official, tmp_path_factory.mktemp("usfm"))


@pytest.fixture(scope="module")
def found(usfm):
    return tokens(usfm)


def test_all_outputs_agree(usfm, found):
    with torch.inference_mode():
        said = usfm(IMAGE)
    synthetic.assert_golden("usfm", {**found, "gap_fcnorm_identity": said.pooled})
    assert said.grid.shape == (1, 768, 14, 14) and said.logits is None and not usfm.is_random
    torch.testing.assert_close(said.grid.flatten(2).transpose(1, 2), found["tokens_block12"][:, 1:])


def test_tables_of_each_block_give_the_same(official, tmp_path):
    state = {f"backbone.{k}": v for k, v in official.items() if not k.startswith("rel_pos_bias")}
    for i in range(12):
        state[f"backbone.blocks.{i}.attn.relative_position_bias_table"] = official[TABLE].clone()
    found = tokens(teacher_of({"model": state}, tmp_path))
    synthetic.assert_golden("usfm", found, without=("gap_fcnorm_identity",))


def test_mistakes_are_noticed(usfm, found):
    backbone = usfm.network["backbone"]
    with synthetic.wrong_epsilon(backbone):
        wrong = tokens(usfm)
    synthetic.assert_epsilon_noticed("usfm", found, wrong)
    block = backbone.blocks[6]
    for mistake in (
        synthetic.query_value_swapped(block.attn),
        synthetic.norms_swapped(block),
        synthetic.exchanged(block.gamma_1, block.gamma_2),
        synthetic.exchanged(block.attn.q_bias, block.attn.v_bias),
    ):
        with mistake:
            synthetic.assert_noticed("usfm", tokens(usfm))
    table = backbone.rel_pos_bias.relative_position_bias_table
    transposed = torch.cat([table[:-3].view(27, 27, 12).transpose(0, 1).reshape(729, 12), table[-3:]])
    with synthetic.exchanged(table, transposed):
        synthetic.assert_noticed("usfm", tokens(usfm))
    synthetic.assert_noticed("usfm", tokens(usfm, pixels=usfm.prepare(IMAGE.flip(1))))  # BGR
    synthetic.assert_noticed("usfm", tokens(usfm, pixels=IMAGE))  # no ImageNet statistics
    synthetic.assert_golden("usfm", tokens(usfm), without=("gap_fcnorm_identity",))


def test_another_size_resizes_the_table_and_keeps_its_orientation(official, tmp_path):
    state = dict(official)
    ramp = torch.arange(27.0)[:, None] * 10 + torch.arange(27.0)[None]  # rows differ from columns
    state[TABLE] = torch.cat([ramp.reshape(-1, 1).repeat(1, 12), official[TABLE][-3:]])
    table = teacher_of(state, tmp_path, image_size=320).network["backbone"].rel_pos_bias.relative_position_bias_table
    expected = resize_rel_pos_bias_table(state[TABLE], (20, 20), (39 * 39 + 3, 12))
    assert torch.equal(table, expected) and torch.isfinite(table).all()
    grown = table[:-3, 0].view(39, 39)
    assert float((grown[-1] - grown[0]).mean()) == pytest.approx(260, rel=0.05)  # rows stay rows


@pytest.fixture(scope="module")
def upernet(tmp_path_factory):
    return teacher_of({"model": synthetic.state("usfm_upernet224")}, tmp_path_factory.mktemp("upernet"))


@torch.inference_mode()
def upernet_outputs(teacher):
    backbone = teacher.network["backbone"]
    maps = backbone.forward_intermediates(teacher.prepare(IMAGE), indices=[3, 5, 7, 11], intermediates_only=True)
    features = {f"feat{i}": m for i, m in enumerate(pyramid(backbone, maps))}
    return {**features, "decode_logits": teacher(IMAGE).logits}


def test_a_segmentation_network_agrees(upernet):
    synthetic.assert_golden("usfm_upernet224", upernet_outputs(upernet), without=("aux_logits",))  # for training alone
    with synthetic.query_value_swapped(upernet.network["backbone"].blocks[10].attn):
        synthetic.assert_noticed("usfm_upernet224", upernet_outputs(upernet))
    convs = upernet.network["decode_head"].fpn_convs
    with synthetic.exchanged(convs[0].conv.weight, convs[1].conv.weight):
        synthetic.assert_noticed("usfm_upernet224", upernet_outputs(upernet))


def test_a_segmentation_network_of_512_pixels_loads(tmp_path):
    teacher = teacher_of(synthetic.state("usfm_upernet"), tmp_path)
    assert teacher.image_size == 512 and teacher.network["decode_head"].conv_seg.weight.shape == (2, 768, 1, 1)
