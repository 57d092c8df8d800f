"""The vectors that a training keeps are those of the images asked for, and keeping them changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from amkd_monai.engines.handlers.pictures import MOST, PooledFeatures, student_vectors


class Samples:
    """Images that hold their number; every fourth has no label."""

    def __init__(self, count, labels):
        self.labels, self.has_label = labels, np.arange(count) % 4 != 3

    def __getitem__(self, index):
        return {"image": torch.full((3, 8, 8), index % 256, dtype=torch.uint8)}


class Toy(nn.Module):
    """Two feature maps: the finest is never read, the coarsest holds the mean grey level and its double."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def encode(self, image):
        coarse = nn.functional.avg_pool2d(self.norm(image), 4)[:, :1]
        return [image + 9, torch.cat([coarse, 2 * coarse], 1)]


def finish(folder, count, labels, targets=None, student=None):
    """Let a training of ``count`` samples end; return what was kept."""
    loader = SimpleNamespace(dataset=Samples(count, labels))
    PooledFeatures(folder / "run", student or Toy())._completed(SimpleNamespace(data_loader=loader, targets=targets))
    with np.load(folder / "run" / "features.npz") as kept:
        return {name: kept[name] for name in kept.files}


@pytest.mark.parametrize("training", [True, False])
def test_student_vectors_are_means_in_evaluation_mode(training):
    student, indices = Toy().train(training), [40, 3, 7] * 7
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = student_vectors(student, Samples(50, None), indices)
    level = np.array(indices) / 255 / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found, np.stack([level, 2 * level], 1), rtol=1e-5)
    assert student.training == training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items()), "no statistics were updated"


def test_labelled_samples_are_kept_with_their_classes(tmp_path):
    kept = finish(tmp_path, 12, np.arange(12, dtype=np.uint8) % 3)
    assert set(kept) == {"student", "value"}
    assert kept["value"].tolist() == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert (kept["student"][:, 0] * 255).round().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_masks_are_kept_as_the_part_that_is_foreground(tmp_path):
    masks = np.zeros((4, 1, 2, 2), np.uint8)
    masks[1, 0, 0] = 1
    masks[2, 0, 0, 0], masks[2, 0, 1] = 2, 255
    assert finish(tmp_path, 4, masks)["value"].tolist() == [0, 0.5, 0.25]


def test_of_many_samples_some_are_kept_from_first_to_last_and_asked_of_the_teachers(tmp_path):
    asked = []
    pooled = lambda indices: asked.extend(indices) or {"eyes": np.ones((len(indices), 5), np.float32)}  # noqa: E731
    kept = finish(tmp_path, 2003, np.zeros(2003, np.uint8), SimpleNamespace(pooled=pooled))
    assert len(asked) == len(set(asked)) == MOST == len(kept["student"]) and kept["teacher_eyes"].shape == (MOST, 5)
    assert asked[0] == 0 and asked[-1] == 2002 and all(i % 4 != 3 for i in asked)
