"""Preparation: cross-fitting is honest, admission decides by scores, nothing is computed twice."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.networks.nets import SegResNet
from torch import nn

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.seen import fingerprints
from amkd_monai.distillation.interface import Calibration
from amkd_monai.engines import crossfit
from amkd_monai.engines import prepare as preparation
from amkd_monai.engines.prepare import _refuse_seen, prepare_teachers, prior_entropy, score_answers
from amkd_monai.engines.trainer import Recipe
from amkd_monai.networks import Student
from amkd_monai.storage import atomic_write_json

LITE1 = {"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}


def discs(folder, count, size=64, depth=0, seed=0):
    """Datalist items with a bright disc (or ball) on noise, stored as .npy pairs."""
    rng = np.random.default_rng(seed)
    items = []
    shape = (depth, size, size) if depth else (size, size)
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    for i in range(count):
        centre = [rng.uniform(0.35, 0.65) * n for n in shape]
        radius = rng.uniform(0.2, 0.3) * size
        label = (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2).astype(np.uint8)
        image = (0.3 + 0.4 * label + 0.08 * rng.standard_normal(shape)).clip(0, 1).astype(np.float32)
        image = image[None] if depth else np.stack([image] * 3)
        name = f"{'v' if depth else 'i'}{seed}_{i:02d}"
        np.save(folder / f"{name}_image.npy", image)
        np.save(folder / f"{name}_label.npy", label[None])
        paths = {"image": str(folder / f"{name}_image.npy"), "label": str(folder / f"{name}_label.npy")}
        items.append({**paths, "id": name, "group": name})
    return items


def load(item):
    return {key: np.load(value) if key in ("image", "label") else value for key, value in item.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discs")
    train = DecodedDataset(discs(folder, 12), load, folder / "cache")
    validation = DecodedDataset(discs(folder, 4, seed=1), load, folder / "cache")
    return train, validation, folder


def prepare(data, teachers, student=None, **options):
    train, validation, folder = data
    student = student or Student(seed=0)
    recipe = Recipe(batch_size=4, warmup_steps=2)
    arguments = {"epochs": 2, "cache_dir": str(folder / "stores"), "folds": 3, **options}
    return prepare_teachers(teachers, train, validation, student, recipe, **arguments)


def test_targets_match_the_samples(data):
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    (spec,) = targets.teachers
    assert spec.admitted and spec.grid == (112, 4, 4) and spec.logits == (2, 4, 4)
    read = targets.read([5, 0, 5], "cpu")["lite1"]
    assert torch.equal(read["grid"][0], read["grid"][2]) and not torch.equal(read["grid"][0], read["grid"][1])
    stacked = targets.read(range(12), "cpu")["lite1"]["grid"]
    torch.testing.assert_close(stacked.mean((0, 2, 3)), spec.mean, atol=1e-3, rtol=1e-3)
    assert 0 < targets.prior_entropy < np.log(2) + 1e-6
    assert targets.prior_entropy == prior_entropy(data[0])


@pytest.mark.parametrize(("mode", "admitted"), [("all", True), ("none", False)])
def test_admission_can_be_set(data, mode, admitted):
    targets = prepare(data, [LITE1], admission_options={"mode": mode})
    assert targets.teachers[0].admitted is admitted
    assert targets.record["teachers"][0]["outputs_admitted"] is admitted


def test_a_teacher_worse_than_the_student_gives_features_only(data):
    good = prepare(data, [LITE1], epochs=100, admission_options={"folds": 2})
    record = good.record
    teacher = record["teachers"][0]
    assert record["undistilled_student_dice"] > teacher["dice"], "25 epochs beat a 4x4 probe"
    assert record["undistilled_student_epochs"] == 25, "a quarter of the length decides"
    assert not teacher["outputs_admitted"] and good.teachers[0].grid is not None
    assert "does not beat" in teacher["admission_reason"]


def test_the_student_is_calibrated_for_its_score_as_teachers_are(data, monkeypatch):
    """On the labels that are scored, which would flatter a student that alone were calibrated on them."""
    real, fitted = preparation._calibration, []
    monkeypatch.setattr(preparation, "_calibration", lambda *given: fitted.append(given[:2]) or real(*given))
    record = prepare(data, [LITE1], epochs=2, admission_options={"folds": 2}).record
    assert "undistilled_student_dice" in record
    scored = [answers.directory.name.split("-")[0] for answers, section in fitted if section is data[0]]
    assert scored[0] == "lite1" and set(scored[1:]) == {"student"}
    (in_use,) = (answers for answers, section in fitted if section is data[1])
    assert in_use.directory.name.startswith("lite1"), "what it teaches is calibrated on other labels"


def test_a_teacher_that_is_not_to_be_compared_is_never_admitted_and_needs_no_student(data, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a student was trained")

    monkeypatch.setattr(crossfit, "Method", never)
    targets = prepare(data, [{**LITE1, "cross_fit": False}])
    (teacher,) = targets.teachers
    assert not teacher.admitted and teacher.grid is not None and "undistilled_student_dice" not in targets.record
    assert "cross_fit" in teacher.record["admission_reason"] and teacher.record["dice"] > 0
    assert prepare(data, [{**LITE1, "cross_fit": False}], admission_options={"mode": "all"}).teachers[0].admitted
    with pytest.raises(ValueError, match="lite1"):
        prepare(data, [{**LITE1, "cross_fit": "no"}])


@pytest.mark.parametrize(("mode", "left"), [("all", 1), ("none", 0)])
def test_features_of_teachers_that_are_not_admitted_can_be_left_out(data, mode, left, caplog):
    targets = prepare(data, [LITE1], admission_options={"mode": mode, "features": "admitted"})
    assert len(targets) == left and ("distils nothing" in caplog.text) == (left == 0)
    (teacher,) = targets.record["teachers"]
    assert teacher["features_admitted"] is bool(left) and teacher["name"] == "lite1", "what was asked is on record"


def test_unknown_admission_options_are_refused(data):
    for wrong in ({"features": "some"}, {"mode": "perhaps"}, {"mirgin": 0.1}):
        with pytest.raises(ValueError, match="are invalid: use mode"):
            prepare(data, [LITE1], admission_options=wrong)
    for name, values in {"margin": (float("nan"), "0.1", True), "folds": (1, "3"), "epochs": (0, 1.5)}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"admission#{name} is"):
                prepare(data, [LITE1], admission_options={name: value})


def test_a_teacher_better_than_the_student_is_admitted(data):
    record = prepare(data, [LITE1], epochs=2, admission_options={"folds": 2}).record
    teacher = record["teachers"][0]
    assert record["undistilled_student_epochs"] == 2, "not decided by a quarter of the length"
    assert teacher["dice"] > record["undistilled_student_dice"]
    assert teacher["outputs_admitted"]


def test_the_second_call_computes_nothing(data, monkeypatch):
    state = torch.random.get_rng_state()
    first = prepare(data, [LITE1], epochs=1, admission_options={"folds": 2})
    assert torch.equal(state, torch.random.get_rng_state()), "what follows is the same as with a cache"

    def refuse(*_args, **_kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("amkd_monai.engines.crossfit.DistillationTrainer", refuse)
    monkeypatch.setattr("amkd_monai.engines.probes.fit_probe", refuse)
    monkeypatch.setattr("amkd_monai.cache.store.FeatureStore.write_shard", refuse)
    second = prepare(data, [LITE1], epochs=1, admission_options={"folds": 2})
    assert second.record["teachers"] == first.record["teachers"]


def test_the_student_given_is_not_trained(data):
    student = Student(seed=3)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    prepare(data, [LITE1], student=student, epochs=1, admission_options={"folds": 2})
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


class Memoriser(nn.Module):
    """A network that answers what it was fitted on and nothing else."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(64))


def test_cross_fitting_never_asks_a_network_about_what_it_has_seen(data, caplog):
    caplog.set_level("INFO", logger="amkd_monai")
    train, validation, folder = data
    folds = []

    def fit(network, dataset, indices, fold):
        network.groups = {dataset.groups[i] for i in indices}
        folds.append(fold)

    def predict(network, dataset, indices):
        if dataset is train:
            assert not network.groups & {dataset.groups[i] for i in indices if dataset.has_label[i]}
        return np.zeros((len(indices), 2, 32, 32), dtype=np.float32)

    method = SimpleNamespace(fit=fit, predict=predict, key={"k": 1}, title="for ever")
    stores = crossfit.cross_fit("memoriser", Memoriser(), (train, validation), method, 3, 0, str(folder / "memoriser"))
    assert folds == [0, 1, 2] and all(store.is_complete for store in stores)
    told = [record.getMessage() for record in caplog.records if "training" in record.getMessage()]
    assert all("for ever" in message for message in told)
    assert ["left" in message for message in told] == [False, True, True], told


def test_an_interrupted_cross_fit_keeps_its_finished_folds(data):
    train, _, folder = data
    fitted = []

    def fit(network, dataset, indices, fold):
        if fold == 2 and len(fitted) < 3:
            fitted.append("killed")
            raise KeyboardInterrupt
        fitted.append(fold)

    def predict(network, dataset, indices):
        return np.zeros((len(indices), 2, 32, 32), dtype=np.float32)

    method = SimpleNamespace(fit=fit, predict=predict, key={"k": 2}, title="twice")
    arguments = ((train,), method, 3, 0, str(folder / "interrupted"))
    with pytest.raises(KeyboardInterrupt):
        crossfit.cross_fit("killed", Memoriser(), *arguments)
    crossfit.cross_fit("killed", Memoriser(), *arguments)
    assert fitted == [0, 1, "killed", 2]


def test_a_3d_specialist_answers_slices(tmp_path):
    train = DecodedDataset(discs(tmp_path, 4, size=32, depth=16), load, tmp_path)
    validation = DecodedDataset(discs(tmp_path, 2, size=32, depth=16, seed=1), load, tmp_path)
    torch.manual_seed(0)
    network = SegResNet(
        spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)
    )
    description = {"name": "segresnet", "kind": "crossfit_volume_specialist", "network": network, "folds": 2}
    description |= {"slices": 16, "steps": 30, "learning_rate": 5e-3}
    targets = prepare((train, validation, tmp_path), [description], admission_options={"mode": "all"})
    assert targets.teachers[0].logits == (2, 16, 16)
    record = targets.record["teachers"][0]
    assert record["dice"] > 0.5 and 0.3 < record["volume_ratio"] < 3


def test_scores_count_cases_not_pixels(tmp_path):
    """One large object right, one small missed: the mean over cases is 0.5, pooled pixels would say 0.98."""
    from amkd_monai.cache.build import answers_store, keep_answers

    items = []
    for name, side in (("large", 48), ("small", 8)):
        label = np.zeros((1, 64, 64), np.uint8)
        label[0, :side, :side] = 1
        np.save(tmp_path / f"{name}_image.npy", np.linspace(0, 1, 3 * 64 * 64, dtype=np.float32).reshape(3, 64, 64))
        np.save(tmp_path / f"{name}_label.npy", label)
        paths = {k: str(tmp_path / f"{name}_{k}.npy") for k in ("image", "label")}
        items.append({**paths, "id": name, "group": name})
    dataset = DecodedDataset(items, load, tmp_path)
    answers = np.zeros((2, 2, 64, 64), np.float32)
    answers[:, 0] = 5
    answers[0, :, :48, :48] = np.array([-5, 5])[:, None, None]
    store = answers_store("a", {}, dataset, (64, 64), tmp_path)
    keep_answers(store, answers)
    assert score_answers(store, dataset).value == pytest.approx(0.5)


def test_scores_of_three_classes_equal_a_computation_by_hand(tmp_path):
    from amkd_monai.cache.build import answers_store, keep_answers

    rng = np.random.default_rng(0)
    answers, items, truth = rng.normal(size=(4, 3, 16, 24)).astype(np.float16), [], []
    for i in range(4):
        label = rng.integers(0, 2 if i == 0 else 3, (1, 16, 24)).astype(np.uint8)  # the first has no class 2
        label[0, :2] = 255
        np.save(tmp_path / f"{i}_image.npy", rng.random((3, 16, 24), np.float32))
        np.save(tmp_path / f"{i}_label.npy", label)
        paths = {k: str(tmp_path / f"{i}_{k}.npy") for k in ("image", "label")}
        items.append({**paths, "id": str(i), "group": str(i)})
        truth.append(label[0])
    dataset = DecodedDataset(items, load, tmp_path, num_classes=3)
    store = answers_store("a", {}, dataset, (16, 24), tmp_path)
    keep_answers(store, answers)
    score = score_answers(store, dataset, Calibration(2.0))
    assert dataset.ignores, "which changes the key of what is computed from it"
    found, labels = answers.argmax(1), np.stack(truth)
    known, dices, volumes = labels != 255, [], []
    for c in (1, 2):
        p, t = (found == c) & known, labels == c
        dices += [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(p, t, strict=True) if b.any()]
        volumes.append(p.sum() / t.sum())
    assert score.value == pytest.approx(np.mean(dices)) and len(dices) == 7
    assert score.further["volume_ratio"] == pytest.approx(max(volumes, key=lambda v: abs(v - 1)))
    log_p = answers.astype(np.float64) / 2
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    picked = -np.take_along_axis(log_p, np.where(known, labels, 0)[:, None].astype(int), 1)[:, 0]
    assert score.cross_entropy == pytest.approx(picked[known].mean())


def test_answers_of_networks_that_learnt_ignored_pixels_as_a_class_are_not_found(tmp_path):
    items, keys = discs(tmp_path, 4), []
    unlabelled = {key: value for key, value in items.pop().items() if key != "label"}
    predict = lambda network, dataset, indices: np.zeros((len(indices), 2, 32, 32), np.float32)  # noqa: E731
    method = SimpleNamespace(fit=lambda *_: None, predict=predict, key={"k": 3}, title="once")
    for _ in range(2):
        train = DecodedDataset([*items, unlabelled], load, tmp_path)
        (store,) = crossfit.cross_fit("nobody", Memoriser(), (train,), method, 2, 0, str(tmp_path / "nobody"))
        keys.append(store.key)
        label = np.load(items[0]["label"])
        label[:, :5] = 255
        np.save(items[0]["label"], label)
    assert keys[1].keys() - keys[0].keys() == {"ignores"}, "answers to other labels are found as before"


def test_a_student_that_has_seen_images_is_compared_on_others(tmp_path):
    items = discs(tmp_path, 4)
    seen = fingerprints({"train": items[:2], "validation": items[2:3]}, False, tmp_path)
    atomic_write_json(tmp_path / "student.json", {"version": 1, "seen": {"": seen}})
    for labelled, refused in ((items[2:], False), (items[1:], True)):
        others = [{k: v for k, v in item.items() if k != "label"} for item in items if item not in labelled]
        train = DecodedDataset([*labelled, *others], load, tmp_path)
        with pytest.raises(ValueError, match=r"model\.pt has learnt 1") if refused else nullcontext():
            _refuse_seen(str(tmp_path / "model.pt"), train, str(tmp_path))


def test_a_complete_cache_is_prepared_without_asking_a_teacher(data, monkeypatch):
    """What a run costs that finds everything: no teacher is built or asked, no answers are scored, no training."""
    first = prepare(data, [LITE1], admission_options={"mode": "all"})

    def never(*_, **__):
        raise AssertionError("a teacher was built, or its answers were scored")

    for name in ("teachers.plan.build_teacher", "engines.prepare.score_answers"):
        monkeypatch.setattr(f"amkd_monai.{name}", never)
    again = prepare(data, [LITE1], admission_options={"mode": "all"})
    assert again.record["teachers"] == first.record["teachers"]
    assert first.record["teachers"][0]["asked_at"] == {"images": "decoded", "size": list(data[0].images.shape[-2:])}
    assert first.record["teachers"][0]["stored"] == {
        "views": 1,
        "dtype": "float16",
        "bytes_per_image": pytest.approx(2 * (112 * 16 + 1280), abs=40),
    }


def test_a_teacher_of_answers_alone_that_is_not_admitted_leaves_the_undistilled_student(data, caplog):
    crew = {"name": "crew", "kind": "crew", "size": "small", "images": 8, "image_size": 1, "flips": False}
    targets = prepare(data, [crew], admission_options={"mode": "none"})
    assert len(targets) == 0 and "distils nothing" in caplog.text
    assert [t["outputs_admitted"] for t in targets.record["teachers"]] == [False]


def test_a_class_that_no_training_image_shows_is_warned_of_and_recorded(data, tmp_path, caplog):
    train = DecodedDataset(discs(tmp_path, 3), load, tmp_path / "cache", num_classes=3)
    targets = prepare((train, *data[1:]), [], Student(num_classes=3, seed=0))
    assert targets.record["classes_without_images"] == ["class 2"] and "class 2" in caplog.text
    assert "classes_without_images" not in prepare(data, []).record
