"""A crew answers labelled images by members that have not seen their group, sees finer images, and resumes."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.transforms import Compose, Resized, ScaleIntensityRanged
from PIL import Image
from torch import nn

from amkd_monai.data.decoded import DecodedDataset
from amkd_monai.data.transforms import load_mask, load_rgb
from amkd_monai.engines.crew import Crew
from amkd_monai.engines.prepare import prepare_teachers
from amkd_monai.engines.trainer import Recipe
from amkd_monai.networks import ClassStudent

SIDE = 16


class Linear(nn.Module):
    """Two classes from all pixels by a linear map: it learns any labels of a few images by heart."""

    def __init__(self, side=SIDE):
        super().__init__()
        self.head = nn.Linear(3 * side * side, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode(self, image):
        return [image - 0.5]

    def decode(self, levels, size):
        return self.head(levels[0].flatten(1))

    def forward(self, image):
        return self.decode(self.encode(image), [])


class Threshold(nn.Module):
    """A mask from the red channel, pixel by pixel."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 2, 3, padding=1)

    def encode(self, image):
        return [image]

    def decode(self, levels, size):
        return self.head(levels[0])

    def forward(self, image):
        return self.decode(self.encode(image), [])


def chain(side=SIDE, masks=False):
    both = ["image", "label"] if masks else ["image"]
    load = [load_rgb("image"), *([load_mask("label")] if masks else [])]
    modes = ["bilinear", "nearest"][: len(both)]
    resize = Resized(both, (side, side), mode=modes, anti_aliasing=[True, False][: len(both)], allow_missing_keys=True)
    return Compose([*load, ScaleIntensityRanged("image", 0.0, 255.0, 0.0, 1.0), resize])


def noise(folder, groups, unlabelled=0, name="n", side=SIDE, seed=0):
    """Pairs of the same noise with a random class: only who has seen one of a pair can know the class of the other."""
    rng = np.random.default_rng(seed)
    items = []
    for g in range(groups):
        pixels, label = rng.integers(0, 255, (side, side, 3), dtype=np.uint8), int(rng.integers(2))
        for twin in range(2):
            path = folder / f"{name}{g:02d}_{twin}.png"
            Image.fromarray(pixels).save(path)
            item = {"image": str(path), "id": path.stem, "group": f"{name}{g}"}
            items.append(item if g >= groups - unlabelled else {**item, "label": label})
    return items


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    train = DecodedDataset(noise(folder, 26, unlabelled=2), chain(), folder / "cache")
    validation = DecodedDataset(noise(folder, 4, name="v", seed=1), chain(), folder / "cache")
    return train, validation, folder


def crew_of(train, folder, recipe=None, **description):
    description = {"name": "crew", "members": [Linear(), Linear()], "folds": 2, "image_size": 1, **description}
    recipe = recipe or Recipe(batch_size=8, learning_rate=0.02)
    return Crew({"images": 160, **description}, train, recipe, 1, 1, "cpu", str(folder))


def right(dataset, logits, rows):
    return float((logits[:, :, 0, 0].argmax(1) == dataset.classes[rows]).mean())


def test_held_out_images_are_answered_by_members_that_have_not_seen_their_group(data, tmp_path):
    train, validation, _ = data
    crew, labelled = crew_of(train, tmp_path), np.flatnonzero(train.has_label)
    store, of_validation = crew.answers(train, validation)
    assert store.is_complete and len(of_validation) == len(validation)
    assert right(train, store.read("logits", labelled), labelled) < 0.7, "random classes cannot be known"
    members = crew._trained(train, labelled, {"members": ["a", "b"]}, 0)
    rows = labelled.tolist()
    image = torch.from_numpy(np.stack([train.image(i) for i in rows])).float() / 255
    learnt = [crew._ask(team, image, (1, 1)).numpy() for team in members]
    assert right(train, learnt[-1], labelled) > 0.95, "members of all labels know them by heart"
    for fold in range(2):
        seen = crew.team[labelled] != fold
        assert right(train, learnt[fold][seen], labelled[seen]) > 0.95


def test_unlabelled_and_validation_images_are_answered_by_members_of_all_labels(data, tmp_path, monkeypatch):
    train, validation, _ = data
    crew = crew_of(train, tmp_path)
    asked = []
    monkeypatch.setattr(type(crew), "_ask", lambda self, nets, image, size: asked.append((nets, len(image))) or EMPTY)
    EMPTY = torch.zeros(1, 2, 1, 1)
    crew.answers(train, validation)
    counts = {}
    for networks, count in asked:
        counts[id(networks)] = counts.get(id(networks), 0) + count
    assert sorted(counts.values()) == sorted([24, 24, 4 + 8])


def test_a_killed_crew_trains_only_what_is_missing_and_a_finished_one_nothing(data, tmp_path, monkeypatch):
    train, validation, _ = data
    crew, done = crew_of(train, tmp_path), []
    method = type(crew)._method

    def watched(self, steps=None):
        made = method(self, steps)

        def fit(network, dataset, indices, fold):
            if steps is None:
                done.append(fold)
                if len(done) == 4:
                    raise KeyboardInterrupt
            made.fit(network, dataset, indices, fold)

        return SimpleNamespace(fit=fit, predict=made.predict, key=made.key, title=made.title)

    monkeypatch.setattr(type(crew), "_method", watched)
    with pytest.raises(KeyboardInterrupt):
        crew.answers(train, validation)
    killed = crew.answers(train, validation)[0].read("logits", range(len(train)))
    assert done == [0, 1, 2, 3, 3, 4, 5]
    crew.answers(train, validation)
    assert len(done) == 7
    whole = crew_of(train, tmp_path / "whole").answers(train, validation)[0].read("logits", range(len(train)))
    np.testing.assert_array_equal(whole, killed)
    more = DecodedDataset([*train.data, *noise(tmp_path, 1, 1, name="u")], chain(), tmp_path)
    del done[:]
    crew_of(more, tmp_path).answers(more, validation)
    assert not done, "further unlabelled images need no training"


def test_a_member_that_is_added_leaves_those_before_it_as_they_are(data, tmp_path):
    first, second = Linear(), Linear()
    crew_of(data[0], tmp_path, members=[first]).answers(*data[:2])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("crew-member-*.pt")}
    crew_of(data[0], tmp_path, members=[first, second]).answers(*data[:2])
    after = {file: file.stat().st_mtime_ns for file in tmp_path.glob("crew-member-*.pt")}
    assert len(before) == 3 and len(after) == 6 and before.items() <= after.items()
    weights = [torch.load(file, weights_only=True)["head.weight"] for file in after]
    assert not any(torch.equal(a, b) for a, b in combinations(weights, 2)), "members see batches in their own order"


def test_members_of_equal_weights_and_another_dropout_are_trained_anew(data, tmp_path):
    answers = []
    for rate in (0.0, 0.9):
        member = Linear()
        member.head = nn.Sequential(nn.Dropout(rate), member.head)
        store, _ = crew_of(data[0], tmp_path, members=[member]).answers(*data[:2])
        answers.append(store.read("logits", range(len(store))))
    assert np.abs(answers[0] - answers[1]).max() > 0.1


def test_its_cost_is_told_before_its_first_training(data, tmp_path, caplog):
    with caplog.at_level("INFO", "amkd_monai"):
        crew_of(data[0], tmp_path).answers(*data[:2])
    told = next(n for n, line in enumerate(caplog.messages) if "about" in line and "minutes" in line)
    assert "6 trainings of 20 steps" in caplog.messages[told]
    assert told < next(n for n, line in enumerate(caplog.messages) if "1 of 6" in line)


def test_members_see_what_the_students_size_does_not_show(tmp_path):
    """Thin vertical or horizontal lines in the file are grey at half the size."""
    items = []
    for i in range(8):
        lines = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)
        lines[(slice(None), slice(None, None, 2))[:: 1 if i % 2 else -1]] = 255
        path = tmp_path / f"{i}.png"
        Image.fromarray(lines // 2 + np.random.default_rng(i).integers(0, 9, lines.shape, dtype=np.uint8)).save(path)
        items.append({"image": str(path), "id": path.stem, "group": path.stem, "label": i % 2})
    train = DecodedDataset(items, chain(), tmp_path)
    for factor, knows in ((1, False), (2.0, True)):
        crew = crew_of(train, tmp_path, members=[Linear(SIDE * int(factor))], image_size=factor)
        store = crew.answers(train, train)[0]
        assert store.arrays["logits"].shape == (2, 1, 1) and crew.side == (SIDE * factor,) * 2
        assert (right(train, store.read("logits", range(8)), np.arange(8)) == 1.0) == knows


def test_views_are_answered_as_they_are_shown_and_mirrored_as_trained(tmp_path):
    rng, items = np.random.default_rng(0), []
    for i in range(6):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[rng.integers(8) :, rng.integers(8) :] = 255
        for kind, pixels in (
            ("image", np.stack([mask // 2 + rng.integers(20, 60, mask.shape, dtype=np.uint8)] * 3, -1)),
            ("label", mask),
        ):
            Image.fromarray(pixels).save(tmp_path / f"{i}_{kind}.png")
        paths = {kind: str(tmp_path / f"{i}_{kind}.png") for kind in ("image", "label")}
        items.append({**paths, "id": str(i), "group": str(i)})
    train = DecodedDataset(items, chain(masks=True), tmp_path)
    recipe = Recipe(batch_size=4, learning_rate=0.05, augmentation={"flip_width": True})
    crew = crew_of(train, tmp_path, recipe, members=[Threshold()], views=3)
    assert list(crew.mirrors) == [(), (-1,)]
    assert list(crew_of(train, tmp_path, recipe, members=[Threshold()], flips=False).mirrors) == [()]
    store = crew.answers(train, train)[0]
    assert store.views == 3 and store.arrays["logits"].shape == (2, 8, 8)
    plain, flipped, cropped = (store.read("logits", range(6), view) for view in range(3))
    np.testing.assert_allclose(flipped, plain[..., ::-1], atol=2e-2)
    assert np.abs(cropped - plain).max() > 0.1
    described = {"name": "crew", "kind": "crew", "members": [Threshold()], "folds": 2, "image_size": 1, "views": 3}
    described["images"] = 160
    options = {"cache_dir": str(tmp_path), "admission_options": {"mode": "all"}}
    targets = prepare_teachers([described], train, train, Threshold(), recipe, 1, **options)
    read = targets.read([2], "cpu", targets.view_matrices([2], [2]), [2])["crew"]["logits"]
    teacher = targets.teachers[0]
    stored = torch.from_numpy(teacher.answers.read("logits", [2], 2)).float()
    np.testing.assert_allclose(read, teacher.calibration(stored), rtol=1e-5)
    assert teacher.calibration.offsets and teacher.calibration.temperature != 1
    assert targets.views == 3 and targets.record["teachers"][0]["dice"] > 0.5


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"folds": 25}, "25 folds.*24 labelled groups"),
        ({"folds": 1}, "folds of the crew 'crew' is 1"),
        ({"images": 0.5}, "images of the crew 'crew' is 0.5"),
        ({"image_size": 0.5}, "image_size of the crew 'crew' is 0.5"),
        ({"size": "huge"}, "'huge': use one of small, default, large"),
        ({"epochs": 3}, "no option 'epochs': use size, members"),
        ({"members": []}, "members"),
        ({"members": ["lite1"]}, "members"),
        ({"members": 2}, "members 2"),
        ({"flips": "both"}, "flips of the crew 'crew' is 'both'"),
        ({"image_size": float("inf")}, "image_size of the crew 'crew' is inf"),
        ({"members": [{"encoder": "tf_efficientnet_lite9"}]}, "no encoder 'tf_efficientnet_lite9'"),
        ({"members": [{"layers": 9}]}, "member 1 of the crew 'crew'.*layers"),
    ],
)
def test_bad_descriptions_are_refused_before_anything_is_trained(data, tmp_path, description, words):
    with pytest.raises(ValueError, match=words) as error:
        crew_of(data[0], tmp_path, **description)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_fold_without_a_class_is_refused(tmp_path):
    items = [{**item, "label": int(item["group"] == "n3")} for item in noise(tmp_path, 6)]
    train = DecodedDataset(items, chain(), tmp_path)
    with pytest.raises(ValueError, match="'crew' has no labelled image of class 1 outside fold"):
        crew_of(train, tmp_path)


def test_words_for_the_size_make_students_of_the_task(data, tmp_path):
    crew = crew_of(data[0], tmp_path, size="small", members=[{"encoder": "tf_efficientnet_lite0", "dropout": 0.1}])
    assert isinstance(crew.members[0], ClassStudent) and crew.members[0].num_classes == data[0].num_classes
    default = Crew({"name": "crew"}, data[0], Recipe(batch_size=16), 1, 1, "cpu", str(tmp_path))
    assert default.side == (28, 28) and default.folds == 3 and default.steps == 3072 // 8 and len(default.members) == 2
