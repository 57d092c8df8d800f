"""Confidence intervals over cases, and paired tests; the same draws (:func:`resampled`) serve all metrics of a set."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BOOTSTRAP_CHUNK = 4_000_000  # number of resampled indices held in memory at a time (32 MB)
RESAMPLES = 2000  # bootstrap samples for a metric of a whole set of cases
TAILS = (50 * (1 - 0.95), 100 - 50 * (1 - 0.95))  # percentiles that bound 95 %


def bootstrap_ci(values: ArrayLike, resamples: int = 10000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a metric with its 95 % percentile bootstrap interval over cases (Efron, Ann. Stat. 7, 1979).

    ``values`` (N,) hold one value per case; NaN (a case without a value) is left out, an infinite value is refused.
    Returns ``(mean, low, high)``; all NaN without a value, NaN bounds with a single one.
    """
    x = _vector(values)
    x = x[~np.isnan(x)]
    if len(x) < 2:
        return (float(x[0]) if len(x) else np.nan), np.nan, np.nan
    options = {"n_resamples": resamples, "method": "percentile", "batch": max(1, BOOTSTRAP_CHUNK // len(x))}
    found = stats.bootstrap((x,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return float(x.mean()), float(found.low), float(found.high)


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided p value of the Wilcoxon signed-rank test on differences (N,) of paired cases; NaN without a pair."""
    x = _vector(differences)
    known = x[~np.isnan(x)]
    if len(known) == 0:
        return np.nan
    moved = known[known != 0]  # with the zeros SciPy takes the normal distribution, however few moved
    return float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of one family of tests (Holm, Scand. J. Statist. 6, 1979: step-down Bonferroni).

    NaN (a test that could not be made) stays NaN and does not count; a value outside [0, 1] is a ValueError.
    """
    p = _vector(p_values)
    made = np.flatnonzero(~np.isnan(p))
    if ((p[made] < 0) | (p[made] > 1)).any():
        raise ValueError(f"p_values must lie in [0, 1], got {p.tolist()}.")
    order = made[np.argsort(p[made], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    p[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return list(p.tolist())


def resampled(count: int) -> NDArray[np.int64]:
    """Indices of bootstrap samples of cases (RESAMPLES, count)."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Bounds of the central 95 % of bootstrap values (resamples,); NaN are left out."""
    known = values[~np.isnan(values)]
    low, high = np.percentile(known, TAILS) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


def bootstrap_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p value: twice the smaller part of resampled differences on one side of 0 (Efron, Tibshirani, 1993)."""
    known = differences[~np.isnan(differences)]
    if len(known) == 0:
        return math.nan
    below, above = int((known <= 0).sum()), int((known >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(known) + 1))


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    """A copy of the values as a float vector without infinities."""
    x = np.array(values, dtype=np.float64)
    if x.ndim != 1 or np.isinf(x).any():
        raise ValueError(f"Values must be one-dimensional, none infinite: got shape {x.shape}.")
    return x
