"""Targets give the distiller what each part of the method needs, and compute nothing that isn't asked for."""

from __future__ import annotations

import math

import pytest
import torch
from test_prepare import LITE1, data, prepare  # noqa: F401 (a fixture)

from amkd_monai.engines.handlers import effective_number


def grids_of(targets):
    return targets.read(range(12), "cpu")["lite1"]["grid"]


def test_scores_come_with_the_teachers(data):  # noqa: F811
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    assert 0 < targets.teachers[0].score <= 1
    assert targets.teachers[0].score == pytest.approx(targets.record["teachers"][0]["dice"], abs=1e-4)


def test_the_table_of_samples_is_made_for_the_contrastive_loss_only(data):  # noqa: F811
    targets = prepare(data, [LITE1], admission_options={"mode": "all"})
    assert targets.samples_for({"output": 1.0}) is None and targets.samples_for({"contrastive": 0.0}) is None
    samples = targets.samples_for({"contrastive": 0.1})
    torch.testing.assert_close(samples.vectors["lite1"], grids_of(targets).mean((2, 3)), atol=1e-3, rtol=1e-3)
    assert samples.classes is None and len(samples.groups) == 12
    groups = data[0].groups
    same = [[a == b for b in groups] for a in groups]
    assert (samples.groups[:, None] == samples.groups[None, :]).tolist() == same


def test_without_teachers_there_is_no_table(data):  # noqa: F811
    assert prepare(data, []).samples_for({"contrastive": 1.0}) is None


@pytest.mark.parametrize(
    ("weights", "expected"), [([1.0, 0.0], 1), ([0.3, 0.3, 0.3], 3), ([0.0, 0.0], 0), ([0.75, 0.25], None)]
)
def test_the_effective_number_of_teachers(weights, expected):
    if expected is None:
        expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_number(weights) == pytest.approx(expected)
