import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problem import GATES, generator, make_batch, make_distiller, spec, student_gradient

from amkd_monai.distillation import DistillationConfig, gates
from amkd_monai.distillation.gates import (
    GateNetwork,
    agreement_auc,
    gate_log_probabilities,
    gate_loss,
    gate_probabilities,
    with_abstention,
)
from amkd_monai.distillation.losses import one_hot_area, soft_cross_entropy

PRIOR = 0.65
FLOOR = 0.1


def weights_of(mode, errors, available, scores=None, **options):
    """Weights that a gate gives for errors (B, K, h, w)."""
    scores = [0.5] * errors.shape[1] if scores is None else scores
    specs = [spec(f"t{k}", score=score) for k, score in enumerate(scores)]
    gate = DistillationConfig(gate=mode, gate_options=options).make_gate(specs, PRIOR, 0)
    return gate.weights(gates.GateReading(errors), available)


def errors_of(answers, label):
    """Cross entropy (B, K, h, w) of several answers (B, 2, h, w)."""
    target = one_hot_area(label, 2, answers[0].shape[-2:])
    return torch.stack([soft_cross_entropy(target, a.log_softmax(1)) for a in answers], dim=1)


def sure(label, size=(16, 16), strength=3.0):
    """Answers that are mostly right: logits (B, 2, h, w)."""
    foreground = one_hot_area(label, 2, size)[:, 1:]
    return torch.cat([torch.zeros_like(foreground), strength * (2 * foreground - 1)], dim=1)


def planted(seed=0, batch=6):
    """Labels, and the answers of an expert, of one that always says the prior, and of one that shouts at random."""
    rng = torch.Generator().manual_seed(seed)
    label = (
        (torch.rand((batch, 1, 4, 4), generator=rng) < 0.35).long().repeat_interleave(16, 2).repeat_interleave(16, 3)
    )
    constant = torch.tensor([0.65, 0.35]).log().view(1, 2, 1, 1).expand(batch, 2, 16, 16)
    noise = 4 * torch.randn((batch, 2, 16, 16), generator=rng)
    return label, [sure(label), constant, noise]


def test_reliability_is_a_softmax_with_an_abstain_slot():
    rng = np.random.default_rng(0)
    errors = rng.uniform(0, 2, (2, 3, 4, 5)).astype(np.float32)
    available = np.array([[1, 1, 1], [1, 0, 1]], dtype=np.float32)
    votes = available[:, :, None, None] * np.exp(-errors / 0.25)
    expected = votes / (np.exp(-PRIOR / 0.25) + votes.sum(1, keepdims=True))
    got = gates.reliability(torch.from_numpy(errors), PRIOR, torch.from_numpy(available), temperature=0.25)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_errors_are_smoothed_over_three_by_three_cells():
    errors = torch.zeros(1, 1, 5, 5)
    errors[0, 0, 2, 2], errors[0, 0, 0, 0] = 9.0, 4.0
    smooth = gates.box_smooth(errors)[0, 0]
    assert smooth[2, 2] == 1 and smooth[2, 3] == 1 and smooth[2, 4] == 0
    assert smooth[0, 0] == 1  # the mean of the 4 cells that exist
    torch.testing.assert_close(gates.box_smooth(torch.full((1, 2, 3, 7), 0.5)), torch.full((1, 2, 3, 7), 0.5))


def test_weights_mix_smoothed_reliability_with_the_floor():
    errors = torch.rand((2, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    available = torch.tensor([[True, True, True], [False, True, True]])
    got = weights_of("reliability", errors, available, floor=0.2, temperature=0.5)
    even = torch.tensor([[1 / 3] * 3, [0, 0.5, 0.5]])[:, :, None, None]
    expected = 0.8 * gates.reliability(gates.box_smooth(errors), PRIOR, available, 0.5) + 0.2 * even
    torch.testing.assert_close(got, expected)


def test_uniform_gives_each_available_teacher_the_same():
    available = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]])
    got = weights_of("uniform", torch.rand(3, 3, 2, 2), available)[:, :, 0, 0]
    torch.testing.assert_close(got, torch.tensor([[1 / 3] * 3, [0.5, 0, 0.5], [0, 0, 0]]))


def test_the_weights_fade_where_every_teacher_is_worse_than_the_prior():
    available = torch.ones(1, 2, dtype=torch.bool)
    for error, low, high in ((0.05, 0.9, 1.0), (PRIOR, 0.5, 0.8), (2.0, FLOOR, FLOOR + 0.03)):
        total = weights_of("reliability", torch.full((1, 2, 4, 4), error), available).sum(1)
        assert (total >= low).all() and (total <= high).all(), (error, total.max())


def test_planted_constant_and_noise_teachers_are_not_trusted():
    label, answers = planted()
    errors, available = errors_of(answers, label), torch.ones(len(label), 3, dtype=torch.bool)
    expert, constant, noise = weights_of("reliability", errors, available).mean((0, 2, 3)).tolist()
    assert constant < 0.35 and noise < 0.25 and expert > 0.5
    even = weights_of("uniform", errors, available).mean((0, 2, 3))
    torch.testing.assert_close(even, torch.full((3,), 1 / 3))


def test_the_easiest_teacher_does_not_win_alone():
    label, (_, constant, noise) = planted()
    available = torch.ones(len(label), 2, dtype=torch.bool)
    weights = weights_of("reliability", errors_of([constant, noise], label), available)
    assert weights.sum(1).mean() < 0.75  # no expert: much of the weight is withheld


def test_an_expert_of_a_domain_leads_in_its_domain():
    label, (right, _, noise) = planted(batch=8)
    domain = torch.arange(8) % 2 == 0
    first = torch.where(domain[:, None, None, None], right, noise)
    second = torch.where(domain[:, None, None, None], noise, right)
    available = torch.ones(8, 2, dtype=torch.bool)
    weights = weights_of("reliability", errors_of([first, second], label), available).mean((2, 3))
    assert (weights[domain, 0] > 2 * weights[domain, 1]).all()
    assert (weights[~domain, 1] > 2 * weights[~domain, 0]).all()


def test_trust_is_local():
    errors = torch.full((1, 2, 8, 8), 1.5)
    errors[:, 0, :, :4] = errors[:, 1, :, 4:] = 0.05
    weights = weights_of("reliability", errors, torch.ones(1, 2))[0]
    assert (weights[0, :, :3] > 0.8).all() and (weights[1, :, 5:] > 0.8).all()
    assert (weights[0, :, 5:] < 0.1).all() and (weights[1, :, :3] < 0.1).all()


@settings(max_examples=40, deadline=None, database=None)
@given(
    batch=st.integers(1, 5),
    teachers=st.integers(1, 8),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    mode=st.sampled_from([g for g in GATES if g not in ("learned", "paper")]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    floor=st.sampled_from([0.05, 0.1, 0.5]),
    seed=st.integers(0, 1000),
)
def test_weights_are_bounded_finite_and_without_gradient(
    batch, teachers, height, width, mode, dtype, scale, floor, seed
):
    rng = torch.Generator().manual_seed(seed)
    errors = (scale * torch.rand((batch, teachers, height, width), generator=rng)).to(dtype).requires_grad_()
    available = torch.rand((batch, teachers), generator=rng) < 0.6
    options = {"floor": floor} if mode == "reliability" else {}
    weights = weights_of(mode, errors, available, **options)
    assert weights.shape == errors.shape and not weights.requires_grad and torch.isfinite(weights).all()
    assert (weights.sum(1) <= 1 + 0.02).all() and (weights >= 0).all()
    assert (weights[~available] == 0).all()
    if mode not in ("reliability", "uniform"):
        return
    count = available.sum(1).clamp_min(1)[:, None, None, None]
    least = (floor / count).expand_as(weights)[available]
    assert (weights[available] >= least * 0.99).all()


def test_an_unknown_mode_is_named_with_the_known_ones():
    with pytest.raises(ValueError) as error:
        weights_of("oracle", torch.zeros(1, 1, 2, 2), torch.ones(1, 1))
    assert "oracle" in str(error.value) and all(mode in str(error.value) for mode in GATES)


def test_a_gate_of_ones_own_is_reached_by_its_dotted_path():
    specs = [spec("a"), spec("b")]
    distiller = make_distiller(specs, gate="toy_problem.FirstTeacherGate", gate_options={"share": 0.5})
    weights = distiller(make_batch(specs)).teacher_weights["output"]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0]] * 2))
    for mode, options, words in (
        ("toy_problem.FirstTeacherGate", {"part": 1}, ("part", "share")),
        ("toy_problem.ToyStudent", {}, ("ToyStudent", "TeacherGate")),
        ("toy_problem.NoGate", {}, ("NoGate",)),
        ("no_module.Gate", {}, ("no_module.Gate",)),
    ):
        with pytest.raises(ValueError) as error:
            make_distiller(specs, gate=mode, gate_options=options)
        assert all(word in str(error.value) for word in words) and str(error.value).endswith(".")


THREE = [spec("a"), spec("b", grid=(5, 3, 3), logits=(2, 4, 4)), spec("c", logits=None)]
CONSTANT = {"warmup": 0.0, "decay": 0.0}


def probabilities(seed=0, shape=(2, 4, 3, 5)):
    return torch.randn(shape, generator=generator(seed)).softmax(1)


def learned(specs=THREE, **options):
    return make_distiller(specs, gate="learned", **{"loss_strength": CONSTANT, **options})


def test_the_gate_loss_equals_a_numpy_reference():
    r, g = probabilities(1), probabilities(2)
    x, y = r.double().numpy(), g.double().numpy()
    expected = (x * np.log(x / y)).sum(1).mean((1, 2))
    np.testing.assert_allclose(gate_loss(r, g.log()).numpy(), expected, rtol=1e-4)
    assert gate_loss(r, r.log()).abs().max() < 1e-6


def test_the_gate_loss_trains_the_prediction_alone():
    r, scores = probabilities(1).requires_grad_(), torch.randn(2, 4, 3, 5, requires_grad=True)
    gate_loss(r, scores.log_softmax(1)).sum().backward()
    assert r.grad is None and scores.grad.abs().sum() > 0


def test_the_auc_equals_its_definition():
    r, g = probabilities(3), probabilities(4)
    g[0, :, 0] = 0.25  # equal values
    best = np.zeros(g.shape, bool)
    np.put_along_axis(best, r.numpy().argmax(1)[:, None], True, axis=1)
    right, wrong = g.numpy()[best][:, None], g.numpy()[~best][None, :]
    expected = (right > wrong).mean() + 0.5 * (right == wrong).mean()
    assert agreement_auc(r, g) == pytest.approx(expected, abs=1e-6)
    assert agreement_auc(r, r) > 0.8
    assert agreement_auc(r, torch.full_like(g, 0.25)) == pytest.approx(0.5)


def test_at_the_start_every_slot_is_alike_and_absent_teachers_get_nothing():
    network = GateNetwork(6, teachers=3, slots=4)
    scores = network(torch.randn(2, 6, 3, 5), torch.zeros(2, 3, 3, 5))
    available = torch.tensor([[True, True, True], [False, True, False]])
    g = gate_probabilities(scores, available)
    torch.testing.assert_close(g[0], torch.full_like(g[0], 0.25))
    torch.testing.assert_close(g[1, :, 0, 0], torch.tensor([0, 0.5, 0, 0.5]))
    assert torch.equal(gate_probabilities(scores[:, :3], torch.zeros(2, 3)), torch.zeros(2, 3, 3, 5))
    torch.testing.assert_close(gate_log_probabilities(scores, available).exp(), g)


def test_what_the_reliabilities_leave_is_abstention():
    r = probabilities(1)
    torch.testing.assert_close(with_abstention(r[:, :-1]), r)
    assert torch.equal(
        with_abstention(torch.ones(1, 1, 2, 2)), torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 2, 2)
    )


def test_an_absent_teacher_costs_the_gate_loss_nothing():
    scores, available = torch.randn(2, 3, 2, 2, requires_grad=True), torch.tensor([[True, False], [False, False]])
    target = with_abstention(torch.rand(2, 2, 2, 2) / 2 * available[:, :, None, None])
    loss = gate_loss(target, gate_log_probabilities(scores, available))
    assert torch.isfinite(loss).all() and loss[1] == 0  # only the abstention is left
    loss.sum().backward()
    assert scores.grad[0, 0].abs().sum() > 0 and scores.grad[0, 1].abs().sum() == 0


def test_the_network_is_a_perceptron_over_all_its_inputs_at_a_cell():
    torch.manual_seed(0)
    network = GateNetwork(6, teachers=2, slots=3, tasks=2)
    for p in network.parameters():
        torch.nn.init.normal_(p)
    features, cosines = torch.randn(2, 6, 3, 5), torch.randn(2, 2, 3, 5)
    local = network.norm(features)
    whole = local.mean((2, 3), keepdim=True).expand_as(local)
    embedding = network.task.weight[1][None, :, None, None].expand(2, -1, 3, 5)
    cells = torch.cat([local, whole, cosines, embedding], dim=1).movedim(1, -1)
    scores = (network.layers(cells) + network.bias[1]).movedim(-1, 1)
    torch.testing.assert_close(network(features, cosines, task=1), scores, rtol=1e-4, atol=1e-4)
    network(features, cosines, task=1).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("size", [(2, 3), (6, 9), (1, 1)])
def test_features_of_another_size_are_brought_to_the_grid(size):
    torch.manual_seed(0)
    network = GateNetwork(6, teachers=2, slots=3)
    torch.nn.init.normal_(network.layers[-1].weight)
    alike, cosines = torch.randn(2, 6, 1, 1), torch.randn(2, 2, 3, 5)
    scores = network(alike.expand(-1, -1, *size), cosines)
    torch.testing.assert_close(scores, network(alike.expand(-1, -1, 3, 5), cosines))
    left_right = torch.cat([alike, -alike], dim=3).repeat_interleave(size[1], 3)
    there = network(left_right, torch.zeros(2, 2, 3, 5))
    assert (there[..., 0] - there[..., -1]).abs().min() > 1e-4


def test_the_bias_of_a_task_moves_its_own_weights():
    network = GateNetwork(6, teachers=2, slots=3, tasks=2)
    with torch.no_grad():
        network.bias[1, 0] = 3.0
    inputs = torch.randn(2, 6, 1, 1), torch.zeros(2, 2, 1, 1)
    assert (network(*inputs, task=1)[:, 0] - network(*inputs, task=0)[:, 0]).min() > 2.9
    with pytest.raises(ValueError, match="not task 2"):
        network(*inputs, task=2)


def test_only_the_gate_loss_trains_the_gate_and_it_trains_nothing_else():
    distiller, batch = learned(), make_batch(THREE, 3, has_label=[True, False, True])
    out = distiller(batch)
    (out.losses["output"].sum() + out.losses["feature"].sum() + out.losses["task"].sum()).backward()
    assert all(p.grad is None for p in distiller.teacher_gate.parameters())
    distiller.zero_grad()
    distiller(batch).losses["gate"].sum().backward()
    assert student_gradient(distiller).abs().sum() == 0
    assert all(p.grad is None for p in distiller.align.parameters())
    last = distiller.teacher_gate.network.layers[-1]
    assert last.weight.grad.abs().sum() > 0 and distiller.teacher_gate.network.bias.grad.abs().sum() > 0


def test_training_the_gate_brings_it_nearer_to_reliability():
    distiller, batch = learned(), make_batch(THREE, 4)
    optimiser = torch.optim.Adam(distiller.teacher_gate.parameters(), 1e-2)
    first = float(distiller(batch).losses["gate"].mean().detach())
    for _ in range(60):
        loss = distiller(batch).losses["gate"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    out = distiller(batch)
    assert float(out.losses["gate"].mean().detach()) < 0.7 * first
    assert out.figures["gate_auc"] > 0.65 and out.losses["gate"].shape == (4,)


def test_without_labels_the_weights_come_from_the_network_alone():
    specs = [spec("a"), spec("b", mean_error=9.0)]
    one, other = (make_batch(specs, 2, has_label=[True, False]) for _ in range(2))
    other.label[1] = 1 - other.label[1].clamp(0, 1)
    other.teachers["a"]["logits"][1] += 3.0
    weights = [learned(specs)(b).teacher_weights["output"][1] for b in (one, other)]
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0], torch.full((2,), 0.9 / 3 + 0.05))  # untrained: two teachers and abstention


def test_the_published_gate_is_trained_by_the_losses_it_weighs():
    distiller = make_distiller(THREE, gate="paper", loss_strength=CONSTANT)
    batch = make_batch(THREE, 3)
    out = distiller(batch)
    assert "gate" not in out.losses and "gate_auc" not in out.figures
    for weights in out.teacher_weights.values():
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(1), torch.ones(3))
    out.total.backward()
    assert distiller.teacher_gate.network.layers[-1].weight.grad.abs().sum() > 0


@settings(max_examples=25, deadline=None, database=None)
@given(
    batch=st.integers(1, 5),
    count=st.integers(1, 8),
    size=st.tuples(st.integers(17, 50), st.integers(17, 50)),
    gate=st.sampled_from(GATES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_number_of_teachers_any_size_and_type_give_finite_losses(batch, count, size, gate, dtype, seed):
    specs = [spec(f"t{k}", logits=(2, 4, 4) if k % 3 != 2 else None) for k in range(count)]
    data = make_batch(specs, batch, size, seed, dtype=dtype)
    distiller = make_distiller(specs, gate=gate, return_code="learned", losses={"output": 1, "reconstruction": 1})
    out = distiller(data, progress=0.5)
    for weights in out.teacher_weights.values():
        assert weights.shape == (batch, count) and torch.isfinite(weights).all()
        assert (weights.sum(1) <= 1 + 1e-4).all()
    assert all(torch.isfinite(v).all() for v in out.losses.values())
    out.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)
