"""Filters that look at each verdict by itself, or at all of them together."""

from __future__ import annotations

import numpy as np

from karploop.config import FilterConfig
from karploop.filtering.registry import (
    NO_VERDICT,
    SCORES,
    best_first,
    chosen_rows,
    decide,
    register,
    wanted,
)
from karploop.records import Selection, Verdicts, Votes


@register("threshold", judge=SCORES, keys=("threshold",))
def threshold_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps what scores `threshold` or more; over rounds it may rise (ReST, arXiv 2308.08998)."""
    score_S = verdicts.score_S
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S >= config.threshold, "below the threshold"),
        kept="at or above the threshold",
    )


@register("quantile", judge=SCORES, keys=("rate", "count"))
def quantile_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the share of all samples that scores highest; who of equals, is drawn."""
    score_S = verdicts.score_S
    best = best_first(samples, score_S, rng)[: wanted(config, samples)]
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (chosen_rows(samples, best), "not among the best"),
        kept="among the best",
    )


@register("verifier", judge="verifier", keys=())
def verifier_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps what the gold verifier calls right."""
    score_S = verdicts.score_S
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S == 1.0, "wrong by the verifier"),
        kept="right by the verifier",
    )


@register("vote", judge="vote", keys=("agreement",))
def vote_filter(samples, verdicts: Votes, config: FilterConfig, rng) -> Selection:
    """Keeps one row a prompt: the majority's answer, where at least `agreement` of voters gave it.

    Equal shares make no majority: a prompt with a tie for first place is dropped.
    """
    score_S = verdicts.score_S
    chosen_S = np.zeros(len(samples), bool)
    tied_S = np.zeros(len(samples), bool)
    best: dict[int, list[int]] = {}  # prompt → rows with the highest score so far
    for row, prompt in enumerate(samples.prompt_id_S.tolist()):
        rows = best.setdefault(prompt, [])
        if np.isnan(score_S[row]) or (rows and score_S[row] < score_S[rows[0]]):
            continue
        best[prompt] = [row] if not rows or score_S[row] > score_S[rows[0]] else [*rows, row]
    for rows in best.values():
        if not rows:
            continue
        if len({verdicts.answers[row] for row in rows}) == 1:
            chosen_S[rows[0]] = True
        else:
            tied_S[rows] = True
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S >= config.agreement, "too few agree"),
        (~tied_S, "tie"),
        (chosen_S, "same answer kept once, or not the majority's"),
        kept="the majority agrees",
    )
