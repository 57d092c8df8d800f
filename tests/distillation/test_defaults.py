"""What a distiller does by default, and that the plain gates give the same losses as ever: results stay valid."""

import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from toy_problem import make_batch, make_distiller, spec

from amkd_monai.distillation.distiller import DEFAULT_LOSSES, DistillationConfig, distillation_strength, kd_temperature
from amkd_monai.distillation.gates import AgreementLossGate, LearnedGate, LossGate, TeacherGate
from amkd_monai.distillation.interface import TeacherTarget

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"

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
def test_the_losses_of_plain_gates_are_those_recorded(gate):
    distiller = make_distiller(TWO, gate=gate, loss_gate="scaled", scale_steps=4, loss_strength={"decay": 0.3})
    optimiser = torch.optim.AdamW(distiller.parameters(), 1e-2)
    for step, expected in enumerate(RECORDED[gate]):
        out = distiller(make_batch(TWO, 3, seed=step, has_label=[True, False, True]), progress=(step + 1) / 8)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        values = [float(out.total.detach()), *(float(v.detach().mean()) for v in out.losses.values())]
        assert values == pytest.approx(expected, rel=2e-5), step


def test_by_default_the_gates_learn_and_nothing_else_is_built():
    distiller = make_distiller(TWO)
    assert type(distiller.teacher_gate) is LearnedGate and isinstance(distiller.loss_gate, AgreementLossGate)
    parts = {key.split(".")[0] for key in distiller.state_dict()} - {"student"}
    assert parts == {"align", "standardise", "teacher_gate", "loss_gate", "gradients"}
    assert set(distiller.loss_gate.state_dict()) == {"history", "count", "scale", "agreement"}
    assert set(distiller(make_batch(TWO)).losses) == {"task", "output", "feature", "gate"}


@pytest.mark.parametrize("bundle", sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/train.json")))
def test_a_bundle_has_the_defaults_of_the_distiller(bundle):
    config = json.loads((BUNDLES / bundle / "configs" / "train.json").read_text())
    of_masks = "mask_codes" in config
    defaults = DistillationConfig(
        losses={"output": 0.5, "overlap": 0.5, "feature": 0.2} if of_masks else DEFAULT_LOSSES
    )
    for key in ("gate", "gate_options", "losses", "loss_gate", "loss_gate_options", "return_code", "code_channels"):
        assert config[key] == getattr(defaults, key), key
    for key, schedule in (("kd_temperature", kd_temperature), ("loss_strength", distillation_strength)):
        arguments = inspect.signature(schedule).parameters.values()
        expected = {p.name: p.default for p in arguments if p.name != "progress"}
        assert config[key] == expected | ({"start": 1.0, "end": 1.0} if of_masks and key == "kd_temperature" else {})


STEPS = [i / 200 for i in range(201)]


def test_the_temperature_falls_from_start_to_end():
    values = [kd_temperature(p, 4.0, 1.0) for p in STEPS]
    assert values[0] == pytest.approx(4) and values[-1] == pytest.approx(1) and values[100] == pytest.approx(2.5)
    assert values == sorted(values, reverse=True)


def test_the_temperature_is_linear_and_2_by_default():
    assert kd_temperature(0.25, 4.0, 1.0) == pytest.approx(3.25) and kd_temperature(0.7) == 2.0


def test_wrong_temperatures_are_named():
    with pytest.raises(ValueError, match=r"0\.5"):
        DistillationConfig(kd_temperature={"start": 4.0, "end": 0.5})


WRONG = (-1, math.nan, math.inf, "0.5", [1], True)
OPTIONS = {
    "gate_options#floor": (2,),
    "gate_options#temperature": (0,),
    "gate_options#hidden": (0, 1.5),
    "gate_options#tasks": (0, 1.5),
    "loss_gate_options#floor": (2,),
    "loss_gate_options#temperature": (0,),
    "loss_gate_options#memory": (2,),
    "loss_gate_options#every": (0, 1.5),
    "losses#output": (),
    "loss_strength#warmup": (2,),
    "loss_strength#decay": (2,),
    "loss_strength#end": (2,),
    "kd_temperature#start": (0.5,),
    "contrastive#negatives": (0, 1.5),
    "contrastive#temperature": (0, 1),
    "code_channels": (0, 1.5),
    "scale_steps": (1.5,),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_values_that_cannot_be_meant_are_refused_by_name(option):
    section, _, name = option.partition("#")
    for value in (*WRONG, *OPTIONS[option]):
        with pytest.raises(ValueError, match=f"^{option} is "):
            DistillationConfig(**{section: {name: value} if name else value})


@pytest.mark.parametrize(("mode", "name"), [("scaled", "floor"), ("paper", "task")])
def test_those_of_other_loss_gates_too(mode, name):
    for value in WRONG:
        with pytest.raises(ValueError, match=f"^loss_gate_options#{name} is "):
            DistillationConfig(loss_gate=mode, loss_gate_options={name: value})


class OfTheChief(TeacherGate):
    """A gate of a user's own that needs a teacher of the run."""

    def __init__(self, setup, chief):
        super().__init__(setup)
        self.number = [teacher.name for teacher in setup.teachers].index(chief)


class OfTheChosen(LossGate):
    """A loss gate of a user's own that needs to know which losses the run has."""

    def __init__(self, priors, warmup_steps, channels, last):
        super().__init__(priors)
        self.last = self.names.index(last) if set(priors) == {"output", "feature"} else [][0]


def test_a_gate_of_ones_own_is_made_for_the_run_alone():
    own = {"gate": f"{__name__}.OfTheChief", "gate_options": {"chief": "b"}}
    own |= {"loss_gate": f"{__name__}.OfTheChosen", "loss_gate_options": {"last": "feature"}}
    config = DistillationConfig(**own)
    assert config.make_gate([TeacherTarget("a"), TeacherTarget("b")], 0.5, 4).number == 1
    assert config.make_loss_gate(config.losses, 4).last == 1


def test_looking_at_the_options_draws_no_random_number():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    DistillationConfig(gate="paper", loss_gate="paper")
    assert torch.equal(torch.rand(3), expected)


def test_the_strength_warms_up_and_stays_or_fades():
    assert distillation_strength(0.025) == pytest.approx(0.5)
    assert all(distillation_strength(p) == 1 for p in STEPS if p >= 0.05)
    values = [distillation_strength(p, decay=0.3) for p in STEPS]
    assert values[0] == 0
    assert all(v == 1 for p, v in zip(STEPS, values, strict=True) if 0.05 <= p <= 0.7)
    assert distillation_strength(0.85, decay=0.3) == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1)
    falling = values[140:]
    assert falling == sorted(falling, reverse=True)
    assert all(abs(a - b) < 0.11 for a, b in itertools.pairwise(values))  # no jumps


def test_a_constant_strength_is_possible():
    assert {distillation_strength(p, warmup=0.0, decay=0.0) for p in STEPS} == {1.0}
