"""Which weights are kept: the last or the best ones, of the last step or their average over the steps."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn

from amkd_monai.engines.handlers import AveragedStudent, CalibrateMasks, KeptStudent
from amkd_monai.networks import Student

SCORES = [0.1, 0.5, 0.3]


def run(path, keep="best", decay=0.0, state=None, epochs=3):
    """A training whose step n sets the weight to n; returns trainer, weight seen by each validation, and handler."""
    student, seen = nn.Linear(1, 1, bias=False), []
    evaluator = Engine(lambda engine, _: seen.append(float(student.weight.detach())))
    evaluator.state.key_metric_name, evaluator.state.best_metric_epoch = "score", 0

    def step(engine, _):
        student.weight.data.fill_(engine.state.iteration)

    @evaluator.on(Events.EPOCH_COMPLETED)
    def score():
        epoch = trainer.state.epoch
        evaluator.state.metrics["score"] = SCORES[epoch - 1]
        evaluator.state.best_metric_epoch = SCORES.index(max(SCORES[:epoch])) + 1

    trainer = Engine(step)
    averaged = AveragedStudent(student, evaluator, decay)
    if state is not None:
        averaged.load_state_dict(state)
        trainer.state.epoch, trainer.state.iteration, trainer.state.epoch_length = 2, 8, 4
        trainer.state.max_epochs = epochs
    averaged.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: evaluator.run([0]))
    KeptStudent(student, path, keep).attach(evaluator)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(float(student.weight.detach())))
    trainer.run([0] * 4, max_epochs=epochs)
    return seen, averaged, float(torch.load(path, weights_only=True)["weight"])


def test_the_last_student_or_the_best_one_is_kept(tmp_path):
    assert run(tmp_path / "best.pt")[2] == 8
    assert run(tmp_path / "last.pt", "last")[2] == 12


def test_the_average_of_the_steps_is_validated_and_kept_and_training_goes_on_from_the_last_step(tmp_path):
    seen, _, kept = run(tmp_path / "model.pt", "last", decay=0.5)
    value, expected = 0.0, []
    for step in range(1, 13):
        decay = 0.0 if step == 1 else min(0.5, 1 - step ** (-2 / 3))
        value = decay * value + (1 - decay) * step
        expected += [value, float(step)] if step % 4 == 0 else []
    assert seen == pytest.approx(expected) and kept == pytest.approx(expected[-2])
    state = run(tmp_path / "part.pt", "last", decay=0.5, epochs=2)[1].state_dict()
    state = {"steps": state["steps"], "average": {k: v.clone() for k, v in state["average"].items()}}
    resumed = run(tmp_path / "resumed.pt", "last", decay=0.5, state=state)
    assert resumed[0] == pytest.approx(expected[-2:]) and resumed[2] == kept


@pytest.mark.parametrize(
    ("groups", "enabled", "slices"), [(16, True, [4] * 4), (16, True, [5, 7, 4]), (4, True, [4] * 4), (16, False, [16])]
)
def test_a_student_that_draws_too_little_is_kept_with_masks_nearer_the_truth(groups, enabled, slices, tmp_path):
    torch.manual_seed(0)
    student = Student(num_classes=3, weights="random").eval()
    image = torch.rand(16, 3, 64, 64)
    with torch.inference_mode():
        logits = 3 * (student(image) - student(image).mean((0, 2, 3), keepdim=True))  # what the labels follow
        student.head.weight.mul_(6)
        student.head.bias.copy_(
            6 * (student.head.bias - student(image).mean((0, 2, 3)) / 6) + torch.tensor([0, -4, 2.0])
        )
    p = logits.softmax(1).movedim(1, -1).flatten(0, 2)
    label = torch.multinomial(p, 1).view(16, 1, 64, 64)
    label[:2, :, :8] = 255  # without label: counts nowhere
    before = {name: value.clone() for name, value in student.state_dict().items()}

    def step(engine, rows):
        output = {"image": image[rows], "label": label[rows], "pred": student(image[rows])}
        if len(set(slices)) > 1:  # volumes (1, C, D, H, W) of several sizes
            output = {key: value.movedim(0, 1)[None] for key, value in output.items()}
        engine.state.output = output
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        return engine.state.output

    evaluator = Engine(step)
    evaluator.register_events(*IterationEvents)
    evaluator.state.key_metric_name, evaluator.state.metrics = "score", {"score": 0.5}
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.setdefault("score", 0.5))
    CalibrateMasks(student, [str(i % groups) for i in range(16)], enabled).attach(evaluator)
    KeptStudent(student, tmp_path / "model.pt", "last").attach(evaluator)
    with torch.no_grad():
        evaluator.run(torch.arange(16).split(slices))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())  # training goes on
    kept = Student(num_classes=3, weights="random").eval()
    kept.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    known = label[:, 0] != 255
    with torch.inference_mode():
        drawn = [
            float(net(image).softmax(1).movedim(1, -1)[known].sum(0)[c]) for net in (student, kept) for c in (1, 2)
        ]
    true = [int((label == c).sum()) for c in (1, 2)]
    if groups < 5 or not enabled:  # offsets of so few would be their own
        assert drawn[:2] == drawn[2:]
    else:
        assert drawn[2:] == pytest.approx(true, rel=0.25) and drawn[0] < 0.5 * true[0]
