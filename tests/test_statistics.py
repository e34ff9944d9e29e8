"""Intervals and paired tests against scipy and against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from karploop.reporting.statistics import (
    MAX_EXACT_SEEDS,
    Estimate,
    compare_paired,
    mean_interval,
    paired_t_test,
    share_interval,
    sign_flip_test,
)


def test_interval_by_hand():
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.302653: half width 4.302653 / sqrt(3).
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert (estimate.n, estimate.mean) == (3, 2.0)
    assert estimate.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert estimate.high == pytest.approx(2 + 2.484138, abs=1e-6)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_agrees_with_scipy(confidence):
    values = np.random.default_rng(0).normal(0.7, 0.1, size=7)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    estimate = mean_interval(list(values), confidence)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) == Estimate(1, 0.5, None, None)


def test_values_not_measured_are_not_counted():
    assert mean_interval([math.nan, 0.5]) == Estimate(1, 0.5, None, None)
    assert mean_interval([]) == Estimate(0, None, None, None)


def test_paired_comparison_agrees_with_scipy():
    rng = np.random.default_rng(1)
    baseline = dict(enumerate(rng.normal(0.6, 0.1, size=6)))
    arm = {seed: value + rng.normal(0.05, 0.03) for seed, value in baseline.items()}
    expected = stats.ttest_rel(list(arm.values()), list(baseline.values()))
    interval = expected.confidence_interval()
    found = compare_paired(arm, baseline)
    assert found.t_test_p == pytest.approx(expected.pvalue)
    assert found.difference.low == pytest.approx(interval.low)
    assert found.difference.high == pytest.approx(interval.high)


def test_pairs_are_matched_by_seed_not_by_order():
    found = compare_paired({2: 0.9, 0: 0.5, 7: 0.1}, {0: 0.4, 1: 0.0, 2: 0.7})
    assert found.difference.n == 2
    assert found.difference.mean == pytest.approx(0.15)  # (0.1 + 0.2) / 2


def test_no_common_seed():
    found = compare_paired({0: 0.5}, {1: 0.5})
    assert found.difference == Estimate(0, None, None, None)
    assert found.t_test_p is None and found.sign_flip_p is None


def test_sign_flips_by_hand():
    # |±1 ±2 ±3| reaches 6 for two of the eight sign patterns; |1 + 2 − 3| = 0 is always reached.
    assert sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    # |±1 ±1 ±3| is 5 or 3 for six of the eight, against |1 − 1 + 3| = 3.
    assert sign_flip_test([1.0, -1.0, 3.0]) == 6 / 8


def test_sign_flips_agree_with_scipy():
    differences = np.random.default_rng(2).normal(0.1, 0.2, size=8)
    expected = stats.permutation_test(
        (differences, np.zeros(8)),
        lambda a, b: np.mean(a - b),
        permutation_type="samples",
        n_resamples=math.inf,
    )
    assert sign_flip_test(list(differences)) == pytest.approx(expected.pvalue)


def test_sign_flips_count_ties_whatever_the_rounding():
    # 0.1 + 0.2 and 0.3 differ in the last bit; all orders and signs must agree.
    found = {sign_flip_test(p) for p in itertools.permutations([0.1, 0.2, -0.3, 0.6])}
    assert found == {10 / 16}


@pytest.mark.parametrize("n", [0, 1, MAX_EXACT_SEEDS + 1])
def test_sign_flips_only_where_exact_and_meaningful(n):
    assert sign_flip_test([0.1] * n) is None


@pytest.mark.parametrize("differences", [[0.1], [0.0, 0.0], [0.3 - 0.2, 0.2 - 0.1]])
def test_t_test_is_undefined_without_spread(differences):
    assert paired_t_test(differences) is None


def test_interval_of_a_share_by_hand():
    """Wilson's, but for one degree of freedom that the clusters take."""
    estimate = share_interval([1.0] * 8 + [0.0] * 2, range(10))
    n, p, z2 = 9, 0.8, stats.norm.ppf(0.975) ** 2
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    assert (estimate.n, estimate.mean) == (10, 0.8)
    assert estimate.low == pytest.approx(middle - half)
    assert estimate.high == pytest.approx(middle + half)


def test_interval_of_a_share_without_a_miss_has_width():
    sure = share_interval([1.0] * 10, range(10))
    assert sure.high == 1.0 and sure.low == pytest.approx(0.7225, abs=1e-4)  # 10 / (10 + z²)
    together = share_interval([1.0] * 10, [0] * 10)
    assert together.low == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6), "as of one value"
    assert share_interval([], []) == Estimate(0, None, None, None)


def test_interval_of_a_share_covers_what_goes_together():
    """Groups of five that are right or wrong together: 95% of the intervals hold the truth."""
    rng, groups = np.random.default_rng(0), np.repeat(range(40), 5).tolist()
    covered, naive = 0, 0
    for _ in range(400):
        right = np.repeat(rng.random(40) < 0.7, 5).astype(float).tolist()
        estimate = share_interval(right, groups)
        covered += estimate.low <= 0.7 <= estimate.high
        estimate = share_interval(right, range(200))
        naive += estimate.low <= 0.7 <= estimate.high
    assert 0.92 < covered / 400 < 0.98 and naive / 400 < 0.8
