"""What the student is shown and what the teachers said about it are the same view of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_prepare import LITE1, data, prepare  # noqa: F401 (a fixture)

from amkd_monai.cache.build import MATRIX, ask
from amkd_monai.cache.store import FeatureStore
from amkd_monai.data.sampling import warp
from amkd_monai.distillation import Distiller
from amkd_monai.engines.trainer import DistillationTrainer, Recipe
from amkd_monai.networks import Student
from amkd_monai.teachers.base import build_teacher

LITE2 = {"name": "lite2", "kind": "timm", "model": "tf_efficientnet_lite2"}
GEOMETRY = {"rotation": 0.4, "flip_width": True}


def trainer_of(data, targets, augmentation, **options):  # noqa: F811
    recipe = Recipe(batch_size=8, augmentation=augmentation)
    distiller = Distiller(Student(seed=0), targets.teachers)
    loader = recipe.loader(data[0], 0)
    optimizer = recipe.optimizer(distiller)
    return DistillationTrainer(
        "cpu", 1, loader, distiller, optimizer, targets, augmentation=recipe.augment(), **options
    )


@pytest.fixture(scope="module")
def several(data):  # noqa: F811
    return prepare(data, [LITE1, LITE2], admission_options={"mode": "all"}, views=4)


def test_image_label_and_maps_of_a_batch_are_one_view(data, several):  # noqa: F811
    trainer = trainer_of(data, several, GEOMETRY)
    teacher = build_teacher(LITE1)
    seen = set()
    for raw in [batch for batch in trainer.data_loader for _ in range(3)]:
        trainer.generator.manual_seed(len(seen))
        state = trainer.generator.get_state()
        views = torch.randint(several.views, (len(raw["index"]),), generator=trainer.generator).tolist()
        trainer.generator.set_state(state)
        batch = trainer.prepare_distillation_batch(raw)
        indices = raw["index"].tolist()
        seen |= set(views)
        store = several.teachers[0].features
        matrices = store.read(MATRIX, indices, views)
        theta = torch.from_numpy(matrices)
        torch.testing.assert_close(batch.image, warp(raw["image"].float() / 255, theta), atol=1e-6, rtol=0)
        assert torch.equal(batch.label, warp(raw["label"].float(), theta, mode="nearest").round().long())
        stored = torch.from_numpy(store.read("grid", indices, views)).float()
        assert torch.equal(batch.teachers["lite1"]["grid"], stored)
        with torch.inference_mode():
            said = teacher(batch.image).grid
        assert torch.cosine_similarity(said, stored, dim=1).mean() > 0.9999
        assert torch.equal(torch.from_numpy(ask(teacher, data[0], indices, "cpu", matrices)["grid"]), said)
        answers = several.teachers[0].answers
        probed = several.teachers[0].calibration(torch.from_numpy(answers.read("logits", indices)).float())
        torch.testing.assert_close(batch.teachers["lite1"]["logits"], warp(probed, theta))
    assert seen == {0, 1, 2, 3}


def test_all_teachers_saw_the_same_views(data, several):  # noqa: F811
    first, second = (source.features for source in several.teachers)
    for view in range(4):
        np.testing.assert_array_equal(first.read(MATRIX, range(12), view), second.read(MATRIX, range(12), view))
    assert several.views == 4 and several.identity[0][1].endswith("4 views")


def test_stores_that_hold_different_views_are_refused(data, tmp_path):  # noqa: F811
    targets = prepare(data, [LITE1, LITE2], admission_options={"mode": "none"}, views=2, cache_dir=str(tmp_path))
    store = targets.teachers[1].features
    values = {name: FeatureStore.open(store.directory).read(name, range(12), 1) for name in store.arrays}
    values[MATRIX][3] += 0.1
    store.path(1, 0).unlink()
    store.write_shard(1, 0, values)
    with pytest.raises(ValueError, match="hold different views of one image: delete") as caught:
        targets.view_matrices([3], [1])
    assert "\n" not in str(caught.value)


def test_training_on_views_repeats_itself(data, several):  # noqa: F811
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = trainer_of(data, several, GEOMETRY)
        trainer.logger.setLevel("WARNING")
        trainer.run()
        states.append(trainer.network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("augmentation", "accepted", "message"),
    [
        ({"rotation": 1.6}, "approximate", "rotation of 1.6 makes cached teacher features invalid"),
        ({"scale": 1.0}, "approximate", "scale of 1.0 makes cached teacher features invalid"),
        ({"flip_width": True}, "exact", "flip_width of True makes cached teacher features approximate"),
        ({"rotation": 0.1}, "exakt", "use one of exact, approximate, invalid"),
    ],
)
def test_a_change_that_spoils_features_is_refused(data, augmentation, accepted, message):  # noqa: F811
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    with pytest.raises(ValueError, match=message) as caught:
        trainer_of(data, targets, augmentation, warped_features=accepted)
    assert "\n" not in str(caught.value)


def test_what_is_accepted_or_has_no_features_trains(data, several):  # noqa: F811
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    trainer_of(data, targets, {"rotation": 1.6}, warped_features="invalid")
    trainer_of(data, targets, {"rotation": 0.5, "gain": 0.5}, warped_features="approximate")
    trainer_of(data, targets, {"gain": 0.5}, warped_features="exact")  # photometric changes touch the student alone
    trainer_of(data, several, {"rotation": 1.6}, warped_features="exact")  # stored views are exact
    trainer_of(data, prepare(data, []), {"rotation": 1.6}, warped_features="exact")


def test_a_wrong_label_of_any_step_is_raised_before_the_epoch_ends(data):  # noqa: F811
    recipe, distiller = Recipe(batch_size=2), Distiller(Student(seed=0))
    trainer = DistillationTrainer("cpu", 2, recipe.loader(data[0], 0), distiller, recipe.optimizer(distiller))
    prepare_batch = trainer.prepare_distillation_batch

    def spoilt(raw):
        batch = prepare_batch(raw)
        if trainer.state.iteration == 2:
            batch.label[:, 0, 0, 0] = 7
        return batch

    trainer.prepare_distillation_batch = spoilt
    with pytest.raises(ValueError, match="class 7"):
        trainer.run()
    assert trainer.state.iteration == trainer.state.epoch_length > 2 and trainer.state.epoch == 1
