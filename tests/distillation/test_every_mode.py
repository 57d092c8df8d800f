"""Every loss in every mode reaches the student, changes its step, leaves targets alone and comes back from a file."""

import copy

import pytest
import torch
from toy_problem import GATES, LOSS_GATES, generator, make_batch, make_distiller, spec, student_gradient

from amkd_monai.distillation import SampleTable

TWO = [spec("a"), spec("b", grid=(5, 3, 3), logits=(2, 4, 4))]
LOSSES = {"output": 1.0, "overlap": 1.0, "feature": 0.2, "reconstruction": 0.2, "contrastive": 0.1}
STRENGTH = {"warmup": 0.0, "decay": 0.0}
SAMPLES = SampleTable({t: torch.randn((9, 6), generator=generator(3)) for t in "ab"}, torch.arange(9))


def distiller_of(**options):
    defaults = {"losses": LOSSES, "return_code": "learned", "samples": SAMPLES, "loss_strength": STRENGTH}
    return make_distiller(TWO, **{**defaults, **options})


def batch_of(seed=0, size=3):
    batch = make_batch(TWO, size, seed=seed, has_label=[True, False, True][:size])
    batch.index = torch.arange(size) + seed
    return batch


def step_of(distiller, batch):
    distiller = copy.deepcopy(distiller)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller(batch).total.backward()
    optimiser.step()
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_reaches_the_student_under_each_gate_and_its_removal_changes_the_step(gate, name):
    distiller, batch = distiller_of(gate=gate), batch_of()
    distiller(batch).losses[name].sum().backward()
    assert distiller.student.a.weight.grad.abs().sum() > 1e-7
    distiller.zero_grad()
    with_loss = step_of(distiller, batch)
    without = step_of(distiller_of(gate=gate, losses={**LOSSES, name: 0.0}), batch)
    assert (with_loss - without).abs().max() > 1e-7


@pytest.mark.parametrize("mode", LOSS_GATES)
def test_every_loss_gate_gives_all_losses_and_no_gradient_to_targets(mode):
    batch = batch_of()
    for maps in batch.teachers.values():
        for value in maps.values():
            value.requires_grad_()
    distiller = distiller_of(loss_gate=mode)
    out = distiller(batch)
    assert set(LOSSES) | {"task"} <= set(out.losses) == set(out.loss_weights)
    assert "autoencoder" in out.losses
    assert mode == "paper" or out.loss_weights["task"] == 1.0
    torch.testing.assert_close(out.total, sum(float(out.loss_weights[n]) * v.mean() for n, v in out.losses.items()))
    out.total.backward()
    assert all(v.grad is None for maps in batch.teachers.values() for v in maps.values())
    assert torch.isfinite(student_gradient(distiller)).all() and student_gradient(distiller).abs().sum() > 0
    trained = [n for n, p in distiller.loss_gate.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert bool(trained) == (mode == "paper")


def test_encoder_and_decoder_learn_from_their_own_loss_only():
    distiller, batch = distiller_of(), batch_of()
    out = distiller(batch)
    (out.losses["feature"].sum() + out.losses["reconstruction"].sum()).backward()
    assert all(p.grad is None for p in distiller.codes.parameters())
    assert all(p.grad is not None for p in distiller.align.parameters())
    distiller.zero_grad()
    distiller(batch).losses["autoencoder"].sum().backward()
    assert student_gradient(distiller).abs().sum() == 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.codes.parameters())
    assert all(p.grad is None for p in distiller.align.parameters())


def test_the_contrast_alone_needs_no_feature_maps_of_the_batch():
    distiller, batch = distiller_of(losses={"contrastive": 1.0}, return_code="none"), batch_of()
    for maps in batch.teachers.values():
        del maps["grid"]
    out = distiller(batch)
    assert out.losses["contrastive"].shape == (3,) and len(distiller.align) == 0
    assert out.teacher_weights["contrastive"].shape == (3, 2)


@pytest.mark.parametrize("gate", ["learned", "paper"])
@pytest.mark.parametrize("mode", ["agreement", "paper"])
def test_all_state_comes_back_bit_for_bit(gate, mode):
    options = {"gate": gate, "loss_gate": mode, "contrastive": {"negatives": 3}, "scale_steps": 3}
    if mode == "agreement":
        options["loss_gate_options"] = {"every": 2}
    first = distiller_of(**options)
    optimiser = torch.optim.SGD(first.parameters(), lr=0.05)

    def advance(distiller, optimiser, seed):
        out = distiller(batch_of(seed), progress=0.5)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        return out

    for seed in range(3):
        advance(first, optimiser, seed)
    second = distiller_of(seed=9, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = torch.optim.SGD(second.parameters(), lr=0.05)
    for seed in range(3, 6):
        a, b = advance(first, optimiser, seed), advance(second, other, seed)
        assert torch.equal(a.total, b.total) and a.loss_weights == b.loss_weights
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert any(k.startswith("teacher_gate.") for k in first.state_dict())


def test_an_evaluation_changes_no_state():
    distiller = distiller_of(gate="learned", loss_gate="agreement").eval()
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    distiller(batch_of())
    assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())


def test_it_can_be_copied_after_a_step():
    distiller = distiller_of(gate="paper", loss_gate="paper")
    distiller(batch_of()).total.backward()
    copy.deepcopy(distiller)


def test_it_runs_under_autocast():
    distiller = distiller_of(gate="learned", loss_gate="agreement", return_code="learned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(batch_of())
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in out.losses.values())
    out.total.backward()
    assert torch.isfinite(student_gradient(distiller)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_gate": "oracle"}, ("oracle", "agreement")),
        ({"return_code": "oracle"}, ("oracle", "learned")),
        ({"return_code": "none"}, ("reconstruction", "return_code")),
        ({"samples": None}, ("contrastive", "samples")),
        ({"gate_options": {"tau": 1}}, ("tau", "temperature")),
        ({"loss_gate_options": {"tau": 1}}, ("tau", "temperature")),
        ({"contrastive": {"tau": 0.1}}, ("tau", "negatives")),
        ({"kd_temperature": {"tau": 2}}, ("tau", "start")),
        ({"loss_strength": {"tau": 2}}, ("tau", "warmup")),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(options, words):
    with pytest.raises(ValueError) as error:
        distiller_of(**options)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and all(word in text for word in words), text


@pytest.mark.parametrize("kind", ["grid", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_target_that_is_not_finite_is_named(kind, value):
    batch = batch_of()
    batch.teachers["b"][kind][1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"{kind} targets of the teacher 'b' are not finite") as error:
        distiller_of()(batch)
    assert str(error.value).endswith(".")


def test_finite_targets_whose_sum_overflows_are_accepted():
    batch = batch_of()
    large = torch.full_like(batch.teachers["b"]["logits"], 6e4, dtype=torch.float16)
    batch.teachers["b"]["logits"] = large
    assert torch.isinf(large.sum())
    assert torch.isfinite(distiller_of()(batch).total)
