from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from amkd_monai.data.sampling import BatchSampler, MultiTaskLoader

LABELLED = np.arange(40) < 10
FOREGROUND = np.arange(40) % 5 == 0  # 2 of the 10 labelled


def sampler(**changes):
    options = {"has_label": LABELLED, "has_foreground": FOREGROUND & LABELLED, "batch_size": 4, "use_unlabelled": True}
    return BatchSampler(**{**options, **changes})


def epoch(made, number):
    made.set_epoch(number)
    return list(made)


def test_an_epoch_is_a_function_of_seed_and_number_alone():
    made = sampler(seed=3)
    first = [epoch(made, e) for e in range(3)]
    np.random.seed(1)
    again = sampler(seed=3)
    assert [epoch(again, e) for e in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert list(again) == first[1] == list(again)
    assert first[0] != first[1] != first[2]
    assert epoch(sampler(seed=4), 0) != first[0]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_every_batch_holds_its_share_of_labelled_samples(fraction):
    for batch in epoch(sampler(labelled_fraction=fraction), 1):
        assert len(batch) == 4 and sum(LABELLED[batch]) == round(4 * fraction)
        assert all(type(i) is int for i in batch)


def test_a_batch_has_a_labelled_sample_whatever_the_fraction():
    assert all(LABELLED[batch].sum() == 1 for batch in epoch(sampler(labelled_fraction=0.0), 0))
    assert all(LABELLED[batch].all() for batch in epoch(sampler(batch_size=1, labelled_fraction=1.0), 0))
    with pytest.raises(ValueError, match="recipe#batch_size 1"):  # none would ever be drawn
        sampler(batch_size=1)


def test_labelled_samples_are_drawn_about_equally_often():
    for options in ({}, {"use_unlabelled": False}):
        counts = Counter(i for batch in epoch(sampler(**options), 0) for i in batch if LABELLED[i])
        assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) <= 1


def test_unlabelled_samples_are_drawn_without_repetition_until_used_up():
    drawn = [i for batch in epoch(sampler(), 0) for i in batch if not LABELLED[i]]
    assert len(drawn) == 20 == len(set(drawn))


@pytest.mark.parametrize("batch_size", [3, 4, 7, 64])
def test_runs_with_and_without_unlabelled_samples_have_equal_steps(batch_size):
    with_them, without = sampler(batch_size=batch_size), sampler(batch_size=batch_size, use_unlabelled=False)
    assert len(with_them) == len(without) == len(list(with_them)) == len(list(without)) == -(-40 // batch_size)
    assert all(LABELLED[batch].all() and len(batch) == batch_size for batch in without)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_the_foreground_fraction_holds_over_an_epoch(fraction):
    batches = epoch(sampler(use_unlabelled=False, foreground_fraction=fraction), 2)
    drawn = np.concatenate(batches)
    assert np.mean(FOREGROUND[drawn]) == pytest.approx(fraction, abs=1 / len(drawn))
    if 0 < fraction < 1:
        assert len({int(FOREGROUND[b].sum()) for b in batches}) > 1  # mixed, not in blocks
        front = FOREGROUND[drawn]
        assert 0.15 * len(drawn) < np.abs(np.diff(front.astype(int))).sum()


def test_the_foreground_fraction_leaves_unlabelled_shares_alone():
    batches = epoch(sampler(foreground_fraction=0.8), 0)
    assert all(LABELLED[b].sum() == 2 for b in batches)
    labelled = [i for b in batches for i in b if LABELLED[i]]
    assert np.mean(FOREGROUND[labelled]) == pytest.approx(0.8, abs=0.05)


def test_without_foreground_anywhere_samples_come_as_they_are():
    made = sampler(has_foreground=np.zeros(40, bool), foreground_fraction=0.5, use_unlabelled=False)
    assert set(np.concatenate(epoch(made, 0))) == set(range(10))


@pytest.mark.parametrize("use_unlabelled", [False, True])
@pytest.mark.parametrize("foreground_fraction", [None, 0.5])
def test_ranks_share_the_epoch_of_one_process(use_unlabelled, foreground_fraction):
    options = {"use_unlabelled": use_unlabelled, "foreground_fraction": foreground_fraction, "seed": 5}
    whole = epoch(sampler(batch_size=8, **options), 3)
    ranks = [epoch(sampler(batch_size=4, rank=r, world_size=2, **options), 3) for r in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for together, first, second in zip(whole, *ranks, strict=True):
        assert sorted(together) == sorted(first + second)
        if not use_unlabelled and foreground_fraction is None and len(set(together)) == len(together):
            assert not set(first) & set(second)


def test_ranks_draw_disjoint_samples_within_a_round():
    many = np.ones(64, bool)
    ranks = [BatchSampler(many, many, 8, rank=r, world_size=4) for r in range(4)]
    drawn = [{i for batch in epoch(r, 0) for i in batch} for r in ranks]
    assert [len(d) for d in drawn] == [16] * 4 and set.union(*drawn) == set(range(64))


def test_indices_restrict_the_pool():
    chosen = [1, 2, 3, 20, 21, 22]
    made = sampler(indices=chosen, batch_size=2)
    assert len(made) == 3 and set(np.concatenate(epoch(made, 0))) <= set(chosen)


def test_no_labelled_sample_is_named():
    with pytest.raises(ValueError, match="no labelled sample"):
        sampler(indices=[20, 21])


@pytest.mark.parametrize(("balance", "share"), [(0.0, 0.1), (0.5, 0.25), (1.0, 0.5)])
def test_rare_classes_are_drawn_as_often_as_asked(balance, share):
    classes = np.array([0] * 180 + [1] * 20 + [-1] * 30)
    known = classes >= 0
    sampler = BatchSampler(known, known, 10, classes=classes, class_balance=balance, min_steps=200)
    drawn = np.concatenate(list(sampler))
    assert known[drawn].all()
    assert np.mean(classes[drawn] == 1) == pytest.approx(share, abs=0.02)
    assert len(set(drawn)) == 200, "everyone is drawn"


def test_a_class_balance_needs_classes():
    with pytest.raises(ValueError, match=r"recipe#class_balance is 0\.5"):
        BatchSampler([True, True], [True, False], 2, class_balance=0.5)


SIZES = {"small": 4, "middle": 16, "large": 64}


def loaders(batch=2):
    return {
        name: DataLoader(
            TensorDataset(torch.arange(n)), batch_sampler=BatchSampler(np.ones(n), np.ones(n), batch, seed=3)
        )
        for name, n in SIZES.items()
    }


def drawn(alpha, steps=3000, **options):
    counts = Counter(t for s in MultiTaskLoader(loaders(), alpha, 1, steps, **options).plan() for t in s)
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
    for steps in (0, 2.0, 9.5, "2", True):
        with pytest.raises(ValueError, match="tasks_per_step is "):
            MultiTaskLoader(loaders(), 0.5, steps)
