"""What the foundation teachers have in common, shown on tiny variants of the same classes."""

import pytest
import torch
from teachers.tiny_teachers import TINY, official_state, tiny

from amkd_monai.teachers.base import build_teacher
from amkd_monai.weights import CheckpointError, file_sha256


def images(height=50, width=70, batch=2, seed=0):
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def from_file(which, path, **options):
    return tiny(which, **{**options, "weights": str(path)})


@pytest.mark.parametrize("which", TINY)
def test_images_of_any_size_give_grids_of_one_size(which):
    teacher = tiny(which)
    for x in (images(), images(130, 31, batch=1)):
        said = teacher(x)
        assert said.grid.shape[:1] == said.pooled.shape[:1] == x.shape[:1]
        assert said.grid.shape[2:] == (4, 4) and said.grid.shape[1] == said.pooled.shape[1]
        assert not said.grid.requires_grad and said.grid.dtype == torch.float32
    assert tiny(which, grid_limit=2)(images()).grid.shape[-2:] == (2, 2)


@pytest.mark.parametrize("which", TINY)
def test_an_image_is_answered_alike_alone_and_in_a_batch(which):
    teacher, x = tiny(which), images(batch=3)
    together, alone = teacher(x), teacher(x[1:2])
    torch.testing.assert_close(together.grid[1:2], alone.grid, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together.grid[0], together.grid[1], atol=1e-3)


@pytest.mark.parametrize("which", TINY)
def test_random_weights_are_marked_and_the_same_each_time(which):
    state = torch.random.get_rng_state()
    first, second = tiny(which), tiny(which)
    assert first.is_random and first.weights_file is None
    assert first.fingerprint == second.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers go on as before"


@pytest.mark.parametrize("which", TINY)
def test_a_file_in_the_official_layout_gives_the_same_teacher(which, tmp_path):
    written, path = tiny(which), tmp_path / "weights.pth"
    for parameter in written.network.parameters():
        parameter.data.add_(0.01)
    torch.save({"model": {f"module.{k}": v for k, v in official_state(which, written).items()}}, path)
    loaded = from_file(which, path)
    assert not loaded.is_random and loaded.fingerprint == written.fingerprint != tiny(which).fingerprint
    assert loaded.weights_file == {"file": "weights.pth", "sha256": file_sha256(path)}
    assert torch.equal(loaded(images()).grid, written(images()).grid)


@pytest.mark.parametrize("which", TINY)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s, k: s.pop(k), "missing"),
        (lambda s, k: s.update(surplus=torch.zeros(1)), "unexpected"),
        (lambda s, k: s.update({k: torch.zeros(3, 3)}), "another shape"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_the_key(which, change, word, tmp_path):
    state = official_state(which)
    key = next(k for k in state if k.endswith("blocks.1.mlp.fc1.weight") or k.endswith("blocks.1.mlp.lin1.weight"))
    change(state, key)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error:
        from_file(which, tmp_path / "weights.pth")
    text = str(error.value)
    assert word in text and (key.split(".", 1)[1] in text or word == "unexpected"), text
    assert "\n" not in text and text.endswith(".") and str(tmp_path / "weights.pth") in text


@pytest.mark.parametrize("which", TINY)
def test_the_fingerprint_sees_weights_and_preprocessing(which):
    changed = tiny(which)
    next(changed.network.parameters()).data.add_(1e-3)
    others = [changed, tiny(which, grid_limit=2), tiny(which, precision="bfloat16")]
    if which != "medsam":
        others.append(tiny(which, image_size=224))
    assert len({tiny(which).fingerprint, *(t.fingerprint for t in others)}) == len(others) + 1


@pytest.mark.parametrize("which", TINY)
def test_colours_are_not_interchangeable(which):
    teacher = tiny(which)
    assert not torch.allclose(teacher(images()).grid, teacher(images().flip(1)).grid, atol=1e-3)


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("medsam", {"prompt": "point"}, ("point", "whole_image")),
        ("medsam", {"image_size": 70}, ("70", "16")),
        ("medsam", {"precision": "float16"}, ("float16", "bfloat16")),
        ("retfound", {"variant": "mae"}, ("mae_natureCFP",)),
        ("retfound", {"framing": "pad"}, ("pad", "squash")),
        ("retfound_dinov2", {"image_size": 64}, ("64", "14")),
        ("usfm", {"image_size": 100}, ("100", "16")),
    ],
)
def test_options_that_are_not_understood_are_named(which, options, words):
    with pytest.raises(ValueError) as error:
        tiny(which, **options)
    text = str(error.value)
    assert which in text and all(word in text for word in words) and text.endswith(".")


def test_medsam_files_know_one_size_only(tmp_path):
    torch.save(official_state("medsam"), tmp_path / "medsam_vit_b.pth")
    with pytest.raises(CheckpointError, match="64 pixels, not 128"):
        from_file("medsam", tmp_path / "medsam_vit_b.pth", image_size=128)


@pytest.mark.parametrize(("which", "size"), [("retfound", 96), ("retfound_dinov2", 84), ("usfm", 96)])
def test_other_sizes_are_supported_where_positions_can_be_resized(which, size, tmp_path):
    torch.save(official_state(which), tmp_path / "weights.pth")
    larger = from_file(which, tmp_path / "weights.pth", image_size=size)
    assert larger(images()).grid.shape[-2:] == (6, 6)


def test_missing_weights_are_one_sentence_that_says_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMKD_WEIGHTS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind, file in (
        ("medsam", "medsam_vit_b.pth"),
        ("retfound", "natureCFP"),
        ("usfm", "USFM_latest.pth"),
        ("biomedparse", "v1.pt"),
    ):
        options = {} if kind != "biomedparse" else {"token_ids": TINY[kind]["token_ids"]}
        for weights_dir in (None, str(tmp_path)):
            with pytest.raises(CheckpointError) as error:
                build_teacher({"name": "t", "kind": kind, **options}, weights_dir)
            text = str(error.value)
            assert file in text and "\n" not in text and text.endswith(".")
        with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent\.pth"):
            build_teacher({"name": "t", "kind": kind, **options, "weights": "absent.pth"})


def test_weights_are_found_by_their_official_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(official_state("usfm"), tmp_path / "USFM_latest.pth")
    options = {k: v for k, v in TINY["usfm"].items() if k != "weights"}
    monkeypatch.setenv("AMKD_WEIGHTS", str(tmp_path))
    assert not build_teacher({"name": "u", **options}).is_random
    monkeypatch.delenv("AMKD_WEIGHTS")
    assert not build_teacher({"name": "u", **options}, str(tmp_path)).is_random
    assert not build_teacher({"name": "u", **options, "weights": str(tmp_path)}).is_random


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retfound", "usfm"])
def test_bfloat16_is_faithful_at_full_size(kind):
    teacher, x = build_teacher({"name": "t", "kind": kind, "weights": "random"}), images(224, 224, batch=1)
    with torch.inference_mode():
        exact = teacher(x)
        teacher.precision = "bfloat16"
        rounded = teacher(x)
    for name in ("grid", "pooled"):
        a, b = getattr(exact, name), getattr(rounded, name)
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert float(torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))) > 0.9999, name
