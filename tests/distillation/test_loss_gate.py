import pytest
import torch

from amkd_monai.distillation.loss_gate import ScaledLossGate

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


def test_a_negative_importance_is_named():
    with pytest.raises(ValueError, match=r"negative.*-1"):
        ScaledLossGate({"output": -1.0})
