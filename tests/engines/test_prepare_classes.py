"""Preparation where an image has one class: the same code, one answer per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from amkd_monai.cache.build import answers_store, keep_answers
from amkd_monai.data.decoded import BadSampleError, DecodedDataset
from amkd_monai.data.sampling import BatchSampler
from amkd_monai.distillation import Distiller
from amkd_monai.engines import probes
from amkd_monai.engines.prepare import (
    AnswerScore,
    decide,
    prepare_teachers,
    prior_entropy,
    score_answers,
)
from amkd_monai.engines.trainer import DistillationTrainer, Recipe
from amkd_monai.metrics.classification import macro_auroc
from amkd_monai.networks import ClassStudent

LITE1 = {"name": "lite1", "kind": "timm", "model": "tf_efficientnet_lite1"}
CLASSES = 3


def stripes(folder, count, seed=0, unlabelled=0, size=64):
    """Datalist items: horizontal, vertical or diagonal stripes on noise, in turn; groups of two."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    items = []
    for i in range(count):
        kind = i % CLASSES
        wave = np.sin(2 * np.pi * (8 * (y, x, (x + y) / 1.4)[kind] + rng.random()))
        image = (0.5 + 0.25 * wave + 0.1 * rng.standard_normal((3, size, size))).clip(0, 1).astype(np.float32)
        name = f"s{seed}_{i:02d}"
        np.save(folder / f"{name}.npy", image)
        item = {"image": str(folder / f"{name}.npy"), "id": name, "group": f"g{seed}_{i // 6}_{kind}"}
        items.append(item if i >= count - unlabelled else {**item, "label": kind})
    return items


def load(item):
    return {**item, "image": np.load(item["image"])}


def decoded(items, folder, **options):
    return DecodedDataset(items, load, folder / "cache", CLASSES, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stripes")
    return decoded(stripes(folder, 30, unlabelled=3), folder), decoded(stripes(folder, 9, seed=1), folder), folder


def prepare(data, teachers, student=None, **options):
    train, validation, folder = data
    student = student or ClassStudent(num_classes=CLASSES)
    arguments = {"epochs": 1, "cache_dir": str(folder / "stores"), "folds": 3, **options}
    recipe = Recipe(batch_size=6, warmup_steps=1, class_balance=0.5)
    return prepare_teachers(teachers, train, validation, student, recipe, **arguments)


def test_a_dataset_of_classes_holds_one_number_per_image(data):
    train = data[0]
    assert train.labels.shape == (30,) and train.labels.dtype == np.uint8
    assert train.classes.tolist() == [i % 3 for i in range(27)] + [-1] * 3
    sample = train[4]
    assert sample["label"].shape == () and int(sample["label"]) == 1 and int(train[29]["label"]) == 255
    assert prior_entropy(train) == pytest.approx(np.log(3))


@pytest.mark.parametrize("options", [{"foreground_fraction": 0.5}, {"batch_dice": True}])
def test_options_of_masks_are_refused_for_classes(data, options):
    with pytest.raises(ValueError, match="are for masks"):
        Recipe(class_balance=0.5, **options).loader(data[0], 0)


def test_a_new_label_makes_a_new_cache_and_a_wrong_one_is_named(tmp_path):
    items = stripes(tmp_path, 3)
    first = decoded(items, tmp_path)
    items[0] = {**items[0], "label": 2}
    second = decoded(items, tmp_path)
    assert second.classes.tolist() == [2, 1, 2] != first.classes.tolist() and first.hashes != second.hashes
    items[0] = {**items[0], "label": 3}
    with pytest.raises(BadSampleError, match=r"has the label 3; the task has classes 0 to 2"):
        decoded(items, tmp_path)
    assert decoded(items, tmp_path, on_bad_sample="skip").skipped == ["s0_00"]


def test_probes_answer_images_by_pooled_vectors_and_know_the_stripes(data):
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    (spec,) = targets.teachers
    assert spec.admitted and spec.grid == (112, 4, 4) and spec.logits == (CLASSES, 1, 1)
    (source,) = targets.teachers
    score = score_answers(source.answers, data[0], source.calibration)
    assert score.name == "skill" and score.value > 0.3 and score.further["macro_auroc"] > 0.9
    z = (
        torch.from_numpy(source.answers.read("logits", np.arange(27))).float()[:, :, 0, 0]
        / source.calibration.temperature
    )
    label = torch.from_numpy(data[0].classes[:27])
    assert score.cross_entropy == pytest.approx(float(nn.functional.cross_entropy(z, label)), rel=1e-4)
    assert score.further["macro_auroc"] == pytest.approx(macro_auroc(label, z.softmax(1)))
    samples = targets.samples_for({"contrastive": 1.0})
    assert samples.classes.tolist() == data[0].classes.tolist()


def test_out_of_fold_answers_to_random_classes_are_no_better_than_the_prior(data, tmp_path):
    rng = np.random.default_rng(0)
    items = stripes(tmp_path, 27)
    for item, label in zip(items, rng.permutation(np.arange(27) % 3), strict=True):
        item["label"], item["group"] = int(label), item["id"]
    dataset = decoded(items, tmp_path)
    targets = prepare((dataset, data[1], tmp_path), [LITE1], admission_options={"mode": "all"})
    assert targets.record["teachers"][0]["skill"] < 0.1 and targets.record["teachers"][0]["macro_auroc"] < 0.72


@pytest.mark.parametrize("findings", [0, 2])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_frequencies_are_those_of_the_batches(tmp_path, findings, balance):
    items = stripes(tmp_path, 24, unlabelled=4)
    for number, item in enumerate(items[:20]):
        item["label"] = 0 if number < 14 else 1 + number % 2
    dataset = decoded(items, tmp_path, findings=findings)
    options = {"batch_size": 10, "class_balance": balance, "classes": dataset.classes, "min_steps": 400}
    drawn = np.concatenate(list(BatchSampler(dataset.has_label, dataset.has_foreground, **options)))
    labels = dataset.labels[drawn].astype(int)
    seen = np.stack([1 - labels.mean(0), labels.mean(0)]) if findings else np.bincount(labels, minlength=3) / len(drawn)
    assert dataset.frequencies(balance) == pytest.approx(seen, abs=0.005)


def test_answers_are_scored_at_the_frequencies_of_the_labels_not_of_the_batches(tmp_path):
    """Answers that are right for balanced batches know as much as they say, though the labels are not balanced."""
    items = stripes(tmp_path, 40)
    for number, item in enumerate(items):
        item["label"] = int(number >= 32)
    dataset = DecodedDataset(items, load, tmp_path / "cache", 2)
    taught = dataset.frequencies(1.0)
    assert taught == pytest.approx([0.5, 0.5]) and dataset.frequencies() == pytest.approx([0.8, 0.2])
    store = answers_store("even", {"of": "balanced batches"}, dataset, (1, 1), str(tmp_path))
    keep_answers(store, np.zeros((40, 2, 1, 1), np.float32))  # even odds in balanced batches: it knows nothing
    assert score_answers(store, dataset, taught=taught).value == pytest.approx(0, abs=1e-6)
    assert score_answers(store, dataset).value < -0.3


def test_admission_is_by_skill_against_the_student(data):
    targets = prepare(data, [LITE1], admission_options={"folds": 2})
    record = targets.record
    (teacher,) = record["teachers"]
    better = teacher["skill"] >= record["undistilled_student_skill"] + 0.01
    ranks = teacher["macro_auroc"] >= record["undistilled_student_macro_auroc"]
    assert teacher["outputs_admitted"] == (better and ranks)
    assert "Skill" in teacher["admission_reason"] and 0 <= record["undistilled_student_macro_auroc"] <= 1
    strict = prepare(data, [LITE1], admission_options={"folds": 2, "margin": 2.0})
    assert not strict.teachers[0].admitted and strict.teachers[0].grid is not None


def test_the_undistilled_student_is_scored_as_it_is_built_and_without_an_earlier_calibration(data):
    calibrated, other = ClassStudent(num_classes=CLASSES), ClassStudent(num_classes=CLASSES, dropout=0.9)
    calibrated.temperature.fill_(4.0)
    calibrated.offsets.copy_(torch.tensor([0.0, 3.0, -3.0]))
    students, options = (None, calibrated, other), {"admission_options": {"folds": 2, "margin": -9.0}}
    skills = [prepare(data, [LITE1], s, **options).record["undistilled_student_skill"] for s in students]
    assert skills[0] == skills[1] != skills[2]


def test_a_class_of_one_fold_alone_is_told_of(data, tmp_path, caplog):
    few = [item for item in data[0].data[:27] if item["label"] < 2 or item["group"] == "g0_0_2"]
    options = {"admission_options": {"margin": -9.0}}
    for _ in range(2):  # found in the cache, too
        caplog.clear()
        prepare((decoded(few, tmp_path), data[1], tmp_path), [LITE1], **options)
        assert sum("class 2, so student is scored too low" in message for message in caplog.messages) == 1


def test_probes_answer_from_the_channels_that_their_teacher_sees(data, tmp_path):
    answers = []
    for channel in (0, 1):
        sections = [decoded(part.data, tmp_path, teacher_channels=[channel]) for part in data[:2]]
        targets = prepare((*sections, tmp_path), [LITE1], admission_options={"mode": "all"})
        answers.append(targets.read(range(30), "cpu")["lite1"]["logits"])
    assert (answers[0] - answers[1]).abs().max() > 0.01


def test_a_crew_is_cross_fitted_on_classes_and_the_student_in_as_many_folds(data, tmp_path, caplog):
    caplog.set_level("INFO", "amkd_monai")
    members = [{"encoder": "tf_efficientnet_lite1"}]
    description = {"name": "own", "kind": "crew", "members": members, "image_size": 1, "images": 36, "folds": 2}
    targets = prepare((*data[:2], tmp_path), [description], admission_options={"margin": -9.0})
    assert targets.record["admission"]["folds"] == 2 and "training student" in caplog.text
    assert [r.args[2:4] for r in caplog.records if r.args and r.args[0] == "student"] == [(1, 2), (2, 2)]
    assert targets.teachers[0].logits == (CLASSES, 1, 1) and targets.teachers[0].grid is None
    assert targets.read([0, 29], "cpu")["own"]["logits"].shape == (2, CLASSES, 1, 1)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"kind": "crossfit_volume_specialist", "network": nn.Identity()}, "predicts masks of volumes"),
        ({"kind": "crew", "members": [ClassStudent(num_classes=2, weights="random")], "image_size": 1}, "classes"),
    ],
)
def test_teachers_of_another_task_are_refused(data, description, words):
    with pytest.raises((ValueError, IndexError), match=words):
        prepare(data, [{"name": "odd", "folds": 2, **description}])


def test_a_mask_specialist_is_refused_for_classes_and_a_class_specialist_accepted(data, tmp_path):
    class Pooled(nn.Module):
        def forward(self, image):
            return image.mean((2, 3))

    class Dense(nn.Module):
        def forward(self, image):
            return image[:, :, ::8, ::8]

    for name, network in (("pooled", Pooled()), ("dense", Dense())):
        torch.jit.script(network).save(str(tmp_path / f"{name}.ts"))
    pooled = {"name": "pooled", "kind": "specialist", "path": str(tmp_path / "pooled.ts"), "answers": "classes"}
    targets = prepare(data, [pooled], admission_options={"mode": "all"})
    image = torch.from_numpy(data[0].image(7)).float() / 255
    read = targets.read([7], "cpu")["pooled"]["logits"][0, :, 0, 0] * targets.teachers[0].calibration.temperature
    torch.testing.assert_close(read, image.mean((1, 2)), atol=1e-3, rtol=1e-3)
    dense = {"name": "dense", "kind": "specialist", "path": str(tmp_path / "dense.ts")}
    with pytest.raises(ValueError, match="one answer per image with 3 classes"):
        prepare(data, [dense])
    with pytest.raises(ValueError, match=r"'dense'.*\(B, classes\)"):
        prepare(data, [{**dense, "answers": "classes"}])


def test_training_learns_the_stripes_and_is_the_same_twice(data):
    train = data[0]
    recipe = Recipe(batch_size=8, warmup_steps=2, augmentation={"gain": 0.1, "flip_width": True})
    states = []
    for _ in range(2):
        distiller = Distiller(ClassStudent(num_classes=CLASSES, dropout=0.2))
        losses = []
        loader = recipe.loader(train, 0)
        trainer = DistillationTrainer("cpu", 4, loader, distiller, recipe.optimizer(distiller), seed=0)
        trainer.add_event_handler(
            "ITERATION_COMPLETED", lambda e, seen=losses: seen.append(float(e.state.output["loss"]))
        )
        trainer.logger.setLevel("WARNING")
        trainer.run()
        assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
        states.append(distiller.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_teachers_without_pooled_vectors_are_pooled(data):
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    store = targets.teachers[0].features
    del store.arrays["pooled"]
    mean, std = probes.channel_statistics(store, "pooled")
    features = probes.standardised(store, np.arange(5), mean, std, "pooled")
    expected = store.read("grid", np.arange(5)).astype(np.float32).mean((2, 3))
    torch.testing.assert_close(features[:, :, 0, 0] * std + mean, torch.from_numpy(expected), atol=1e-3, rtol=1e-3)


def test_a_likelier_teacher_that_ranks_worse_is_not_admitted():
    student = AnswerScore(0.08, 1.45, {"macro_auroc": 0.754}, "skill")
    for auroc, admitted in ((0.722, False), (0.754, True), (0.8, True)):
        teacher = AnswerScore(0.13, 1.37, {"macro_auroc": auroc}, "skill")
        decision, why = decide(teacher, student, "cross_fit", 0.01, "timm")
        assert decision is admitted and ("macro AUROC 0.722 is below" in why) is not admitted
