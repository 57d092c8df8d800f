import pytest
import torch
from toy_problem import make_batch, make_distiller, spec

from amkd_monai.distillation.deferred import INTERVAL
from amkd_monai.distillation.loss_gate import SharedGradients

TWO = [spec("a"), spec("b")]


def losses_of(x):
    return {"task": (2 * x).sum(1), "output": -x.square().sum(1), "aside": torch.ones(len(x), requires_grad=True)}


def test_gradients_are_those_of_the_mean_losses():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    found = SharedGradients(every=1)(losses_of(x), ("task", "output", "aside"), x)
    assert found["task"].tolist() == [1.0] * 4 and found["output"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert found["aside"].tolist() == [0.0] * 4 and not any(g.requires_grad for g in found.values())


def test_measuring_leaves_the_graph_and_the_gradients_alone():
    x = torch.full((3, 5), 3.0, requires_grad=True)
    losses = losses_of(x)
    SharedGradients(every=1)(losses, losses, x)
    assert x.grad is None
    (losses["task"] + losses["output"]).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 5), -4.0))


def test_every_nth_step_is_measured_also_after_a_resumption_and_none_without_gradients():
    x = torch.ones((3, 5), requires_grad=True)
    first, second = SharedGradients(every=3), SharedGradients(every=3)
    assert [bool(first(losses_of(x), ("task",), x)) for _ in range(5)] == [True, False, False, True, False]
    second.load_state_dict(first.state_dict())
    assert [bool(second(losses_of(x), ("task",), x)) for _ in range(2)] == [False, True]
    with torch.no_grad():
        assert SharedGradients(every=1)(losses_of(x), ("task",), x) == {}
    with pytest.raises(ValueError, match="every 0 steps: give a number of at least 1"):
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
