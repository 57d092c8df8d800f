"""Intervals and tests against scipy, hand examples and simulated coverage."""

import json
import math
import runpy

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats

from amkd_monai.data.datasets import get_task
from amkd_monai.metrics.classification import class_row
from amkd_monai.metrics.statistics import bootstrap_ci, holm, wilcoxon_p
from amkd_monai.metrics.summary import write_case_csv

TABLES = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
seed_and_case_ci = TABLES["seed_and_case_ci"]
RNG = np.random.default_rng(7)
SKEWED = RNG.beta(6, 1.2, size=60)


def test_bootstrap_equals_scipy_percentile_bootstrap():
    mean, low, high = bootstrap_ci(SKEWED)
    expected = stats.bootstrap((SKEWED,), np.mean, n_resamples=10000, method="percentile").confidence_interval
    assert mean == pytest.approx(SKEWED.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for simulation in range(400):
        _, low, high = bootstrap_ci(rng.beta(6, 1.2, size=40), resamples=400, seed=simulation)
        hits += low <= 6 / 7.2 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_bootstrap_is_reproducible_and_chunks_do_not_matter(monkeypatch):
    assert bootstrap_ci(SKEWED, seed=3) == bootstrap_ci(SKEWED, seed=3) != bootstrap_ci(SKEWED, seed=4)
    whole = bootstrap_ci(SKEWED, resamples=1000)
    monkeypatch.setattr("amkd_monai.metrics.statistics.BOOTSTRAP_CHUNK", 7 * len(SKEWED))
    assert bootstrap_ci(SKEWED, resamples=1000) == whole


def test_bootstrap_of_few_values():
    np.testing.assert_equal(bootstrap_ci([]), (math.nan, math.nan, math.nan))
    np.testing.assert_equal(bootstrap_ci([math.nan, math.nan]), (math.nan, math.nan, math.nan))
    np.testing.assert_equal(bootstrap_ci([0.4, math.nan]), (0.4, math.nan, math.nan))
    assert bootstrap_ci([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert bootstrap_ci([*SKEWED, math.nan]) == bootstrap_ci(SKEWED)


def test_paired_bootstrap_sees_through_the_variation_between_cases():
    better = SKEWED + RNG.normal(0.02, 0.005, size=60)
    difference, low, high = bootstrap_ci(better - SKEWED)
    assert difference == pytest.approx(np.mean(better - SKEWED))
    assert 0.015 < low < difference < high < 0.025
    assert bootstrap_ci(SKEWED)[2] > better.mean()  # unpaired, the two cannot be told apart


@pytest.mark.parametrize("n", [8, 60])
def test_wilcoxon_equals_scipy(n):
    a, b = RNG.random(n), RNG.random(n)
    assert wilcoxon_p(a - b) == stats.wilcoxon(a, b).pvalue
    b[0] = a[0]
    assert wilcoxon_p(a - b) == stats.wilcoxon(a, b).pvalue
    assert wilcoxon_p([*(a - b), math.nan]) == stats.wilcoxon(a, b).pvalue


def test_wilcoxon_of_equal_and_of_no_pairs():
    assert wilcoxon_p(SKEWED - SKEWED) == 1.0
    assert math.isnan(wilcoxon_p([math.nan]))
    assert math.isnan(wilcoxon_p([]))


def test_wilcoxon_by_hand():
    # differences 1, 2, 3, -4, 5: ranks of the negative ones sum to 4; 7 of 32 sign patterns have a sum <= 4
    assert wilcoxon_p([1, 2, 3, -4, 5]) == pytest.approx(2 * 7 / 32)
    # of 30 pairs 5 differ, all in one direction: 2 of 32 sign patterns are as far off
    assert wilcoxon_p([1, 2, 3, 4, 5] + [0] * 25) == pytest.approx(2 / 32)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, made monotone: .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    np.testing.assert_allclose(holm([0.01, math.nan, 0.04]), [0.02, math.nan, 0.04])


def test_seed_and_case_of_one_seed_is_the_case_bootstrap():
    both, cases = seed_and_case_ci(SKEWED[None]), bootstrap_ci(SKEWED)
    assert both == pytest.approx(cases, abs=0.003)


def test_seed_and_case_widens_with_the_spread_of_seeds():
    offsets = np.array([-0.1, 0.0, 0.1])[:, None]
    same, spread = np.repeat(SKEWED[None], 3, axis=0), SKEWED[None] + offsets
    mean, low, high = seed_and_case_ci(spread)
    assert mean == pytest.approx(SKEWED.mean())
    _, low_same, high_same = seed_and_case_ci(same)
    assert high - low > 1.5 * (high_same - low_same)
    assert seed_and_case_ci(same) == pytest.approx(bootstrap_ci(SKEWED), abs=0.003)


def test_seed_and_case_equals_a_plain_crossed_bootstrap():
    rng = np.random.default_rng(1)
    matrix = rng.random((4, 12)) + rng.normal(size=(4, 1))
    matrix[rng.random((4, 12)) < 0.2] = np.nan
    means = [np.nanmean(matrix[np.ix_(rng.integers(4, size=4), rng.integers(12, size=12))]) for _ in range(10000)]
    expected = (np.nanmean(matrix), *np.percentile(means, [2.5, 97.5]))
    assert seed_and_case_ci(matrix) == pytest.approx(expected, abs=0.05)


def test_seed_and_case_of_few_values():
    np.testing.assert_equal(seed_and_case_ci(np.full((3, 4), np.nan)), (math.nan,) * 3)
    np.testing.assert_equal(seed_and_case_ci([[0.5], [0.7]]), (0.6, math.nan, math.nan))
    column = np.array([[0.2, 0.4, np.nan], [0.4, 0.6, np.nan]])
    assert seed_and_case_ci(column) == seed_and_case_ci(column[:, :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ci([0.1, math.inf]), "infinite"),
        (lambda: bootstrap_ci([[0.1]]), "one-dimensional"),
        (lambda: holm([0.1, 1.2]), r"\[0, 1\]"),
        (lambda: seed_and_case_ci([0.1, 0.2]), r"\(seeds, cases\)"),
        (lambda: seed_and_case_ci([[0.1, math.inf]]), "infinite"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_are_drawn_as_a_whole():
    """Copies of a case add nothing: the interval is that of the groups."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 20))
    alone = seed_and_case_ci(values)
    copied = seed_and_case_ci(np.repeat(values, 5, axis=1), groups=[case for case in range(20) for _ in range(5)])
    assert copied == pytest.approx(alone)
    narrow = seed_and_case_ci(np.repeat(values, 5, axis=1))
    assert narrow[2] - narrow[1] < 0.8 * (copied[2] - copied[1])
    assert np.isnan(seed_and_case_ci(values, groups=["one"] * 20)[1:]).all()


@pytest.mark.parametrize("task", ["kvasir_seg", "aptos2019"])
def test_tables_pair_the_same_cases_labels_and_seeds_alone(task, tmp_path):
    def runs(name, first=0, seeds=2, shift=0, count=20):
        for seed in range(seeds):
            folder, ids = tmp_path / name / f"fold0_seed{seed}", [f"c{first + i}" for i in range(count)]
            if task == "kvasir_seg":
                rows = [{"id": i, **dict.fromkeys(("dice", "iou", "nsd", "hd95"), RNG.random())} for i in ids]
            else:
                p = RNG.dirichlet(np.ones(5), count)
                rows = [class_row(get_task(task), i, (n + shift) % 5, p[n]) for n, i in enumerate(ids)]
            folder.mkdir(parents=True)
            write_case_csv(folder / "per_case.csv", rows)
            (folder / "split_x.json").write_text(json.dumps({"test": [[i, i] for i in ids]}))
            (folder / "run.json").write_text('{"cpu_seconds": 60}')
        return TABLES["Row"](task, seeds, None)

    rows = {"same": runs("same"), "others": runs("others", 5), "more": runs("more", count=25)}
    rows |= {"one_seed": runs("one_seed", seeds=1)} | ({"labels": runs("labels", shift=1)} if task[0] == "a" else {})
    row = runs("row")
    for name in rows:
        pair = {name: rows[name], "row": TABLES["Row"](task, row.seeds, name)}
        if name == "same":
            assert "| row | 2 x 20 |" in TABLES["table"](pair, tmp_path)
        else:
            with pytest.raises(ValueError, match=f"row and {name}"):
                TABLES["table"](pair, tmp_path)
