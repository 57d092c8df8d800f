import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problem import GATES, generator, make_batch, make_distiller, spec, student_gradient

from amkd_monai.distillation.gates import (
    GateNetwork,
    agreement_auc,
    gate_log_probabilities,
    gate_loss,
    gate_probabilities,
    with_abstention,
)

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
def test_teachers_may_be_missing_for_any_sample(batch, count, size, gate, dtype, seed):
    specs = [spec(f"t{k}", logits=(2, 4, 4) if k % 3 != 2 else None) for k in range(count)]
    data = make_batch(specs, batch, size, seed, dtype=dtype)
    data.available = torch.rand((batch, count), generator=generator(seed)) < 0.5
    for k, s in enumerate(specs):
        for maps in data.teachers[s.name].values():
            maps[~data.available[:, k]] = torch.nan  # rows that don't count may hold anything
    distiller = make_distiller(specs, gate=gate, return_code="learned", losses={"output": 1, "reconstruction": 1})
    out = distiller(data, progress=0.5)
    for name, weights in out.teacher_weights.items():
        assert weights.shape == (batch, count) and torch.isfinite(weights).all()
        assert (weights[~data.available] == 0).all(), name
        assert (weights.sum(1) <= 1 + 1e-4).all()
    assert all(torch.isfinite(v).all() for v in out.losses.values())
    out.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters() if p.grad is not None)
