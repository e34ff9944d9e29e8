"""How much of a gold reward is won by optimising a proxy of it (arXiv 2210.10760).

A policy is d = √KL away from where it began, in nats. Best-of-n, which answers with the best of n
samples by the proxy, has KL = log n − (n − 1) / n in closed form (the paper's section 1). What the
gold reward gains over the base has the forms (its equation 1)

  best-of-n               R(d) = d (α − β d)
  reinforcement learning  R(d) = d (α − β log d)

which are linear in α and β, and fitted by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from karploop.errors import UserError

BEST_OF_N, LEARNING = FORMS = ("best-of-n", "reinforcement learning")


def divergence_of_best(n: int) -> float:
    """KL of best-of-n to what the samples are drawn from, in nats; without ties."""
    return math.log(n) - (n - 1) / n


def best_of_n(proxy_N: np.ndarray, gold_N: np.ndarray, ns: Sequence[int]) -> np.ndarray:
    """The expected proxy and gold of the best of n by the proxy, unbiased, from N samples.

    That is the mean over all subsets of n of the N. With the samples in order of the proxy, sample
    k of 1 … N is the best of C(k − 1, n − 1) of the C(N, n) subsets (arXiv 2210.10760 names the
    estimator, from 2112.09332). Of equal proxies any may be taken: they count with their mean gold.

    Args:
      ns: 1 … N each.

    Returns:
      best_nx2 in float64: proxy, gold.

    Raises:
      UserError: an n is below 1 or above N, or a number is not finite.
    """
    proxy_N, gold_N = np.asarray(proxy_N, np.float64), np.asarray(gold_N, np.float64)
    count = len(proxy_N)
    if not ns or min(ns) < 1 or max(ns) > count:
        raise UserError(
            f"best of {', '.join(map(str, ns)) or 'nothing'} of {count} samples: take from 1 to as "
            "many as there are"
        )
    if not (np.isfinite(proxy_N).all() and np.isfinite(gold_N).all()):
        raise UserError("best-of-n: a reward is missing or infinite; leave such samples out")
    _, place_N, size_U = np.unique(proxy_N, return_inverse=True, return_counts=True)
    gold_N = (np.bincount(place_N, gold_N) / size_U)[place_N]
    order = np.argsort(proxy_N, kind="stable")
    rewards_Nx2 = np.stack([proxy_N, gold_N], 1)[order]
    return np.stack([_chances(count, n) @ rewards_Nx2 for n in ns])


def _chances(count: int, n: int) -> np.ndarray:
    """chance_N that each, in rising order, is the best of a subset of n."""
    k_K = np.arange(n, count + 1)
    log_K = _log_choose(k_K - 1, n - 1) - _log_choose(count, n)
    return np.concatenate([np.zeros(n - 1), np.exp(log_K)])


def _log_choose(total, some):
    return gammaln(total + 1) - gammaln(some + 1) - gammaln(total - some + 1)


@dataclass(frozen=True)
class Fit:
    """A published form, fitted to a curve.

    Attributes:
      r2: 1 − squared residuals / squared deviations from the mean.
    """

    form: str
    alpha: float
    beta: float
    r2: float

    def gain(self, distance_D: np.ndarray) -> np.ndarray:
        """gain_D at distances above 0."""
        return _terms(self.form, np.asarray(distance_D)) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> float | None:
        """The distance where the form is highest; None where it never falls."""
        if self.beta <= 0:
            return None
        if self.form == BEST_OF_N:
            return self.alpha / (2 * self.beta)
        return math.exp(self.alpha / self.beta - 1)


def fit(form: str, distance_D: Sequence[float], gain_D: Sequence[float]) -> Fit | None:
    """The form that is nearest in squares to a curve; None for fewer than 3 different distances.

    Args:
      form: one of FORMS.
      distance_D: √KL; points that are not above 0 are where the form is 0, and not counted.
      gain_D: of the gold reward over the base.
    """
    distance_D, gain_D = np.asarray(distance_D, np.float64), np.asarray(gain_D, np.float64)
    away_D = distance_D > 0
    distance_D, gain_D = distance_D[away_D], gain_D[away_D]
    if len(set(distance_D.tolist())) < 3 or not np.ptp(gain_D):
        return None
    terms_Dx2 = _terms(form, distance_D)
    (alpha, beta), *_ = np.linalg.lstsq(terms_Dx2, gain_D, rcond=None)
    residual_D = gain_D - terms_Dx2 @ np.array([alpha, beta])
    r2 = 1 - np.sum(residual_D**2) / np.sum((gain_D - gain_D.mean()) ** 2)
    return Fit(form, float(alpha), float(beta), float(r2))


def _terms(form: str, distance_D: np.ndarray) -> np.ndarray:
    """What α and β are multiplied by, terms_Dx2."""
    bend_D = distance_D if form == BEST_OF_N else np.log(distance_D)
    return np.stack([distance_D, -distance_D * bend_D], 1)


@dataclass(frozen=True)
class Fall:
    """How a curve of gains ends.

    Attributes:
      peak: place of the largest gain.
      share: of the largest gain, what is lost from there to the end; NaN where nothing is gained.
    """

    peak: int
    share: float


def fall(gain_D: Sequence[float]) -> Fall:
    """From the largest gain to the last one, in the order of distances."""
    peak = int(np.argmax(gain_D))
    most = gain_D[peak]
    return Fall(peak, float((most - gain_D[-1]) / most) if most > 0 else math.nan)
