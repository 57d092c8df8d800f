"""Planted teachers: label-grounded gates find the experts and do no harm; uniform and end-to-end weights do harm."""

import pytest
import torch
from planted_problem import NAMES, batch_of, error_of, make, planted, train

HEAVY = {"output": 3.0, "feature": 0.6}
"""Importance at which bad teachers hurt."""


@pytest.fixture(scope="module", params=[0, 2])
def trained(request):
    seed = request.param
    seen, new = planted(600, seed), planted(200, 100 + seed)
    students = {"none": train(make(seen, "uniform", distil=False, seed=seed), seen, seed=seed)}
    for gate in ("reliability", "learned", "uniform", "paper"):
        students[gate] = train(make(seen, gate, seed=seed, losses=HEAVY), seen, seed=seed)
    return students, new


def weights_of(distiller, data, known=None):
    """Mean weights on new images of kinds A and B, [kind][teacher], and the other figures."""
    rows = torch.arange(len(data.image))
    with torch.no_grad():
        out = distiller(batch_of(data, rows, known))
    w = out.teacher_weights["output"]
    unknown = torch.ones_like(data.in_a) if known is None else ~known
    kinds = [w[data.in_a & unknown].mean(0).tolist(), w[~data.in_a & unknown].mean(0).tolist()]
    return [dict(zip(NAMES, kind, strict=True)) for kind in kinds], out.figures


def test_label_grounded_gates_do_no_harm(trained):
    students, new = trained
    without = error_of(students["none"], new)
    for gate in ("reliability", "learned"):
        assert error_of(students[gate], new) < without + 0.01, gate


def test_uniform_and_end_to_end_weights_do_harm(trained):
    students, new = trained
    without = error_of(students["none"], new)
    for gate in ("uniform", "paper"):
        assert error_of(students[gate], new) > without + 0.02, gate


@pytest.mark.parametrize("gate", ["reliability", "learned"])
def test_the_expert_of_a_kind_leads_and_bad_teachers_do_not(trained, gate):
    students, new = trained
    (in_a, in_b), _ = weights_of(students[gate], new)
    assert max(in_a, key=in_a.get) == "expert_a" and max(in_b, key=in_b.get) == "expert_b"
    for kind in (in_a, in_b):
        assert kind["constant"] < 0.35 and kind["noise"] < 0.25
        assert min(kind.values()) >= 0.1 / 4 * 0.999


def test_the_end_to_end_gate_falls_for_the_easiest_teacher(trained):
    students, new = trained
    for kind in weights_of(students["paper"], new)[0]:
        assert kind["constant"] > 0.9


def test_the_learned_gate_needs_no_label_and_agrees_with_reliability(trained):
    students, new = trained
    known = torch.zeros(len(new.image), dtype=torch.bool)
    known[:4] = True  # a batch needs a label somewhere
    (in_a, in_b), figures = weights_of(students["learned"], new, known)
    assert in_a["expert_a"] > 0.5 and in_b["expert_b"] > 0.5
    assert in_a["noise"] < 0.25 and in_b["noise"] < 0.25
    assert figures["gate_auc"] > 0.8
    _, figures = weights_of(students["learned"], new)
    assert figures["gate_auc"] > 0.9
