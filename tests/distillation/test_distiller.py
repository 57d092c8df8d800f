import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problem import GATES, ToyStudent, make_batch, make_distiller, spec, squares, student_gradient

from amkd_monai.data.sampling import Augmentation, warp
from amkd_monai.distillation import losses
from amkd_monai.distillation.distiller import Batch

TWO = [spec("a"), spec("b", grid=(5, 3, 3), logits=(2, 4, 4))]
EVERY_LOSS = {"output": 1.0, "feature": 0.2}
CONSTANT = {"warmup": 0.0, "decay": 0.0}


def distiller_of(specs=TWO, **options):
    return make_distiller(specs, **{"loss_strength": CONSTANT, "gate": "reliability", "loss_gate": "scaled", **options})


def after_one_step(distiller, batch):
    distiller = copy.deepcopy(distiller)
    optimiser = torch.optim.SGD(distiller.student.parameters(), lr=0.1)
    distiller(batch).total.backward()
    optimiser.step()
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


def assert_one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("gate", GATES)
def test_the_output_is_shaped_as_documented(gate):
    out = distiller_of(gate=gate)(make_batch(TWO, 3, has_label=[True, False, True]))
    assert out.total.shape == () and out.logits.shape == (3, 2, 64, 64)
    assert {n: tuple(v.shape) for n, v in out.losses.items()} == {
        "task": (2,),
        "output": (3,),
        "feature": (3,),
        **({"gate": (2,)} if gate == "learned" else {}),
    }
    assert {n: tuple(v.shape) for n, v in out.teacher_weights.items()} == {"output": (3, 2), "feature": (3, 2)}
    assert set(out.loss_weights) == set(out.losses) and out.loss_weights["task"] == 1.0
    expected = sum(float(out.loss_weights[n]) * v.mean() for n, v in out.losses.items())
    torch.testing.assert_close(out.total, expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["output", "feature"])
def test_each_loss_alone_reaches_the_student_and_changes_its_step(gate, name):
    batch = make_batch(TWO, 3)
    distiller = distiller_of(gate=gate, losses={name: 1.0})
    distiller(batch).losses[name].sum().backward()
    assert student_gradient(distiller).abs().sum() > 1e-6
    assert distiller.student.a.weight.grad.abs().sum() > 1e-6  # down to the first layer
    distiller.zero_grad()
    with_loss = after_one_step(distiller, batch)
    plain = after_one_step(distiller_of([]), batch)
    assert (with_loss - plain).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["output", "feature"])
def test_removing_one_of_two_losses_changes_the_step(name):
    batch = make_batch(TWO, 3)
    both = after_one_step(distiller_of(losses=EVERY_LOSS), batch)
    without = after_one_step(distiller_of(losses={**EVERY_LOSS, name: 0.0}), batch)
    assert (both - without).abs().max() > 1e-5


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["grid", "logits"])
def test_targets_change_the_step_and_get_no_gradient(gate, kind):
    batch = make_batch(TWO, 3)
    for maps in batch.teachers.values():
        for value in maps.values():
            value.requires_grad_()
    distiller = distiller_of(gate=gate)
    distiller(batch).total.backward()
    assert all(v.grad is None for maps in batch.teachers.values() for v in maps.values())
    for name in ("a", "b"):
        other = make_batch(TWO, 3)
        other.teachers[name][kind] = other.teachers[name][kind] + torch.randn(other.teachers[name][kind].shape)
        distiller.zero_grad()
        change = (after_one_step(distiller, batch) - after_one_step(distiller, other)).abs().max()
        assert change > 1e-6


def test_projections_learn_and_statistics_stay():
    distiller = distiller_of()
    before = {k: v.clone() for k, v in distiller.standardise.state_dict().items()}
    distiller(make_batch(TWO)).total.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in distiller.align.named_parameters() if "weight" in n
    )
    assert all(torch.equal(v, before[k]) for k, v in distiller.standardise.state_dict().items())


def test_without_teachers_it_is_plain_supervised_training():
    batch = make_batch([], 3, has_label=[True, True, False])
    distiller = distiller_of([])
    out = distiller(batch)
    rows = batch.has_label
    student = ToyStudent()
    loss = losses.segmentation_task_loss(student(batch.image[rows]), batch.label[rows]).mean()
    torch.testing.assert_close(out.total, loss)
    assert set(out.losses) == {"task"} and out.teacher_weights == {} and out.loss_weights == {"task": 1.0}
    loss.backward()
    out.total.backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    torch.testing.assert_close(student_gradient(distiller), expected, rtol=1e-4, atol=1e-6)
    assert not any(k.startswith(("align", "standardise")) for k in distiller.state_dict())


def test_samples_without_a_label_are_distilled_and_not_supervised():
    label = squares(2)
    label[1] = 255
    batch = make_batch(TWO, 2, label=label, has_label=[True, False])
    distiller = distiller_of()
    out = distiller(batch)
    assert out.losses["task"].shape == (1,)
    for name in ("output", "feature"):
        distiller.zero_grad()
        distiller(batch).losses[name][1].backward()
        assert student_gradient(distiller).abs().sum() > 1e-6
    other = Batch(batch.image, label.clone(), batch.has_label, batch.teachers)
    other.label[1] = 0
    for name, value in distiller(other).losses.items():
        assert torch.equal(value, out.losses[name]), name  # what stands in an unlabelled row doesn't matter


def test_pixels_without_a_label_are_neither_foreground_nor_background():
    batch = make_batch([], 2)
    batch.label[:, :, 40:] = losses.UNLABELLED
    distiller = distiller_of([])
    out = distiller(batch)
    (gradient,) = torch.autograd.grad(out.total, out.logits)
    assert torch.equal(out.losses["task"], losses.task_loss(out.logits, batch.label))
    assert gradient[:, :, :40].abs().min() > 0 and not gradient[:, :, 40:].any()


@pytest.mark.parametrize("gate", ["reliability", "learned"])
def test_cells_without_a_label_have_the_mean_error(gate):
    specs = [spec("a", mean_error=0.3), spec("b", mean_error=2.0)]
    whole = make_batch(specs, 2)
    part = Batch(whole.image, whole.label.clone(), whole.has_label, whole.teachers)
    part.label[:, :, 36:] = losses.UNLABELLED  # the gate has 4 x 4 cells of 16 pixels, answers have 8 x 8
    teacher_gate = distiller_of(specs, gate=gate).teacher_gate
    answers = {name: targets["logits"] for name, targets in whole.teachers.items()}
    view, found = torch.zeros(2, 10, 4, 4), []
    for batch in (whole, part):
        found.append(teacher_gate.measure(batch, answers, 2, view, {}).errors)
    torch.testing.assert_close(found[1][:, :, :2], found[0][:, :, :2])
    torch.testing.assert_close(found[1][:, :, 3], torch.tensor([0.3, 2.0])[None, :, None].expand(2, 2, 4))
    fine = losses.soft_cross_entropy(losses.one_hot_area(part.label, 2, (8, 8)), answers["a"].log_softmax(1))
    torch.testing.assert_close(found[1][:, 0, 2], F.avg_pool2d(fine[:, 4:5], (1, 2))[:, 0])


def test_without_a_label_the_mean_error_stands_in():
    trusted, doubted = spec("a", mean_error=0.05), spec("b", mean_error=3.0)
    batch = make_batch([trusted, doubted], 2, has_label=[True, False])
    weights = distiller_of([trusted, doubted])(batch).teacher_weights["output"]
    assert weights[1, 0] > 0.8 and weights[1, 1] < 0.1
    assert weights[0, 0] < 0.8  # with a label what it says counts, and it is noise


def test_who_is_right_by_the_label_is_trusted():
    specs = [spec("right"), spec("wrong")]
    batch = make_batch(specs, 2)
    foreground = F.adaptive_avg_pool2d(batch.label.float(), (8, 8))
    answer = torch.cat([torch.zeros_like(foreground), 8 * foreground - 4], 1)
    batch.teachers["right"]["logits"], batch.teachers["wrong"]["logits"] = answer, -answer
    for name, weights in distiller_of(specs)(batch).teacher_weights.items():
        assert (weights[:, 0] > 0.7).all() and (weights[:, 1] < 0.15).all(), name
    even = distiller_of(specs, gate="uniform")(batch).teacher_weights["output"]
    torch.testing.assert_close(even, torch.full((2, 2), 0.5))


def test_a_rejected_teacher_gives_features_but_no_answers():
    specs = [spec("a"), spec("b", admitted=False)]
    batch = make_batch(specs)
    out = distiller_of(specs)(batch)
    assert (out.teacher_weights["output"][:, 1] == 0).all() and (out.teacher_weights["feature"][:, 1] > 0).all()
    other = make_batch(specs)
    other.teachers["b"]["logits"] = -batch.teachers["b"]["logits"]
    assert torch.equal(out.losses["output"], distiller_of(specs)(other).losses["output"])


def test_a_teacher_without_features_gives_answers_only():
    specs = [spec("a"), spec("b", grid=None)]
    out = distiller_of(specs)(make_batch(specs))
    assert (out.teacher_weights["feature"][:, 1] == 0).all() and (out.teacher_weights["output"][:, 1] > 0).all()


def test_the_losses_equal_a_reference_by_hand():
    specs = [spec("a", logits=(2, 8, 8)), spec("b", grid=(5, 4, 4), logits=(2, 8, 8))]
    batch, distiller = (
        make_batch(specs, 2),
        distiller_of(specs, gate="uniform", kd_temperature={"start": 4.0, "end": 1.0}),
    )
    out = distiller(batch, progress=0.5)
    small = F.adaptive_avg_pool2d(out.logits, (8, 8))
    kl = [losses.output_loss(small, batch.teachers[s.name]["logits"], 2.5).mean((1, 2)) for s in specs]
    torch.testing.assert_close(out.losses["output"], (kl[0] + kl[1]) / 2)
    maps = dict(zip(distiller.student.strides, distiller.student.encode(batch.image), strict=True))
    pairs = [
        losses.feature_loss(distiller.align[s.name](maps, (4, 4)), (batch.teachers[s.name]["grid"] - 0.5) / 2.0)
        for s in specs
    ]
    torch.testing.assert_close(out.losses["feature"], (pairs[0] + pairs[1]).mean((1, 2)) / 2)


def test_a_student_that_agrees_has_no_output_loss():
    specs = [spec("a", logits=(2, 16, 16))]
    batch, distiller = make_batch(specs), distiller_of(specs)
    batch.teachers["a"]["logits"] = F.adaptive_avg_pool2d(distiller(batch).logits, (16, 16)).detach()
    assert distiller(batch).losses["output"].abs().max() < 1e-6


def test_scales_are_measured_in_training_only():
    distiller, batch = distiller_of(scale_steps=3), make_batch(TWO)
    distiller.eval()
    distiller(batch)
    assert int(distiller.loss_gate.count) == 0
    distiller.train()
    for _ in range(5):
        distiller(batch)
    assert int(distiller.loss_gate.count) == 3
    out = distiller(batch)
    assert out.loss_weights["output"] == pytest.approx(1 / 1.2 / float(out.losses["output"].mean()), rel=1e-3)


def test_strength_and_progress_scale_the_distillation_losses_alone():
    options = {"gate": "reliability", "loss_gate": "scaled", "loss_strength": {"decay": 0.3}}
    distiller, batch = make_distiller(TWO, **options).eval(), make_batch(TWO)
    assert distiller(batch, 0.0).loss_weights == {"task": 1.0, "output": 0.0, "feature": 0.0}
    assert distiller(batch, 0.5).loss_weights == pytest.approx({"task": 1.0, "output": 1 / 1.2, "feature": 0.2 / 1.2})
    assert distiller(batch, 1.0).loss_weights["output"] == pytest.approx(0.1 / 1.2)


def test_the_state_without_the_student_comes_back_bit_for_bit():
    first, batch = distiller_of(scale_steps=4), make_batch(TWO)
    for _ in range(2):
        first(batch)
    state = {k: v for k, v in first.state_dict().items() if not k.startswith("student.")}
    assert state
    second = distiller_of(scale_steps=4, seed=0)
    torch.manual_seed(5)
    for p in second.align.parameters():
        torch.nn.init.normal_(p)
    result = second.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(k.startswith("student.") for k in result.missing_keys)
    for _ in range(4):
        a, b = first(batch), second(batch)
        assert torch.equal(a.total, b.total) and a.loss_weights == b.loss_weights


def test_it_runs_under_autocast():
    distiller, batch = distiller_of(), make_batch(TWO)
    reference = distiller(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(batch)
    for name, value in out.losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference.losses[name], rtol=0.1, atol=0.05)
    out.total.backward()
    assert student_gradient(distiller).abs().sum() > 0


@settings(max_examples=20, deadline=None, database=None)
@given(
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(17, 70), st.integers(17, 70)),
    gate=st.sampled_from(GATES),
    fill=st.sampled_from(["background", "foreground", "square"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    label_dtype=st.sampled_from([torch.uint8, torch.int64]),
    seed=st.integers(0, 99),
)
def test_any_batch_gives_finite_losses_and_gradients(batch, size, gate, fill, dtype, label_dtype, seed):
    specs = [spec("a"), spec("b", grid=None), spec("c", admitted=False), spec("d", logits=None)]
    label = {"background": torch.zeros, "foreground": torch.ones}.get(fill, torch.zeros)((batch, 1, *size)).long()
    label = squares(batch, size, seed) if fill == "square" else label
    known = [i % 2 == 0 for i in range(batch)]
    data = make_batch(specs, batch, size, seed, label.to(label_dtype), known, dtype)
    distiller = distiller_of(specs, gate=gate)
    out = distiller(data)
    assert out.losses["task"].shape == (sum(known),) and out.losses["output"].shape == (batch,)
    for name, value in out.losses.items():
        assert torch.isfinite(value).all() and (value >= 0).all(), name
    for weights in out.teacher_weights.values():
        assert weights.shape == (batch, 4) and (weights.sum(1) <= 1 + 1e-5).all()
    assert (out.teacher_weights["output"][:, 2:] == 0).all()
    if gate in ("reliability", "uniform", "learned"):
        assert (out.teacher_weights["output"][:, :2] >= 0.1 / 2 * 0.999).all()
    out.total.backward()
    assert torch.isfinite(student_gradient(distiller)).all()


def test_unknown_gates_losses_and_schedules_are_named():
    with pytest.raises(ValueError) as error:
        distiller_of(gate="oracle")
    assert_one_sentence(error, "oracle", *GATES)
    with pytest.raises(ValueError) as error:
        distiller_of(losses={"outputs": 1.0})
    assert_one_sentence(error, "outputs", "output", "feature")
    with pytest.raises(ValueError, match="shape"):
        distiller_of(kd_temperature={"shape": "stairs"})


@pytest.mark.parametrize(
    ("specs", "priors"),
    [
        ([spec("a", logits=None)], {"output": 1.0}),
        ([spec("a", admitted=False)], {"output": 1.0, "feature": 0.0}),
        ([spec("a", grid=None)], {"feature": 1.0}),
        ([spec("a")], {"feature": 0.0}),
    ],
)
def test_losses_that_no_teacher_can_serve_are_refused(specs, priors):
    with pytest.raises(ValueError) as error:
        distiller_of(specs, losses=priors)
    assert_one_sentence(error, "losses")


def test_one_loss_of_two_that_no_teacher_serves_is_announced(caplog):
    specs = [spec("a", admitted=False)]
    out = distiller_of(specs)(make_batch(specs))
    assert set(out.losses) == {"task", "feature"} == set(out.loss_weights)
    assert out.loss_weights["feature"] > 0
    assert any("output" in record.message and record.levelname == "WARNING" for record in caplog.records)


def test_missing_targets_labels_out_of_range_and_unlabelled_batches_are_named():
    distiller = distiller_of()
    for name, kind in (("b", "grid"), ("a", "logits")):
        batch = make_batch(TWO)
        del batch.teachers[name][kind]
        with pytest.raises(ValueError) as error:
            distiller(batch)
        assert_one_sentence(error, f"'{name}'", kind)
    batch = make_batch(TWO)
    batch.label[0, 0, 0, 0] = 7
    with pytest.raises(ValueError) as error:
        distiller(batch)
    assert_one_sentence(error, "7")
    with pytest.raises(ValueError) as error:
        distiller(make_batch(TWO, 2, has_label=[False, False]))
    assert_one_sentence(error, "no labelled sample")


def theta_of(flip_width=False, turn=0.0, batch=2, size=(64, 64)):
    theta = Augmentation().sample(batch, size, torch.Generator().manual_seed(0))
    cos, sin = torch.cos(torch.tensor(turn)), torch.sin(torch.tensor(turn))
    rotation = torch.tensor([[cos, -sin], [sin, cos]])
    rotation[:, 0] *= -1 if flip_width else 1
    theta[:, :, :2] = rotation
    return theta


def test_warped_maps_equal_those_of_the_warped_image():
    label = squares(2)
    answers = losses.one_hot_area(label, 2, (16, 16))
    flipped, turned = theta_of(flip_width=True), theta_of(turn=torch.pi / 2)
    for theta, exact in ((flipped, lambda x: x.flip(-1)), (turned, lambda x: torch.rot90(x, 1, (-2, -1)))):
        image = warp(label.float(), theta, mode="nearest").round().long()
        assert torch.equal(image, exact(label))
        expected = losses.one_hot_area(image, 2, (16, 16))
        torch.testing.assert_close(warp(answers, theta), expected, atol=1e-4, rtol=0)
        assert (answers - expected).abs().max() > 0.5  # an un-warped map is another map


def test_a_warped_answer_agrees_with_the_label_and_an_unwarped_one_does_not():
    specs = [spec("a", grid=None, logits=(2, 16, 16))]
    distiller, batch = distiller_of(specs), make_batch(specs)
    answers = 8 * losses.one_hot_area(batch.label, 2, (16, 16)) - 4
    theta = theta_of(flip_width=True, turn=0.4)
    label = warp(batch.label.float(), theta, mode="nearest").round().long()
    trusted = []
    for maps in (warp(answers, theta), answers):
        trusted.append(distiller(Batch(warp(batch.image, theta), label, batch.has_label, {"a": {"logits": maps}})))
    warped, unwarped = (out.teacher_weights["output"].mean() for out in trusted)
    assert warped > 0.85 and unwarped < 0.75


def test_features_of_a_flipped_photo_are_near_the_warped_map_and_far_from_the_unwarped():
    data = pytest.importorskip("skimage.data", reason="needs the photos of scikit-image")
    from amkd_monai.teachers.timm_encoder import TimmTeacher

    teacher = TimmTeacher("lite1", "tf_efficientnet_lite1")
    photos = [torch.from_numpy(photo).permute(2, 0, 1)[None] / 255 for photo in (data.astronaut(), data.chelsea())]
    image = torch.cat([F.interpolate(p, size=(256, 256), mode="bilinear", antialias=True) for p in photos])
    theta = theta_of(flip_width=True, size=(256, 256))
    cached, seen = teacher(image).grid, teacher(warp(image, theta)).grid
    mean, std = cached.mean((0, 2, 3), keepdim=True), cached.std((0, 2, 3), keepdim=True)

    def likeness(maps):
        return float(F.cosine_similarity((maps - mean) / std, (seen - mean) / std, dim=1).mean())

    warped, unwarped = likeness(warp(cached, theta)), likeness(cached)
    assert warped > 0.7 and unwarped < 0.45, (warped, unwarped)


def test_a_loss_that_is_not_served_leaves_its_share_to_nobody():
    """Features alone must not inherit the weight of answers that were not admitted: at full weight they do harm."""
    priors = {"output": 1.0, "feature": 0.2}
    expected = 0.2 / 1.2
    with_answers = make_distiller([spec("a", admitted=True)], losses=priors, loss_gate="scaled")
    assert with_answers.loss_gate.weights(1.0)["feature"] == pytest.approx(expected)
    for gate in ("scaled", "agreement"):
        features_only = make_distiller([spec("a", admitted=False)], losses=priors, loss_gate=gate)
        assert features_only.loss_gate.weights(1.0) == pytest.approx({"task": 1.0, "feature": expected})
