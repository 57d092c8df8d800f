"""Uncertainty is 0 for a sure answer, grows with doubt, and equals a reference written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from amkd_monai.label.uncertainty import class_uncertainty, mask_uncertainty


def test_a_sure_mask_has_none_and_an_empty_one_has_most():
    sure = torch.zeros(2, 4, 5)
    sure[1, :2], sure[0, 2:] = 1, 1
    assert mask_uncertainty(sure) == pytest.approx(0)
    assert mask_uncertainty(torch.stack([torch.ones(4, 5), torch.zeros(4, 5)])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(3, 6, 7), (2, 3, 6, 7)])
def test_the_mean_over_classes_equals_a_loop_over_pixels(shape):
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0)).softmax(0)
    flat = probabilities.flatten(1).T.tolist()
    values = []
    for index in range(1, shape[0]):
        own = [p[index] for p in flat]
        mask = [float(p.index(max(p)) == index) for p in flat]
        values.append(1 - 2 * sum(a * b for a, b in zip(own, mask, strict=True)) / (sum(own) + sum(mask)))
    assert mask_uncertainty(probabilities) == pytest.approx(sum(values) / len(values))


def test_doubt_at_the_edge_counts():
    steep, soft = (torch.linspace(-4, 4, 20).mul(s).sigmoid().expand(5, 20) for s in (4, 1))
    assert mask_uncertainty(torch.stack([1 - steep, steep])) < mask_uncertainty(torch.stack([1 - soft, soft]))


def test_entropy_of_classes_is_a_part_of_the_largest():
    assert class_uncertainty(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert class_uncertainty(torch.full((4,), 0.25)) == pytest.approx(1)
    p = [0.5, 0.3, 0.2]
    assert class_uncertainty(torch.tensor(p)) == pytest.approx(-sum(v * math.log(v) for v in p) / math.log(3))
