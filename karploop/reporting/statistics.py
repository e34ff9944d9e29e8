"""How sure a mean over seeds is, and how sure a difference between two arms is.

Seeds that agree in everything but one setting share data order and initialisation, so arms are
compared seed by seed. No correction for many comparisons is made here.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import special

# 2^16 sign patterns; above that the t-test has little left to assume.
MAX_EXACT_SEEDS = 16


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval, in the unit of the values."""

    n: int  # values behind the mean
    mean: float | None  # None where n is 0
    low: float | None  # None where n < 2: one value says nothing about spread
    high: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean difference (arm minus baseline) over the seeds that both have."""

    difference: Estimate
    t_test_p: float | None  # paired, two-sided; None where n < 2 or all differences are equal
    sign_flip_p: float | None  # exact, two-sided; None where n < 2 or n > MAX_EXACT_SEEDS


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean with Student's t interval; values that are not finite are not counted.

    With equal values the interval has no width: the sample shows no spread.
    """
    finite = [float(v) for v in values if math.isfinite(v)]
    n = len(finite)
    if n == 0:
        return Estimate(0, None, None, None)
    mean = float(np.mean(finite))
    if n == 1:
        return Estimate(1, mean, None, None)
    error = float(np.std(finite, ddof=1)) / math.sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Estimate(n, mean, mean - half, mean + half)


def share_interval(
    right: Sequence[float], groups: Sequence[Hashable], confidence: float = 0.95
) -> Estimate:
    """A share, such as an accuracy, with Wilson's interval, which holds up near 0 and 1 as well.

    Values of one group go together: where these agree, there are fewer independent ones than values
    (the design effect of a sample of clusters), and the interval is wider.

    Args:
      right: 0 to 1 each, such as 1 for right and 0.5 for half of it.
      groups: what each belongs to, such as its prompt.
    """
    n = len(right)
    if n == 0:
        return Estimate(0, None, None, None)
    right_N = np.asarray(right, np.float64)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    share, count = float(right_N.mean()), len(places)
    sums_G = np.bincount([places[group] for group in groups], right_N - share)
    variance = float(np.sum(sums_G**2)) / n**2 * count / max(count - 1, 1)  # of the share
    # All right or all wrong: how far values go together does not show, and counts at its most.
    effective = share * (1 - share) / variance if variance else count
    effective = min(max(effective, 1.0), n)
    return Estimate(n, share, *wilson(share, effective, confidence))


def wilson(share: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share of n independent values (Wilson 1927)."""
    z2 = float(special.ndtri((1 + confidence) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def compare_paired(
    arm: Mapping[Hashable, float], baseline: Mapping[Hashable, float], confidence: float = 0.95
) -> Comparison:
    """Compares two arms, each seed -> value, over the seeds that both have finite values for."""
    differences = [
        arm[seed] - baseline[seed]
        for seed in arm
        if seed in baseline and math.isfinite(arm[seed]) and math.isfinite(baseline[seed])
    ]
    return Comparison(
        difference=mean_interval(differences, confidence),
        t_test_p=paired_t_test(differences),
        sign_flip_p=sign_flip_test(differences),
    )


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p that the differences have mean zero; None where the test is undefined."""
    n = len(differences)
    # Equal differences make t infinite or 0/0; rounding leaves a spread of the last bit.
    spread = float(np.std(differences, ddof=1)) if n >= 2 else 0.0
    if spread <= 1e-12 * max(map(abs, differences), default=0.0):
        return None
    t = float(np.mean(differences)) / (spread / math.sqrt(n))
    return 2 * float(special.stdtr(n - 1, -abs(t)))


def sign_flip_test(differences: Sequence[float]) -> float | None:
    """Exact two-sided p that the differences are symmetric around zero.

    The share of all 2^n ways to choose the signs whose mean is as far from zero as the one seen.
    Its smallest possible value is 2 / 2^n: 0.25 for three seeds, 0.0625 for five.
    """
    n = len(differences)
    if not 2 <= n <= MAX_EXACT_SEEDS:
        return None
    signs_PxN = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    sums_P = np.abs(signs_PxN @ np.asarray(differences, dtype=np.float64))
    tolerance = 1e-12 * float(np.sum(np.abs(differences)))  # sums equal but for rounding
    return float(np.mean(sums_P >= sums_P[0] - tolerance))
