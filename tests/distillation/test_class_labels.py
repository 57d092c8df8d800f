"""Where an image has one class, each loss, gate and weight reaches the student, as with masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_problem import GATES, LOSS_GATES, ToyStudent, generator, make_batch, make_distiller, spec, student_gradient

from amkd_monai.data.sampling import Augmentation, warp
from amkd_monai.distillation import SampleTable, losses

CLASSES = 3
TWO = [spec("a", logits=(CLASSES, 1, 1)), spec("b", grid=(5, 3, 3), logits=(CLASSES, 1, 1), mean_error=1.0, score=0.4)]
LOSSES = {"output": 1.0, "feature": 0.2, "reconstruction": 0.2, "contrastive": 0.1}
GROUPS, LABELS = torch.arange(9), torch.arange(9) % CLASSES
SAMPLES = SampleTable({t: torch.randn((9, 6), generator=generator(3)) for t in "ab"}, GROUPS, LABELS)


class ToyClassStudent(ToyStudent):
    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(10, CLASSES)

    def decode(self, levels, size):
        return self.head(levels[2].mean((2, 3)))


def distiller_of(seed=0, specs=TWO, **options):
    defaults = {"losses": LOSSES, "return_code": "learned", "samples": SAMPLES, "student": ToyClassStudent(seed)}
    defaults |= {"loss_strength": {"warmup": 0.0, "decay": 0.0}, "prior_entropy": 1.1}
    return make_distiller(specs, seed, **{**defaults, **options})


def batch_of(seed=0, has_label=(True, False, True, True)):
    label = torch.tensor([0, 255, 2, 1])
    batch = make_batch(
        TWO, 4, seed=seed, label=torch.zeros((4, 1, 64, 64), dtype=torch.long), has_label=list(has_label)
    )
    batch.label, batch.index = label, torch.arange(4)
    return batch


def step_of(distiller, batch):
    torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller(batch).total.backward()
    return student_gradient(distiller)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_under_each_gate_changes_the_update(gate, name):
    batch = batch_of()
    alone = distiller_of(gate=gate)
    alone(batch).losses[name].sum().backward()
    assert alone.student.a.weight.grad.abs().sum() > 1e-7
    with_it = step_of(distiller_of(gate=gate), batch)
    without = step_of(distiller_of(gate=gate, losses={**LOSSES, name: 0.0}), batch)
    assert (with_it - without).abs().max() > 1e-7


def test_each_gate_gives_an_update_of_its_own():
    updates = {gate: step_of(distiller_of(gate=gate), batch_of()) for gate in GATES}
    names = list(updates)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            # a learned gate starts at equal shares
            assert (updates[a] - updates[b]).abs().max() > 1e-7, (a, b)


@pytest.mark.parametrize("mode", LOSS_GATES)
def test_every_loss_gate_weighs_all_losses(mode):
    distiller = distiller_of(loss_gate=mode)
    out = distiller(batch_of())
    assert set(LOSSES) <= set(out.losses) and out.logits.shape == (4, CLASSES)
    assert out.losses["task"].shape == (3,) and all(out.losses[n].shape == (4,) for n in LOSSES)
    out.total.backward()
    assert student_gradient(distiller).abs().sum() > 0


def test_weights_are_one_per_image_and_follow_the_label():
    batch = batch_of()
    right = 4 * F.one_hot(batch.label.clamp(0, 2), CLASSES).float()[:, :, None, None]
    batch.teachers["a"]["logits"], batch.teachers["b"]["logits"] = right, -right
    weights = distiller_of(gate="reliability")(batch).teacher_weights["output"]
    assert weights.shape == (4, 2)
    assert (weights[batch.has_label, 0] > 0.8).all() and (weights[batch.has_label, 1] < 0.1).all()
    b_fails = weights[~batch.has_label][0]
    assert b_fails[0] > b_fails[1], "without a label the mean error on the training images decides"


def test_output_distillation_is_the_weighted_divergence_of_class_probabilities():
    batch = batch_of()
    distiller = distiller_of(gate="uniform", kd_temperature={"start": 2.0, "end": 2.0})
    out = distiller(batch)
    expected = 0.0
    for s in TWO:
        log_t = (batch.teachers[s.name]["logits"][:, :, 0, 0] / 2).log_softmax(1)
        log_s = (out.logits / 2).log_softmax(1)
        expected = expected + 0.5 * 4 * (log_t.exp() * (log_t - log_s)).sum(1)
    torch.testing.assert_close(out.losses["output"], expected)


def test_the_task_is_the_cross_entropy():
    batch = batch_of()
    plain = distiller_of()(batch)
    torch.testing.assert_close(
        plain.losses["task"],
        F.cross_entropy(plain.logits[batch.has_label], batch.label[batch.has_label], reduction="none"),
    )


def test_a_contrast_is_never_of_the_own_class():
    contrast = distiller_of().contrast
    eligible = contrast.eligible(torch.arange(9))
    assert torch.equal(eligible, LABELS[:, None] != LABELS[None, :])


def test_masks_and_classes_are_not_mixed_up():
    with pytest.raises(ValueError, match="one class per image"):
        losses.task_loss(torch.zeros(2, 3), torch.zeros((2, 1, 4, 4), dtype=torch.long))
    with pytest.raises(ValueError, match="masks"):
        losses.task_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="overlap"):
        distiller_of(losses={"overlap": 1.0})
    with pytest.raises(ValueError, match="several findings"):
        losses.task_loss(torch.zeros(2, 2, 5), torch.zeros(2, dtype=torch.long))


FINDINGS = 5
OF_FINDINGS = [spec("a", logits=(2, FINDINGS, 1)), spec("b", grid=(5, 3, 3), logits=(2, FINDINGS, 1), mean_error=1.0)]


class ToyFindingStudent(ToyStudent):
    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(10, FINDINGS)

    def decode(self, levels, size):
        present = self.head(levels[2].mean((2, 3)))
        return torch.stack([torch.zeros_like(present), present], 1)


def findings_of(**options):
    batch = make_batch(
        OF_FINDINGS, 4, label=torch.zeros((4, 1, 64, 64), dtype=torch.long), has_label=[True, False, True, True]
    )
    batch.label, batch.index = torch.randint(2, (4, FINDINGS), generator=generator(5)), torch.arange(4)
    return batch, distiller_of(specs=OF_FINDINGS, student=ToyFindingStudent(), **options)


@pytest.mark.parametrize("gate", GATES)
def test_findings_are_learned_and_distilled_one_by_one_under_each_gate(gate):
    batch, distiller = findings_of(gate=gate, kd_temperature={"start": 2.0, "end": 2.0})
    out, known = distiller(batch), batch.has_label
    assert set(LOSSES) <= set(out.losses) and all(weights.shape == (4, 2) for weights in out.teacher_weights.values())
    logit = out.logits[:, 1]
    task = F.binary_cross_entropy_with_logits(logit[known], batch.label[known].float(), reduction="none").mean(1)
    torch.testing.assert_close(out.losses["task"], task)
    expected = torch.zeros(4)
    for k, teacher in enumerate(OF_FINDINGS):
        given = batch.teachers[teacher.name]["logits"][..., 0]
        p, q = torch.sigmoid((given[:, 1] - given[:, 0]) / 2), torch.sigmoid(logit / 2)
        divergence = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)
        expected = expected + out.teacher_weights["output"][:, k] * divergence
    torch.testing.assert_close(out.losses["output"], expected)
    out.total.backward()
    assert student_gradient(distiller).abs().sum() > 0


def test_an_answer_that_is_not_known_is_no_finding():
    batch, distiller = findings_of()
    batch.label[1] = losses.UNLABELLED
    distiller(batch)  # of an image without labels
    batch.label[0, 2] = losses.UNLABELLED
    with pytest.raises(ValueError, match="the class 255"):
        distiller.eval()(batch)


def test_a_gate_trusts_the_teacher_that_knows_the_findings_and_no_finding_is_moved_by_geometry():
    batch, distiller = findings_of(gate="reliability", losses={"output": 1.0})
    right = 4 * F.one_hot(batch.label, 2).float().movedim(-1, 1)[..., None]
    batch.teachers["a"]["logits"], batch.teachers["b"]["logits"] = right, -right
    weights = distiller(batch).teacher_weights["output"][batch.has_label]
    assert (weights[:, 0] > 0.8).all() and (weights[:, 1] < 0.1).all()
    augmentation = Augmentation(rotation=3.0, shift=0.3, flip_height=True)
    theta = augmentation.sample(4, (64, 64), generator(0))
    assert torch.equal(warp(right, theta), right)
