"""A judge as an instrument: how often it is right, and in which ways it errs.

All measures are of verdicts on samples whose gold label is known, 0 or 1: whether a completion is
good or, for a pair, whether the first of the two is the better. A verdict is a yes where its score
is above the threshold, a no below, and half of each on it. Missing verdicts are left out of every
measure but `coverage`, which counts them.

Intervals are percentiles of a bootstrap over samples: all verdicts on a sample are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy import stats

from karploop.reporting.statistics import Estimate

BINS = 10


@dataclass(frozen=True)
class Judged:
    """Verdicts of one judge; N rows, NaN where something is not known."""

    sample_N: np.ndarray  # int64; equal for verdicts on the same sample
    score_N: np.ndarray  # float64
    gold_N: np.ndarray  # 0 or 1
    length_N: np.ndarray  # of what is judged; of a pair, the first's minus the second's
    own_N: np.ndarray  # 1 where the judge's own weights wrote it, else 0
    forward_N: np.ndarray  # of a pair: the score when it is shown in its order
    backward_N: np.ndarray  # and when it is shown the other way round, for the same first

    def __len__(self) -> int:
        return len(self.sample_N)

    def take(self, index: np.ndarray) -> Judged:
        """The rows at `index`, or where it is true."""
        return Judged(*(getattr(self, f.name)[index] for f in fields(self)))


Measure = Callable[[Judged, float], float]


def decisions(score_N: np.ndarray, threshold: float) -> np.ndarray:
    """1 for a yes, 0 for a no, 0.5 for neither; NaN stays."""
    return np.where(np.isnan(score_N), np.nan, 0.5 * (1 + np.sign(score_N - threshold)))


def coverage(rows: Judged, threshold: float) -> float:
    """Share of verdicts that are not missing."""
    return float(np.mean(~np.isnan(rows.score_N)))


def accuracy(rows: Judged, threshold: float) -> float:
    """Share of right decisions; a tie is half right."""
    rows = _given(rows)
    return float(_agreement(decisions(rows.score_N, threshold), rows.gold_N))


def base_rate(rows: Judged, threshold: float) -> float:
    """What always giving the commoner answer would score."""
    gold_N = _given(rows).gold_N
    return float(max(gold_N.mean(), 1 - gold_N.mean())) if len(gold_N) else math.nan


def kappa(rows: Judged, threshold: float) -> float:
    """Cohen's kappa: agreement with gold beyond what the two rates of yes give by chance."""
    rows = _given(rows)
    return _kappa(decisions(rows.score_N, threshold), rows.gold_N)


def auc(rows: Judged, threshold: float) -> float:
    """Probability that a good one scores higher than a bad one; ties count half."""
    rows = _given(rows)
    good = rows.gold_N == 1
    pairs = good.sum() * (~good).sum()
    if not pairs:
        return math.nan
    ranks = stats.rankdata(rows.score_N)
    return float((ranks[good].sum() - good.sum() * (good.sum() + 1) / 2) / pairs)


def expected_calibration_error(rows: Judged, threshold: float) -> float:
    """Mean distance of score and share of gold over ten equal bins; scores are probabilities."""
    found = reliability(rows)
    if not found:
        return math.nan
    return float(sum(abs(b.score - b.gold) * b.count for b in found) / sum(b.count for b in found))


def order_consistency(rows: Judged, threshold: float) -> float:
    """Share of pairs decided for the same one in both orders."""
    forward, backward = _both_orders(rows, threshold)
    return float(np.mean(forward == backward)) if len(forward) else math.nan


def position_bias(rows: Judged, threshold: float) -> float:
    """By how much the one shown first is preferred, −0.5 … 0.5: mean over both orders."""
    known = ~np.isnan(rows.forward_N) & ~np.isnan(rows.backward_N)
    # Shown backward, the first of the two on the screen is the second of the pair.
    shown_first = (rows.forward_N + 1 - rows.backward_N)[known] / 2
    return float(np.mean(shown_first) - 0.5) if known.any() else math.nan


def repeat_consistency(rows: Judged, threshold: float) -> float:
    """Probability that two verdicts on the same sample decide alike."""
    rows = _given(rows)
    _, group_N, count_G = np.unique(rows.sample_N, return_inverse=True, return_counts=True)
    repeated = count_G > 1
    if not repeated.any():
        return math.nan
    yes_G = np.bincount(group_N, decisions(rows.score_N, threshold))
    n, yes = count_G[repeated], yes_G[repeated]
    return float(np.mean((yes * (yes - 1) + (n - yes) * (n - yes - 1)) / (n * (n - 1))))


def length_bias(rows: Judged, threshold: float) -> float:
    """Correlation of score and length at equal gold (partial correlation, gold held fixed)."""
    rows = _given(rows)
    rows = rows.take(~np.isnan(rows.length_N))
    if len(rows) < 3:
        return math.nan
    score, length = (_within(x, rows.gold_N) for x in (rows.score_N, rows.length_N))
    spread = math.sqrt(float(np.mean(score**2) * np.mean(length**2)))
    return float(np.mean(score * length)) / spread if spread > 1e-12 else math.nan


def self_preference(rows: Judged, threshold: float) -> float:
    """Mean score of what the judge wrote itself minus that of others' texts, at equal gold."""
    rows = _given(rows)
    differences, counts = [], []
    for gold in (0, 1):
        own, other = (rows.score_N[(rows.gold_N == gold) & (rows.own_N == who)] for who in (1, 0))
        if len(own) and len(other):
            differences.append(own.mean() - other.mean())
            counts.append(len(own) + len(other))
    return float(np.average(differences, weights=counts)) if counts else math.nan


MEASURES: dict[str, Measure] = {
    "coverage": coverage,
    "accuracy": accuracy,
    "base_rate": base_rate,
    "kappa": kappa,
    "auc": auc,
    "ece": expected_calibration_error,
    "order_consistency": order_consistency,
    "position_bias": position_bias,
    "repeat_consistency": repeat_consistency,
    "length_bias": length_bias,
    "self_preference": self_preference,
}


def calibrate(
    rows: Judged, threshold: float = 0.5, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Every measure that the rows allow, with its 95% interval; `n` counts the samples."""
    samples, group_N = np.unique(rows.sample_N, return_inverse=True)
    order = np.argsort(group_N, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group_N))[:-1])
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in MEASURES}
    values = {name: measure(rows, threshold) for name, measure in MEASURES.items()}
    known = [name for name, value in values.items() if not math.isnan(value)]
    for _ in range(resamples if known else 0):
        chosen = rng.integers(len(samples), size=len(samples))
        parts = [members[i] for i in chosen]
        # A sample that is drawn twice is two samples.
        again = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        resample = replace(rows.take(np.concatenate(parts)), sample_N=again)
        for name in known:
            drawn[name].append(MEASURES[name](resample, threshold))
    found = {}
    for name in known:
        finite = [x for x in drawn[name] if not math.isnan(x)]
        low, high = np.percentile(finite, [2.5, 97.5]) if finite else (None, None)
        interval = (None, None) if low is None else (float(low), float(high))
        found[name] = Estimate(len(samples), values[name], *interval)
    return found


def agreement(one: Judged, other: Judged, threshold: float = 0.5) -> float:
    """Cohen's kappa of two judges on the samples that both gave a verdict on."""
    decided = [_by_sample(rows, threshold) for rows in (one, other)]
    shared = sorted(decided[0].keys() & decided[1].keys())
    if not shared:
        return math.nan
    first, second = (np.array([d[sample] for sample in shared]) for d in decided)
    return _kappa(first, second)


@dataclass(frozen=True)
class Bin:
    """Verdicts of about the same score."""

    score: float  # their mean
    gold: float  # the share of them that is good
    count: int


def reliability(rows: Judged) -> list[Bin]:
    """Ten equal bins of the scores, without empty ones; none where scores leave [0, 1]."""
    rows = _given(rows)
    if not len(rows) or rows.score_N.min() < 0 or rows.score_N.max() > 1:
        return []
    place_N = np.minimum((rows.score_N * BINS).astype(int), BINS - 1)
    inside = [place_N == place for place in range(BINS)]
    return [
        Bin(float(rows.score_N[i].mean()), float(rows.gold_N[i].mean()), int(i.sum()))
        for i in inside
        if i.any()
    ]


def recalibrated(rows: Judged, method: str, folds: int = 5, seed: int = 0) -> Judged:
    """Rows whose scores are mapped to probabilities, each by a map that has not seen its sample.

    Args:
      method: "platt" (a logistic curve) or "isotonic" (any increasing step function).
    """
    samples = np.unique(rows.sample_N)
    fold_of = np.random.default_rng(seed).permutation(len(samples)) % folds
    fold_N = fold_of[np.searchsorted(samples, rows.sample_N)]
    mapped_N = np.full(len(rows), np.nan)
    given_N = ~np.isnan(rows.score_N)
    for fold in range(folds):
        inside = (fold_N == fold) & given_N
        rest = rows.take((fold_N != fold) & given_N)
        if inside.any() and len(np.unique(rest.gold_N)) == 2:
            mapped_N[inside] = fit_map(method, rest)(rows.score_N[inside])
    return replace(rows, score_N=mapped_N)


def fit_map(method: str, rows: Judged) -> Callable[[np.ndarray], np.ndarray]:
    """The map from scores to probabilities that fits rows with verdicts best."""
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        return fitted.fit(rows.score_N, rows.gold_N).predict
    from sklearn.linear_model import LogisticRegression

    curve = LogisticRegression(C=1e6).fit(rows.score_N[:, None], rows.gold_N)
    return lambda score_N: curve.predict_proba(score_N[:, None])[:, 1]


COLUMNS = ("score", "gold", "length", "own", "forward", "backward")


def judged(rows: Sequence[Mapping[str, float | None]], samples: Sequence[int]) -> Judged:
    """Columns from rows with the keys `COLUMNS`; what lacks or is None is NaN."""
    columns = (np.array([row.get(name) for row in rows], np.float64) for name in COLUMNS)
    return Judged(np.array(samples, np.int64), *columns)


def _given(rows: Judged) -> Judged:
    return rows.take(~np.isnan(rows.score_N) & ~np.isnan(rows.gold_N))


def _agreement(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean(one * other + (1 - one) * (1 - other))) if len(one) else math.nan


def _kappa(one: np.ndarray, other: np.ndarray) -> float:
    if not len(one):
        return math.nan
    p, q = one.mean(), other.mean()
    chance = p * q + (1 - p) * (1 - q)
    return float((_agreement(one, other) - chance) / (1 - chance)) if chance < 1 else math.nan


def _both_orders(rows: Judged, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(rows.forward_N) & ~np.isnan(rows.backward_N)
    return tuple(decisions(x[known], threshold) for x in (rows.forward_N, rows.backward_N))


def _within(x_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """x without the mean of its group."""
    out = np.array(x_N, np.float64)
    for group in np.unique(group_N):
        out[group_N == group] -= out[group_N == group].mean()
    return out


def _by_sample(rows: Judged, threshold: float) -> dict[int, float]:
    rows = rows.take(~np.isnan(rows.score_N))
    samples, group_N, count = np.unique(rows.sample_N, return_inverse=True, return_counts=True)
    yes = np.bincount(group_N, decisions(rows.score_N, threshold), minlength=len(samples))
    return dict(zip(samples.tolist(), (yes / count).tolist(), strict=True))
