"""Which files are taken, and what is said of the others."""

import pytest
import torch
from reference.biomedparse_fill import filled
from safetensors.torch import save_file

from amkd_monai.teachers.biomedparse import BiomedParse, BiomedParseTeacher, FocalBackbone, Sizes, official_name
from amkd_monai.weights import CheckpointError

SIZES = {"backbone": 8, "depths": [1, 1, 1, 1], "width": 32, "heads": 2, "hidden": 8, "queries": 3}
PROJECTION = "sem_seg_head.predictor.lang_encoder.lang_proj"
UNUSED = {
    "dilation_kernel": torch.zeros(1, 1, 3, 3),
    "criterion.empty_weight": torch.zeros(17),
    "sem_seg_head.predictor.pn_indicator.weight": torch.zeros(2, 32),
    "sem_seg_head.predictor.mask_sptial_embed.1": torch.zeros(32, 32),
    "sem_seg_head.predictor.lang_encoder.biomed_encoder.pooler.dense.bias": torch.zeros(768),
}


@pytest.fixture(scope="module")
def state():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in BiomedParse(Sizes(**SIZES)).state_dict().items()}
    return {key: filled(key, shape) for key, shape in shapes.items()}


def load(path):
    return BiomedParseTeacher("b", path, token_ids=[[49406, 12639, 49407]], sizes=SIZES)


def assert_loaded(path, state):
    own = load(path).network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def test_the_official_layout_with_and_without_what_is_unused(state, tmp_path):
    torch.save({**state, **UNUSED}, tmp_path / "whole.pt")
    save_file(state, tmp_path / "short.safetensors")
    assert_loaded(tmp_path / "whole.pt", state)
    assert_loaded(tmp_path / "short.safetensors", state)


@pytest.mark.parametrize("prefix", ["model.", "module.", "module.model."])
def test_files_of_the_authors_trainer(state, tmp_path, prefix):
    tuned = {prefix + key: value for key, value in {**state, **UNUSED}.items()}
    torch.save(tuned, tmp_path / "flat.pt")
    torch.save({"module": tuned}, tmp_path / "contained.pt")
    assert_loaded(tmp_path / "flat.pt", state)
    assert_loaded(tmp_path / "contained.pt", state)


@pytest.mark.parametrize(
    "change, words",
    [
        ({PROJECTION: None}, ["1 missing", PROJECTION]),
        ({"backbone.layers.0.downsample.proj.weight": None}, ["1 missing", "backbone.layers.0.downsample.proj.weight"]),
        ({"backbone.extra": torch.zeros(1)}, ["1 unexpected", "backbone.extra"]),
        ({PROJECTION: torch.zeros(32, 31)}, ["1 of another shape", PROJECTION]),
        ({"backbone.layers.1.blocks.0.mlp.fc1.weight": torch.zeros(64, 16, 1, 1)}, ["1 of another shape", "mlp.fc1"]),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(state, tmp_path, change, words):
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "wrong.pt")
    refused(tmp_path / "wrong.pt", *words)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_version_2_is_called_by_its_name(state, tmp_path, prefix):
    second = {prefix + key.replace(".lang_encoder.", ".language_encoder."): value for key, value in state.items()}
    torch.save({"state_dict": second}, tmp_path / "wrong.pt")
    refused(tmp_path / "wrong.pt", "BiomedParse v2", "biomedparse_v1.pt")


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        load(path)
    sentence = str(error.value)
    assert "wrong.pt" in sentence and "\n" not in sentence and sentence.endswith(".")
    assert all(word in sentence for word in words), sentence


def test_the_backbone_speaks_the_official_names():
    backbone = FocalBackbone(8, (1, 1, 1, 1))
    state = backbone.state_dict()
    assert set(state) == {official_name(name) for name, _ in backbone.named_parameters()}
    assert state["layers.0.downsample.proj.weight"].shape == (16, 8, 3, 3)
    assert state["layers.0.blocks.0.gamma_1"].shape == (8,)
    assert state["layers.3.blocks.0.modulation.f.weight"].shape == (2 * 64 + 5, 64)
    assert state["layers.3.blocks.0.modulation.h.weight"].shape == (64, 64, 1, 1)
    changed = {key: value + 1 for key, value in state.items()}
    backbone.load_state_dict(changed)
    again = backbone.state_dict()
    assert all(torch.equal(again[key], changed[key]) for key in changed)
    assert backbone.load_state_dict({}, strict=False).missing_keys
