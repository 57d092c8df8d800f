"""The default distiller gives the same losses as it always did: measured results stay valid."""

import pytest
import torch
from toy_problem import make_batch, make_distiller, spec

TWO = [spec("a"), spec("b", grid=(5, 3, 3), logits=(2, 4, 4))]
# total, task, output, feature of six steps of AdamW, recorded before any further mode existed
RECORDED = {
    "reliability": [
        (2.2788327, 1.2788327, 0.324912, 0.3216672),
        (2.2366083, 1.2366083, 0.274516, 0.1946211),
        (2.1840541, 1.184054, 0.302967, 0.2122765),
        (2.1358428, 1.1694087, 0.2625244, 0.2158889),
        (2.3072197, 1.1541718, 0.3278223, 0.2011047),
        (2.1119704, 1.1218204, 0.2902779, 0.2196979),
    ],
    "uniform": [
        (2.2788327, 1.2788327, 0.6202922, 0.6388713),
        (2.2397873, 1.2397872, 0.5907113, 0.405575),
        (2.221339, 1.1878188, 0.645243, 0.446207),
        (2.1559439, 1.1712846, 0.579837, 0.4302069),
        (2.2882872, 1.1661394, 0.6864998, 0.3966931),
        (2.0752902, 1.1635153, 0.5741976, 0.4136031),
    ],
}


@pytest.mark.parametrize("gate", RECORDED)
def test_the_default_losses_are_those_recorded(gate):
    distiller = make_distiller(TWO, gate=gate, scale_steps=4)
    optimiser = torch.optim.AdamW(distiller.parameters(), 1e-2)
    for step, expected in enumerate(RECORDED[gate]):
        out = distiller(make_batch(TWO, 3, seed=step, has_label=[True, False, True]), progress=(step + 1) / 8)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        values = [float(out.total.detach()), *(float(v.detach().mean()) for v in out.losses.values())]
        assert values == pytest.approx(expected, rel=2e-5), step


def test_by_default_nothing_else_is_built():
    distiller = make_distiller(TWO)
    parts = {key.split(".")[0] for key in distiller.distillation_state()}
    assert parts == {"align", "standardise", "loss_gate", "gradients"}
    state = distiller.loss_gate.state_dict()
    assert set(state) == {"history", "count", "scale"}
    assert set(distiller(make_batch(TWO)).losses) == {"task", "output", "feature"}
