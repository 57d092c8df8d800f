"""A training step does not wait for the device; what the device finds is raised all the same."""

import copy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_problem import make_batch, make_distiller, spec

from amkd_monai.distillation.interface import INTERVAL, Faults

TWO = [spec("a"), spec("b", grid=(5, 3, 3), logits=(2, 4, 4))]
READERS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values read, sizes that depend on values, host data sent over."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.inside = [], False
        for name in READERS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, original):
        def call(tensor, *arguments, **options):
            outer, self.inside = self.inside, True
            try:
                axes = name == "tolist" and sys._getframe(1).f_globals["__name__"] == "monai.losses.dice"
                if not outer and not axes:  # MONAI's Dice reads its axes from a tensor that is always on the host
                    self.found.append(name)
                return original(tensor, *arguments, **options)
            finally:
                self.inside = outer

        return call

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        name = op.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) else ())
        )
        if not self.inside and (name in WAITING or by_mask or name.startswith("lift")):
            self.found.append(name)
        return op(*arguments, **(options or {}))


def train(distiller, batch):
    distiller.zero_grad(set_to_none=True)
    distiller(batch, progress=0.5).total.backward()


@pytest.mark.parametrize("teachers", [TWO, []], ids=["default", "undistilled"])
@pytest.mark.parametrize("known", [[True, True, True], [True, False, True]])
def test_a_default_step_waits_once_in_an_interval(monkeypatch, teachers, known):
    distiller = make_distiller(teachers, scale_steps=5)
    batches = [make_batch(teachers, 3, seed=seed, has_label=known) for seed in range(4)]
    train(distiller, batches[0])  # the first step reads what it finds
    waits = Waits(monkeypatch)
    with waits:
        for step in range(1, INTERVAL):
            train(distiller, batches[step % 4])
        assert waits.found == []
        train(distiller, batches[0])  # reads, and measures gradients
    assert waits.found == ["tolist"]


def test_the_count_of_waits_sees_each_way_to_wait(monkeypatch):
    x = torch.arange(3.0)
    ways = [lambda: bool(x.any()), lambda: float(x[0]), lambda: x.tolist(), lambda: x[x > 1], lambda: x.sum().item()]
    ways += [lambda: torch.tensor([1.0]), lambda: (x > 1).nonzero(), lambda: x.cpu(), lambda: "z" if x[1] else ""]
    waits = Waits(monkeypatch)
    with waits:
        for count, way in enumerate(ways, start=1):
            way()
            assert len(waits.found) == count, waits.found


def wrong_label(batch):
    batch.label[0, 0, 0, 0] = 7


def wrong_target(batch):
    batch.teachers["b"]["grid"][1, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "words"), [(wrong_label, "class 7"), (wrong_target, "grid targets of the teacher 'b'")]
)
@pytest.mark.parametrize("when", [0, 3])
def test_a_fault_is_raised_in_the_first_step_or_at_the_next_reading(spoil, words, when):
    distiller, good, bad = make_distiller(TWO), make_batch(TWO), make_batch(TWO)
    spoil(bad)
    for _ in range(when):
        distiller(good)
    if when:
        distiller(bad)
        copy.deepcopy(distiller)
        for _ in range(INTERVAL - when - 1):
            distiller(good)
    with pytest.raises(ValueError, match=words):
        distiller(good if when else bad)
    distiller(good)
    distiller.eval()
    with pytest.raises(ValueError, match=words):
        distiller(bad)
    distiller.faults.read()


def test_faults_can_be_read_before_anything_is_kept():
    distiller, bad = make_distiller(TWO), make_batch(TWO)
    wrong_label(bad)
    distiller(make_batch(TWO))
    distiller(bad)
    with pytest.raises(ValueError, match="class 7"):
        distiller.faults.read()


def test_the_first_fault_of_a_kind_stays():
    faults = Faults()
    for value in (0, 7, 9, 0):
        faults.note("found {}", torch.tensor(value > 0), torch.tensor(value))
    with pytest.raises(ValueError, match=r"^found 7$"):
        faults.read()


def test_counters_of_a_restored_state_go_on_where_they_were():
    first = make_distiller(TWO, scale_steps=9)
    for _ in range(4):
        first(make_batch(TWO))
    second = make_distiller(TWO, scale_steps=9)
    second.load_state_dict(first.state_dict())
    assert second.loss_gate.steps == second.gradients.steps == 4
    second(make_batch(TWO))
    assert int(second.loss_gate.count) == int(second.gradients.seen) == 5
