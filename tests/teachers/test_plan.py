"""What is known of teachers before they are asked, against what they then do."""

import pytest
import torch
from teachers.tiny_teachers import OFFICIAL, TINY, official_state, tiny, write_official
from torch import nn

from amkd_monai.teachers import plan
from amkd_monai.teachers.plan import check, estimate, refuse_changed
from amkd_monai.weights import CheckpointError

POLYP = ("background", "polyp")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("weights"))


def described(which, **options):
    return {"name": which, **TINY[which], **options}


def from_file(which, **options):
    return {k: v for k, v in described(which, **options).items() if k != "weights"}


@pytest.mark.parametrize("which", [*TINY, "timm"])
def test_shapes_are_those_of_the_outputs(which):
    lite = {"name": "lite", "kind": "timm", "model": "tf_efficientnet_lite0", "weights": "random"}
    assert not plan.plan(lite, size=(96, 64)).shapes, "its features are of images as they come"
    description = {**lite, "image_size": [96, 64]} if which == "timm" else described(which)
    found = plan.plan(description)
    outputs = plan.build_teacher(description)(torch.rand(1, 3, 96, 64))
    values = {name: getattr(outputs, name) for name in plan.OUTPUTS}
    assert found.shapes == {name: value.shape[1:] for name, value in values.items() if value is not None}
    assert found.image_size == ((96, 64) if which == "timm" else TINY[which]["image_size"])
    assert found.bytes_per_image() == 2 * sum(value.numel() for value in values.values() if value is not None)
    if "grid" in found.shapes:
        assert found.bytes_per_image() - found.bytes_per_image("int8") == values["grid"].numel()
    assert found.flops > 1e6


def test_costs_are_counted():
    """A ViT with n tokens of width d: 24 n d^2 + 4 n^2 d per block, and the patches."""
    n, d, blocks = 17, 48, 4
    found = plan.plan(described("usfm"))
    assert found.flops == pytest.approx(blocks * (24 * n * d**2 + 4 * n**2 * d) + 2 * 16 * 768 * d, rel=0.01)
    weights = sum(p.numel() for p in tiny("usfm").parameters()) * 4
    assert weights < found.memory < 2 * weights
    text = estimate([found], 1000)
    assert "usfm" in text and f"{found.bytes_per_image() / 1000:.0f} MB" in text and "1000 images" in text


def test_nothing_is_read_but_names_and_shapes(weights, monkeypatch):
    monkeypatch.setattr(plan.Path, "read_bytes", None)
    monkeypatch.setattr("amkd_monai.teachers.base.file_sha256", None)
    for which, file in OFFICIAL.items():
        found = plan.plan(from_file(which), str(weights))
        assert found.file[0] == weights / file and found.shapes


def test_a_file_of_another_network_is_refused_by_its_first_key(tmp_path, weights):
    state = official_state("usfm") | {"norm.weight": torch.ones(7)}
    torch.save(state, tmp_path / OFFICIAL["usfm"])
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        check([from_file("usfm")], POLYP, False, str(tmp_path))
    (tmp_path / OFFICIAL["medsam"]).write_text("<html>")
    with pytest.raises(CheckpointError, match="web page"):
        check([from_file("medsam")], POLYP, False, str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        check([described("usfm", weights=str(tmp_path / "gone.pth"))], POLYP, False)


WRONG = [
    (described("biomedparse", token_ids=TINY["biomedparse"]["token_ids"] * 2), "2 prompts.*polyp"),
    (described("usfm_upernet", num_classes=5), "5 classes.*2 classes"),
    (described("usfm", image_sise=64), "image_sise"),
    ({"name": "own", "kind": "no.such.Teacher"}, "no.such.Teacher"),
    ({"name": "fold", "kind": plan.VOLUMES}, "needs a network"),
    ({"name": "fold", "kind": plan.VOLUMES, "network": nn.Identity(), "epoch": 3}, "no option 'epoch'"),
    ({"name": "fold", "kind": plan.VOLUMES, "network": nn.Conv3d(1, 5, 1)}, "5 classes, the task has 2"),
]


@pytest.mark.parametrize(("description", "text"), WRONG)
def test_what_cannot_teach_a_task_is_refused(description, text):
    with pytest.raises(ValueError, match=text):
        check([described("usfm"), description], POLYP, False, size=(64, 64))


def test_answers_must_be_of_the_kind_of_the_task(weights):
    with pytest.raises(ValueError, match="one answer per image"):
        check([described("usfm_upernet")], POLYP, True)
    check([described("usfm_upernet", own_answers=False), described("biomedparse", token_ids=[])], POLYP, True)


def test_a_specialist_is_tried_before_it_is_asked(tmp_path):
    torch.jit.script(nn.Conv2d(3, 4, 1)).save(tmp_path / "four.ts")
    with pytest.raises(ValueError, match=r"4 classes.*2 classes"):
        check([{"name": "s", "kind": "specialist", "path": str(tmp_path / "four.ts")}], POLYP, False, size=(32, 48))


def test_a_gpu_that_is_too_small_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**20))
    with pytest.raises(ValueError, match=r"'biomedparse' needs at least .* GB, cuda:0 has"):
        check([described("biomedparse")], POLYP, False, device="cuda:0")


def test_a_file_that_changes_during_the_preparation_is_noticed(tmp_path):
    torch.save(official_state("usfm"), tmp_path / OFFICIAL["usfm"])
    plans = check([from_file("usfm")], POLYP, False, str(tmp_path))
    refuse_changed(plans)
    torch.save(official_state("usfm") | {"more": torch.ones(3)}, tmp_path / OFFICIAL["usfm"])
    with pytest.raises(ValueError, match=r"USFM_latest\.pth.*'usfm' changed"):
        refuse_changed(plans)
