import numpy as np
import pytest
import torch
from toy_problem import LOSS_GATES

from amkd_monai.distillation import DistillationConfig
from amkd_monai.distillation.baselines import FixedLossGate, PaperLossGate
from amkd_monai.distillation.loss_gate import AgreementLossGate, SharedGradients

PRIORS = {"output": 1.0, "feature": 0.25}


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


def test_a_loss_driven_to_zero_never_raises_its_own_weight():
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
    assert "has no effect here: 'feature' is the only one" in caplog.text
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
