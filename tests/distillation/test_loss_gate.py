import numpy as np
import pytest
import torch
from toy_problem import LOSS_GATES, make_batch, make_distiller, spec

from amkd_monai.distillation import DistillationConfig
from amkd_monai.distillation.baselines import FixedLossGate, PaperLossGate
from amkd_monai.distillation.gates import AgreementLossGate, ScaledLossGate, SharedGradients
from amkd_monai.distillation.interface import INTERVAL

PRIORS = {"output": 1.0, "feature": 0.25}


def losses(output, feature):
    return {
        "task": torch.tensor([1.0]),
        "output": torch.tensor([output] * 2),
        "feature": torch.tensor([feature, feature]),
    }


def test_weights_are_priors_over_scales_times_strength():
    gate = ScaledLossGate(PRIORS, warmup_steps=3)
    for value in (2.0, 8.0, 4.0):
        gate.observe(losses(value, value / 100))
    assert gate.weights(0.5) == pytest.approx({"task": 1.0, "output": 0.5 * 0.8 / 4.0, "feature": 0.5 * 0.2 / 0.04})


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_the_weight_of_the_task_is_exactly_one(strength):
    gate = ScaledLossGate(PRIORS, warmup_steps=2)
    for step in range(4):
        assert gate.weights(strength)["task"] == 1.0
        gate.observe(losses(10.0**step, 1e-4))


def test_scales_freeze_after_the_warm_up():
    gate = ScaledLossGate(PRIORS, warmup_steps=5)
    measured = set()
    for step in range(5):
        gate.observe(losses(2.0 + step, 2.0 + step))
        measured.add(float(gate.weights(1.0)["output"]))
    assert len(measured) == 3  # the lower median of 1 to 5 values
    frozen = gate.weights(1.0)
    for _ in range(20):
        gate.observe(losses(1e6, 1e6))
        assert gate.weights(1.0) == frozen


def test_a_loss_driven_to_zero_never_raises_its_own_weight():
    gate = ScaledLossGate(PRIORS, warmup_steps=5)
    for _ in range(5):
        gate.observe(losses(1.0, 1.0))
    weight = gate.weights(1.0)["output"]
    for step in range(300):
        gate.observe(losses(0.9**step, 1.0))
        assert gate.weights(1.0)["output"] == weight
        assert gate.weights(1.0)["task"] == 1.0


def test_scales_have_a_floor():
    gate = ScaledLossGate(PRIORS, warmup_steps=2)
    gate.observe(losses(0.0, 1e-9))
    assert gate.weights(1.0) == pytest.approx({"task": 1.0, "output": 0.8e3, "feature": 0.2e3})


def test_one_outlier_does_not_set_a_scale():
    gate = ScaledLossGate({"output": 1.0}, warmup_steps=5)
    for value in (1.0, 1e6, 1.0, 1.0, 1.0):
        gate.observe({"output": torch.tensor([value])})
    assert gate.weights(1.0)["output"] == pytest.approx(1.0)


def test_the_floor_spreads_weight():
    gate = ScaledLossGate({"output": 1.0, "feature": 0.0, "other": 1e-9}, floor=0.2)
    assert gate.weights(1.0) == pytest.approx({"task": 1.0, "output": 0.9, "other": 0.1})


def test_the_state_comes_back_bit_for_bit_in_the_middle_of_the_warm_up():
    torch.manual_seed(0)
    values = torch.rand(12, 2).tolist()
    whole, first = ScaledLossGate(PRIORS, 8), ScaledLossGate(PRIORS, 8)
    for pair in values:
        whole.observe(losses(*pair))
    for pair in values[:5]:
        first.observe(losses(*pair))
    second = ScaledLossGate(PRIORS, 8)
    second.load_state_dict(first.state_dict())
    assert second.weights(1.0) == first.weights(1.0)
    for pair in values[5:]:
        second.observe(losses(*pair))
    assert second.weights(1.0) == whole.weights(1.0)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in second.state_dict().items())


def test_observing_keeps_no_graph():
    gate, x = ScaledLossGate({"output": 1.0}, 3), torch.ones(2, requires_grad=True)
    gate.observe({"output": x * 2})
    assert not gate.scale.requires_grad and not gate.history.requires_grad


def losses_of(x, output=1.0, feature=1.0):
    """Losses of a shared map x (n,) whose gradients are multiples of that of the task."""
    return {"task": (2 * x).sum()[None], "output": (output * x).sum()[None], "feature": (feature * x).sum()[None]}


def gradients_of(losses, x):
    return SharedGradients(every=1)(losses, losses, x)


def follow(gate, steps, **factors):
    """Observe steps in which gradients are measured."""
    for _ in range(steps):
        x = torch.ones(5, requires_grad=True)
        losses = losses_of(x, **factors)
        gate.observe(losses, gradients_of(losses, x))
    return gate


def test_an_anti_aligned_loss_decays_to_the_floor_and_the_task_keeps_one():
    gate = follow(AgreementLossGate(PRIORS, warmup_steps=2, every=1), 200, output=-1.0)
    assert gate.agreement.tolist() == pytest.approx([-1, 1], abs=1e-3)
    v = gate.importance()
    assert v["output"] == pytest.approx(0.1, abs=2e-3) and sum(v.values()) == pytest.approx(1)
    assert gate.weights(1.0)["task"] == 1.0


def test_agreement_equals_a_numpy_reference():
    rng = np.random.default_rng(0)
    gate, c = AgreementLossGate(PRIORS, every=1, memory=0.9, temperature=0.5, floor=0.1), np.zeros(2)
    for _ in range(4):
        g = {n: rng.normal(size=6) for n in ("task", "output", "feature")}
        x = torch.zeros(6, requires_grad=True)
        losses = {n: (torch.tensor(v, dtype=torch.float32) * x).sum()[None] for n, v in g.items()}
        gate.observe(losses, gradients_of(losses, x))
        for k, n in enumerate(PRIORS):
            c[k] = 0.9 * c[k] + 0.1 * g[n] @ g["task"] / np.linalg.norm(g[n]) / np.linalg.norm(g["task"])
    np.testing.assert_allclose(gate.agreement.numpy(), c, rtol=1e-4, atol=1e-6)
    e = np.exp(np.log([1.0, 0.25]) + c / 0.5)
    np.testing.assert_allclose(list(gate.importance().values()), 0.9 * e / e.sum() + 0.1 / 2, rtol=1e-4)


def test_it_learns_from_steps_with_gradients_only():
    gate = AgreementLossGate(PRIORS)
    follow(gate, 1)
    assert gate.agreement.tolist() == pytest.approx([0.1, 0.1])
    for nothing in (None, {}):
        gate.observe(losses_of(torch.ones(5)), nothing)
    assert gate.agreement.tolist() == pytest.approx([0.1, 0.1])
    follow(gate, 1)
    assert gate.agreement.tolist() == pytest.approx([0.19, 0.19])


def test_a_loss_driven_to_zero_never_gains_by_agreement():
    gate = follow(AgreementLossGate(PRIORS, warmup_steps=5, every=1), 20, output=-1.0)
    before = gate.weights(1.0)["output"]
    for step in range(50):
        x = torch.ones(5, requires_grad=True)
        losses = losses_of(x, output=0.0 if step > 10 else -(0.5**step), feature=0.5)
        gate.observe(losses, gradients_of(losses, x))
        assert gate.weights(1.0)["output"] <= before + 1e-9
        before = gate.weights(1.0)["output"]


def test_with_one_loss_it_says_that_it_has_no_effect(caplog):
    alone = AgreementLossGate({"feature": 0.2})
    assert alone.importance() == {"feature": 1.0}
    assert "no effect on 'feature' alone" in caplog.text
    caplog.clear()
    AgreementLossGate({"output": 1.0, "feature": 0.2})
    assert not caplog.text


def test_the_state_comes_back_bit_for_bit():
    whole, first = (AgreementLossGate(PRIORS, 8, every=2) for _ in range(2))
    follow(whole, 9, output=-0.5)
    follow(first, 4, output=-0.5)
    second = AgreementLossGate(PRIORS, 8, every=2)
    second.load_state_dict(first.state_dict())
    assert second.weights(1.0) == first.weights(1.0)
    follow(second, 5, output=-0.5)
    assert second.weights(1.0) == whole.weights(1.0)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in second.state_dict().items())


def test_fixed_weights_are_the_priors_times_strength():
    gate = DistillationConfig(loss_gate="fixed").make_loss_gate(PRIORS, 4)
    assert type(gate) is FixedLossGate
    assert gate.weights(0.5) == {"task": 1.0, "output": 0.5, "feature": 0.125}


def test_the_published_gate_equals_its_formula_and_gives_way_to_the_smallest_loss():
    torch.manual_seed(0)
    gate, features = PaperLossGate({"output": 0.6, "feature": 0.8}, channels=4), torch.randn(3, 4, 2, 2)
    shares = torch.softmax(gate.gate(features.mean((2, 3))) / 2, 1).mean(0)
    w = gate.weights(1.0, features)
    torch.testing.assert_close(torch.stack(list(w.values())), shares * torch.tensor([1.0, 0.6, 0.8]))
    optimiser = torch.optim.Adam(gate.parameters(), 1e-2)
    for _ in range(300):
        w = gate.weights(1.0, features)
        loss = w["task"] * 1.0 + w["output"] * 0.7 + w["feature"] * 0.01
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(w["task"].detach()) < 0.05  # why it is not the default


@pytest.mark.parametrize("mode", LOSS_GATES)
def test_every_mode_is_made_by_name_and_without_losses_the_task_stands_alone(mode):
    config = DistillationConfig(loss_gate=mode, losses=PRIORS)
    gate = config.make_loss_gate(PRIORS, 4)
    w = gate.weights(0.5, torch.randn(2, 4, 1, 1))
    assert set(w) == {"task", "output", "feature"}
    assert mode == "paper" or w["task"] == 1.0
    empty = config.make_loss_gate({}, 0)
    empty.observe({"task": torch.ones(1)})
    assert empty.weights(0.5) == {"task": 1.0}


TWO = [spec("a"), spec("b")]


def losses_at(x):
    return {"task": (2 * x).sum(1), "output": -x.square().sum(1), "aside": torch.ones(len(x), requires_grad=True)}


def test_gradients_are_those_of_the_mean_losses():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    found = SharedGradients(every=1)(losses_at(x), ("task", "output", "aside"), x)
    assert found["task"].tolist() == [1.0] * 4 and found["output"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert found["aside"].tolist() == [0.0] * 4 and not any(g.requires_grad for g in found.values())


def test_measuring_leaves_the_graph_and_the_gradients_alone():
    x = torch.full((3, 5), 3.0, requires_grad=True)
    losses = losses_at(x)
    SharedGradients(every=1)(losses, losses, x)
    assert x.grad is None
    (losses["task"] + losses["output"]).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 5), -4.0))


def test_every_nth_step_is_measured_also_after_a_resumption_and_none_without_gradients():
    x = torch.ones((3, 5), requires_grad=True)
    first, second = SharedGradients(every=3), SharedGradients(every=3)
    assert [bool(first(losses_at(x), ("task",), x)) for _ in range(5)] == [True, False, False, True, False]
    second.load_state_dict(first.state_dict())
    assert [bool(second(losses_at(x), ("task",), x)) for _ in range(2)] == [False, True]
    with torch.no_grad():
        assert SharedGradients(every=1)(losses_at(x), ("task",), x) == {}
    with pytest.raises(ValueError, match="every is 0"):
        SharedGradients(every=0)


def test_a_distiller_gives_the_norm_of_each_loss_at_the_shared_map_in_training():
    distiller, batch = make_distiller(TWO), make_batch(TWO, 3)
    maps = []
    encode = distiller.student.encode
    distiller.student.encode = lambda image: maps.append(encode(image)) or maps[-1]
    out = distiller(batch)
    shared = maps[-1][distiller.student.strides.index(16)]
    for name in ("task", "output", "feature"):
        (gradient,) = torch.autograd.grad(out.losses[name].mean(), shared, retain_graph=True)
        assert out.figures[f"gradient_{name}"] == pytest.approx(float(gradient.norm()), rel=1e-5) and gradient.any()
    later = [distiller(batch).figures for _ in range(INTERVAL)]
    assert [i for i, figures in enumerate(later, start=1) if "gradient_task" in figures] == [INTERVAL]
    evaluated = make_distiller(TWO).eval()(batch).figures
    assert not any(name.startswith("gradient") for name in evaluated) and not make_distiller([])(batch).figures


def test_the_agreement_gate_sets_how_often():
    distiller = make_distiller(TWO, loss_gate="agreement", loss_gate_options={"every": 2})
    batch = make_batch(TWO, 3)
    assert ["gradient_task" in distiller(batch).figures for _ in range(4)] == [True, False, True, False]
    assert distiller.loss_gate.agreement.abs().sum() > 0
