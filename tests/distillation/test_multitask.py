"""Tasks around one student: they do not disturb each other, and share what they learn about a teacher."""

from __future__ import annotations

import pytest
import torch
from toy_problem import make_batch, spec

from amkd_monai.distillation import DistillationConfig, Distiller
from amkd_monai.engines.multitask import MultiTaskDistiller
from amkd_monai.networks import SharedStudent

TEACHER = spec(grid=(12, 4, 4), logits=(2, 8, 8))
HEADS = {"a": {"kind": "segmentation", "classes": 2}, "b": {"kind": "segmentation", "classes": 2}}


def problem(teachers=(TEACHER,), **options):
    torch.manual_seed(0)
    student = SharedStudent(HEADS, weights="random")
    config = DistillationConfig(**options)
    distillers = {t: Distiller(student.for_task(t), list(teachers), config=config) for t in HEADS}
    return student, MultiTaskDistiller(distillers, scale_steps=3)


def test_a_step_on_one_task_leaves_the_head_and_norms_of_the_other_bit_identical():
    student, distiller = problem(gate="learned", gate_options={"tasks": 2})
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1, weight_decay=0.1)
    for task in ("b", "a"):  # b first, so that the optimiser holds momentum for it
        before = {k: v.clone() for k, v in student.state_dict().items()}
        distiller.train()
        optimizer.zero_grad(set_to_none=True)
        distiller(task, make_batch([TEACHER])).total.backward()
        optimizer.step()
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert {"encoder.conv_stem.weight", "heads.a.weight"} <= changed
    assert not any(k.startswith(("heads.b.", "norms.b.")) for k in changed)
    assert any(k.startswith("norms.a.") and k.endswith("running_mean") for k in changed)


def test_equal_teachers_share_projections_codes_and_the_gate():
    _, distiller = problem(gate="learned", gate_options={"tasks": 2}, return_code="learned")
    a, b = distiller.distillers["a"], distiller.distillers["b"]
    assert a.align["t"] is b.align["t"] and a.codes["t"] is b.codes["t"]
    assert a.teacher_gate.network is b.teacher_gate.network
    assert a.standardise["t"] is not b.standardise["t"], "statistics are a data set's own"


def test_teachers_of_another_shape_share_no_projection():
    other = spec(grid=(6, 4, 4))
    student = SharedStudent(HEADS, weights="random")
    pair = {t: Distiller(student.for_task(t), [s]) for t, s in (("a", TEACHER), ("b", other))}
    assert MultiTaskDistiller(pair).distillers["a"].align["t"] is not pair["b"].align["t"]


def test_the_loss_of_a_task_is_measured_on_its_own_scale_which_freezes():
    _, distiller = problem(teachers=())
    distiller.train()
    seen = []
    for seed in range(5):
        result = distiller("a", make_batch([], seed=seed))
        seen.append(float(result.losses["task"].detach().mean()))
        scale = float(result.figures["loss_scale"])
        assert float(result.total) == pytest.approx(seen[-1] / scale, rel=1e-5)
        assert scale == pytest.approx(sorted(seen[:3])[(min(len(seen), 3) - 1) // 2], rel=1e-5)
    assert int(distiller.scales["b"].count) == 0
    distiller.eval()
    distiller("b", make_batch([]))
    assert int(distiller.scales["b"].count) == 0, "evaluation measures nothing"
