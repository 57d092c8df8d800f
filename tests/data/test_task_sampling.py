"""Steps of several tasks follow from seed and epoch; large data sets come more often, but not in proportion."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from amkd_monai.data.sampling import BatchSampler
from amkd_monai.data.task_sampling import MultiTaskLoader

SIZES = {"small": 4, "middle": 16, "large": 64}


def loaders(batch=2):
    return {
        name: DataLoader(
            TensorDataset(torch.arange(n)), batch_sampler=BatchSampler(np.ones(n), np.ones(n), batch, seed=3)
        )
        for name, n in SIZES.items()
    }


def drawn(alpha, steps=3000, **options):
    counts = collections.Counter(t for s in MultiTaskLoader(loaders(), alpha, 1, steps, **options).plan() for t in s)
    return [counts[name] / steps for name in SIZES]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tasks_are_drawn_by_a_power_of_their_size(alpha):
    wanted = np.array([n**alpha for n in SIZES.values()])
    np.testing.assert_allclose(drawn(alpha), wanted / wanted.sum(), atol=0.03)


def test_an_epoch_is_a_function_of_seed_and_number():
    def content(seed, epoch):
        loader = MultiTaskLoader(loaders(), 0.5, 2, 9, seed)
        loader.set_epoch(epoch)
        return [{t: b[0].tolist() for t, b in step.items()} for step in loader]

    assert content(1, 4) == content(1, 4)
    assert content(1, 4) != content(1, 5) and content(1, 4) != content(2, 4)
    assert all(len(step) == 2 for step in content(1, 4))


def test_a_small_task_is_gone_through_again_in_another_order():
    loader = MultiTaskLoader(loaders(), 0.0, None, 6)
    assert loader.per_step == 3
    seen = [step["small"][0].tolist() for step in loader]  # two batches are one pass
    passes = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(p) == [0, 1, 2, 3] for p in passes) and len({tuple(p) for p in passes}) > 1


def test_an_epoch_is_as_long_as_all_samples_fill():
    assert len(MultiTaskLoader(loaders(), 0.5, 3)) == (2 + 8 + 32) / 3
    assert MultiTaskLoader(loaders(), 0.5, 7).per_step == 3, "never more than there are"


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="sampling_alpha is 2"):
        MultiTaskLoader(loaders(), 2)
    with pytest.raises(ValueError, match="tasks_per_step is 0"):
        MultiTaskLoader(loaders(), 0.5, 0)
