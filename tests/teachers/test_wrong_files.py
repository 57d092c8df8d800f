"""A wrong or damaged weight file is told in one sentence that says what it is; nothing in it is executed."""

import argparse
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from teachers.tiny_teachers import SIZES, TINY, official_state

from amkd_monai.teachers.base import build_teacher
from amkd_monai.weights import CheckpointError, load_state_dict


def build(which, path, **options):
    return build_teacher({"name": "t", **TINY[which], **options, "weights": str(path)})


def sentence(which, path, **options):
    with pytest.raises(CheckpointError) as error:
        build(which, path, **options)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and text.endswith("."), text
    return text


def zeros(*names):
    return {name: torch.zeros(1) for name in names}


def sam(width):
    return {"image_encoder.pos_embed": torch.zeros(1, 1, 1, width), "mask_decoder.iou_token.weight": torch.zeros(1, 4)}


OTHERS = {
    "LiteMedSAM": zeros("image_encoder.layers.0.blocks.0.conv1.c.weight", "mask_decoder.iou_token.weight"),
    "MedSAM2": zeros("image_encoder.trunk.pos_embed", "memory_encoder.fuser.layers.0.gamma"),
    "SAM ViT-L": sam(1024),
    "SAM ViT-H": sam(1280),
    "BiomedParse v2": {"state_dict": zeros("model.sem_seg_head.predictor.query_feat.weight", "model.backbone.x")},
    "TinyUSFM": {
        "model": {
            "module.model.cls_token": torch.zeros(1, 1, 192),
            "module.model.blocks.0.attn.qkv.weight": torch.zeros(1),
        }
    },
    "DINOv2": {"teacher": zeros("backbone.blocks.0.ls1.gamma", "backbone.cls_token", "dino_head.last_layer.weight")},
}


@pytest.mark.parametrize("which", ["medsam", "retfound", "usfm", "biomedparse"])
@pytest.mark.parametrize("other", OTHERS)
def test_files_of_other_networks_are_refused(which, other, tmp_path):
    torch.save(OTHERS[other], tmp_path / "weights.pth")
    sentence(which, tmp_path / "weights.pth")


@pytest.mark.parametrize("which", TINY)
@pytest.mark.parametrize("other", TINY)
def test_the_teachers_files_are_not_mistaken_for_each_other(which, other, tmp_path):
    if which.split("_")[0] == other.split("_")[0] and which.startswith("usfm"):
        return  # one adapter reads both
    torch.save(official_state(other), tmp_path / "weights.pth")
    if which == other:
        assert not build(which, tmp_path / "weights.pth").is_random
    else:
        sentence(which, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["doctor_7.pth", "october.pth", "retfound_proctor.pth", "OCTAGON.pth"])
def test_three_letters_within_a_word_are_not_oct(name, tmp_path):
    torch.save(official_state("retfound"), tmp_path / name)
    assert not build("retfound", tmp_path / name).is_random


@pytest.mark.parametrize(
    ("which", "key", "shape"),
    [
        ("usfm", "blocks.0.attn.relative_position_bias_table", (51,)),
        ("usfm", "blocks.0.attn.relative_position_bias_table", (50, 3)),
        ("usfm", "rel_pos_bias.relative_position_bias_table", ()),
        ("usfm", "rel_pos_bias.relative_position_bias_table", (2, 3)),
        ("usfm", "rel_pos_bias.relative_position_bias_table", (0, 3)),
        ("usfm_upernet", "decode_head.conv_seg.weight", (2,)),
        ("usfm_upernet", "decode_head.conv_seg.weight", ()),
        ("retfound", "head.weight", ()),
        ("retfound", "head.weight", (5,)),
        ("retfound", "pos_embed", (17,)),
        ("retfound", "pos_embed", (1, 16, 48)),
        ("retfound", "pos_embed", (2, 5, 48)),
        ("retfound", "pos_embed", (1, 0, 48)),
        ("retfound_dinov2", "backbone.pos_embed", (1, 7)),
        ("medsam", "image_encoder.pos_embed", ()),
        ("medsam", "image_encoder.pos_embed", (1, 32)),
    ],
)
def test_a_tensor_that_gives_the_size_but_has_another_layout_is_named(which, key, shape, tmp_path):
    torch.save(official_state(which) | {key: torch.zeros(shape)}, tmp_path / "weights.pth")
    text = sentence(which, tmp_path / "weights.pth")
    assert key.removeprefix("backbone.") in text and ("x".join(map(str, shape)) or "single number") in text


@pytest.mark.parametrize("which", TINY)
@pytest.mark.parametrize("size", [[64, 128], 100, "64"], ids=str)
def test_foundation_teachers_take_squares_of_whole_patches(which, size):
    with pytest.raises(ValueError, match="multiple"):
        build_teacher({"name": "t", **TINY[which], "image_size": size})


def test_oct_weights_are_not_taken_for_fundus_photographs(tmp_path):
    for file in ("RETFound_mae_natureOCT.pth", "RETFound_oct_weights.pth"):
        torch.save(official_state("retfound"), tmp_path / file)
        assert "OCT" in sentence("retfound", tmp_path / file)
        assert not build("retfound", tmp_path / file, variant="mae_natureOCT").is_random
    torch.save(official_state("retfound"), tmp_path / "RETFound_mae_natureCFP.pth")
    assert "fundus" in sentence("retfound", tmp_path / "RETFound_mae_natureCFP.pth", variant="mae_natureOCT")


@pytest.mark.parametrize("which", ["medsam", "retfound", "usfm", "biomedparse"])
def test_a_web_page_half_a_download_and_an_empty_file(which, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("<!DOCTYPE html><title>Google Drive - Virus scan warning</title>")
    assert "web page" in sentence(which, path)
    torch.save(official_state(which), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "cut off" in sentence(which, path) and str(len(content) // 2) in sentence(which, path)
    path.write_bytes(b"")
    assert "empty" in sentence(which, path)


class WritesAFile:
    """Unpickling an instance creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"model": official_state("usfm"), "config": WritesAFile(proof)}, path)
    text = sentence("usfm", path)
    assert "Path.touch" in text or "pathlib" in text or "getattr" in text, text
    assert "state_dict()" in text and "weights_only" not in text and not proof.exists()
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(WritesAFile(proof)))
    assert proof.exists()  # it would have run


def test_options_of_the_training_script_are_let_through(tmp_path):
    arguments = argparse.Namespace(lr=1e-3, output_dir="./out", nested=argparse.Namespace(x=[1, 2]))
    torch.save({"model": official_state("retfound"), "args": arguments, "epoch": 799}, tmp_path / "weights.pth")
    assert not build("retfound", tmp_path / "weights.pth").is_random


@pytest.fixture
def as_nobody():
    """Root reads everything: let the operating system judge this process as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(params=["file", "folder"])
def forbidden(request):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(official_state("usfm"), folder / "weights.pth")
        folder.chmod(0o755 if request.param == "file" else 0o600)
        (folder / "weights.pth").chmod(0 if request.param == "file" else 0o644)
        if request.param == "folder" and os.geteuid() != 0:
            folder.chmod(0)
        yield folder / "weights.pth"
        folder.chmod(0o755)


def test_a_file_that_may_not_be_read_is_named(forbidden, as_nobody):
    assert "cannot be read" in sentence("usfm", forbidden)


def test_a_file_that_fits_another_size_of_the_network_is_named(tmp_path):
    torch.save(official_state("retfound"), tmp_path / "weights.pth")
    assert "missing" in sentence("retfound", tmp_path / "weights.pth", sizes={**SIZES, "depth": 6})
    assert "another shape" in sentence("retfound", tmp_path / "weights.pth", sizes={**SIZES, "embed_dim": 32})
