"""Every metric of classes equals an independent implementation, or a hand-made case where there is none."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from amkd_monai.metrics import classification as m

if sys.modules.get("transformers", m) is None:
    del sys.modules["transformers"]  # held back by conftest.py; torchmetrics imports it where it is installed
from torchmetrics.functional.classification import multiclass_calibration_error


def cases(seed=0, n=80, classes=5, sharpness=1.0):
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=n)
    z = rng.normal(size=(n, classes)) + sharpness * np.eye(classes)[label]
    p = np.exp(z)
    return label, p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_they_equal_scikit_learn(seed):
    label, p = cases(seed)
    answer = p.argmax(1)
    assert m.quadratic_weighted_kappa(label, answer, 5) == pytest.approx(
        sk.cohen_kappa_score(label, answer, weights="quadratic")
    )
    assert m.balanced_accuracy(label, answer) == pytest.approx(sk.balanced_accuracy_score(label, answer))
    assert m.macro_auroc(label, p) == pytest.approx(sk.roc_auc_score(label, p, multi_class="ovr"))
    assert m.auroc(label >= 2, p[:, 2:].sum(1)) == pytest.approx(sk.roc_auc_score(label >= 2, p[:, 2:].sum(1)))
    assert m.sensitivity(label >= 2, answer >= 2) == pytest.approx(sk.recall_score(label >= 2, answer >= 2))
    assert m.specificity(label >= 2, answer >= 2) == pytest.approx(sk.recall_score(label < 2, answer < 2))
    assert m.brier(label, p) == pytest.approx(sum(sk.brier_score_loss(label == c, p[:, c]) for c in range(5)))
    assert np.array_equal(m.confusion_matrix(label, answer, 5), sk.confusion_matrix(label, answer))


def test_ties_count_half():
    label, score = np.array([0, 0, 1, 1, 1]), np.array([0.2, 0.5, 0.5, 0.5, 0.9])
    assert m.auroc(label, score) == pytest.approx(sk.roc_auc_score(label, score))


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_the_calibration_error_equals_torchmetrics(sharpness):
    label, p = cases(1, sharpness=sharpness)
    other = multiclass_calibration_error(torch.from_numpy(p), torch.from_numpy(label), num_classes=5, n_bins=15)
    assert m.expected_calibration_error(label, p) == pytest.approx(float(other), abs=1e-6)
    table = m.reliability_table(label, p)
    assert sum(row["count"] for row in table) == 80
    assert all(row["low"] < row["confidence"] <= row["high"] + 1e-12 for row in table)


@pytest.mark.parametrize("wanted", [0.82, 0.95, 1.0])
def test_specificity_at_a_sensitivity_is_the_best_point_of_the_curve(wanted):
    label, p = cases(2, classes=2)
    false_positive, true_positive, _ = sk.roc_curve(label, p[:, 1], drop_intermediate=False)
    best = (1 - false_positive[true_positive >= wanted - 1e-12]).max()
    assert m.specificity_at_sensitivity(label == 1, p[:, 1], wanted) == pytest.approx(best)


def test_what_cannot_be_said_is_nan():
    ones = np.ones(4, int)
    assert math.isnan(m.auroc(ones, [0.1, 0.2, 0.3, 0.4]))
    assert math.isnan(m.specificity_at_sensitivity(ones, [0.1, 0.2, 0.3, 0.4], 0.8))
    assert math.isnan(m.quadratic_weighted_kappa(ones, ones, 3))
    assert m.quadratic_weighted_kappa([0, 1, 2, 1], [1, 1, 1, 1], 3) == 0
    difference, *others = m.delong_test([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.1], [0.5] * 4)  # four cases prove nothing
    assert difference == 0.5 and np.isnan(others).all()


def test_delong_variance_is_that_of_the_placement_values():
    label, p = cases(3, classes=2)
    positive, score = label == 1, p[:, 1]
    areas, covariance = m.delong(positive, (score, 1 - score))
    assert areas == pytest.approx([sk.roc_auc_score(label, score), 1 - sk.roc_auc_score(label, score)])
    psi = np.array([[(a > b) + 0.5 * (a == b) for b in score[~positive]] for a in score[positive]])
    expected = psi.mean(1).var(ddof=1) / positive.sum() + psi.mean(0).var(ddof=1) / (~positive).sum()
    assert covariance[0, 0] == pytest.approx(expected)
    assert covariance[0, 1] == pytest.approx(-expected)


def test_delong_agrees_with_resampled_differences_and_holds_its_level():
    rng = np.random.default_rng(4)
    rejected, deviations, claimed = 0, [], []
    for _ in range(300):
        positive = np.arange(60) % 2 == 0
        signal = positive + rng.normal(size=60)
        a, b = signal + rng.normal(size=60), signal + rng.normal(size=60)
        difference, low, high, p = m.delong_test(positive, a, b)
        rejected += p < 0.05
        deviations.append(difference)
        claimed.append((high - low) / (2 * stats.norm.ppf(0.975)))
    assert 2 <= rejected <= 30, "about 5 % of 300"
    assert np.mean(claimed) == pytest.approx(np.std(deviations), rel=0.2)
    assert m.delong_test(positive, a, a) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="two cases of each kind"):
        m.delong_test([True, False, False], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
