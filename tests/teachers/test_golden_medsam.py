"""MedSAM in both layouts computes what its authors' code computed."""

import re

import pytest
import torch
from reference import fill, synthetic

from amkd_monai.teachers.medsam import MedSAMTeacher, from_hugging_face
from amkd_monai.weights import state_hash

pytestmark = pytest.mark.slow
BOX_A = [[128.0, 256.0, 640.0, 768.0]]

RAW_TO_HUB = [  # as `transformers` names the parts
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.blocks\.", ".layers."),
    (r"\.neck\.0\.", ".neck.conv1."),
    (r"\.neck\.1\.", ".neck.layer_norm1."),
    (r"\.neck\.2\.", ".neck.conv2."),
    (r"\.neck\.3\.", ".neck.layer_norm2."),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(mlps\.\d|prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
]
GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


def hub_layout(raw):
    named = {}
    for key, value in raw.items():
        if key == GAUSSIAN:
            named["shared_image_embedding.positional_embedding"] = value
            named["prompt_encoder.shared_embedding.positional_embedding"] = value
            continue
        for pattern, replacement in RAW_TO_HUB:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    return named


@pytest.fixture(scope="module")
def official():
    return synthetic.state("medsam")


@pytest.fixture(scope="module")
def run(official, tmp_path_factory):
    """The teacher, its outputs on input A, and what entered its last block."""
    path = tmp_path_factory.mktemp("medsam") / "medsam_vit_b.pth"
    torch.save({"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 3}, path)  # as a trainer saves
    teacher = MedSAMTeacher("medsam", path, grid_limit=64)
    path.unlink()
    image, entered = torch.from_numpy(fill.pattern(1024)).float()[None], {}
    encoder = teacher.network["image_encoder"]
    hook = encoder.blocks[-1].register_forward_pre_hook(lambda module, x: entered.update(x=x[0].clone()))
    with torch.inference_mode(), synthetic.timed("one image"):
        said = teacher(image)
    hook.remove()
    return teacher, said, entered["x"]


def decoded(teacher, embedding):
    box = torch.tensor(BOX_A)
    with torch.inference_mode():
        logits, overlap = teacher.answer(embedding, box)
        sparse, _ = teacher.network["prompt_encoder"](points=None, boxes=box[:, None], masks=None)
        dense = teacher.network["prompt_encoder"].get_dense_pe()
    return {"sparse": sparse, "dense_pe": dense, "low_res_logits": logits, "iou": overlap}


def test_all_outputs_agree(run):
    teacher, said, _ = run
    synthetic.assert_golden("medsam", {"image_embedding": said.grid, **decoded(teacher, said.grid)})
    torch.testing.assert_close(said.pooled, said.grid.mean((2, 3)))
    assert not teacher.is_random and teacher.weights_file["file"] == "medsam_vit_b.pth"


def test_mistakes_in_the_decoder_are_noticed(run):
    teacher, said, _ = run
    decoder = teacher.network["mask_decoder"]
    with synthetic.wrong_epsilon(decoder, 1e-6):  # what transformers takes by default
        wrong = decoded(teacher, said.grid)
    synthetic.assert_epsilon_noticed("medsam", decoded(teacher, said.grid), wrong)
    attention = decoder.transformer.layers[1].self_attn
    with synthetic.exchanged(attention.q_proj.weight, attention.v_proj.weight):
        synthetic.assert_noticed("medsam", decoded(teacher, said.grid))
    wrong_box = decoded(teacher, said.grid.transpose(2, 3).contiguous())
    synthetic.assert_noticed("medsam", wrong_box)
    synthetic.assert_golden("medsam", decoded(teacher, said.grid), without=("image_embedding",))


def test_mistakes_in_the_encoder_are_noticed(run):
    teacher, said, entered = run
    encoder = teacher.network["image_encoder"]
    block = encoder.blocks[-1]

    def embedding():
        with torch.inference_mode():
            return {"image_embedding": encoder.neck(block(entered).permute(0, 3, 1, 2))}

    torch.testing.assert_close(embedding()["image_embedding"], said.grid)
    with synthetic.query_value_swapped(block.attn):
        synthetic.assert_noticed("medsam", embedding())
    with synthetic.exchanged(block.attn.rel_pos_h, block.attn.rel_pos_w):
        synthetic.assert_noticed("medsam", embedding())


def test_a_wrong_epsilon_in_the_encoder_is_noticed(run):
    encoder = run[0].network["image_encoder"]
    with torch.inference_mode(), synthetic.wrong_epsilon(encoder):
        embedding = encoder(torch.from_numpy(fill.pattern(1024)).float()[None])
    synthetic.assert_epsilon_noticed("medsam", {"image_embedding": run[1].grid}, {"image_embedding": embedding})


def test_the_hub_layout_gives_the_same_network(run, official, tmp_path):
    teacher, _, _ = run
    named = hub_layout(official)
    assert {k: tuple(v.shape) for k, v in named.items()} == fill.keys("medsam_hf")
    renamed = from_hugging_face(named, None)
    assert renamed.keys() == official.keys() and all(torch.equal(v, official[k]) for k, v in renamed.items())
    del named["prompt_encoder.shared_embedding.positional_embedding"]  # safetensors files keep one of two tied tensors
    torch.save(named, tmp_path / "pytorch_model.bin")
    again = MedSAMTeacher("medsam", tmp_path / "pytorch_model.bin", grid_limit=64)
    (tmp_path / "pytorch_model.bin").unlink()
    assert state_hash(again.network.state_dict()) == state_hash(teacher.network.state_dict())
    assert again.fingerprint == teacher.fingerprint
