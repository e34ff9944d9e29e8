"""The filters of arXiv 2502.01612 and their controls, as pure functions.

A filter sees samples and the verdicts of the one judge it declares. It never sees a gold answer;
the filter that keeps what is right by gold is called `verifier`, after the judge it reads.

To add one, write a function with the signature of `Function` and decorate it with `register`, or
name it in a config as "package.module:ATTRIBUTE".
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from karploop.config import FilterConfig
from karploop.errors import UserError
from karploop.records import Samples, Selection, Verdicts, Votes
from karploop.schema import nearest

SCORES = "scores"
NO_VERDICT = "no verdict"  # the reason for which every filter drops what has none

Function = Callable[[Samples, Verdicts | None, FilterConfig, np.random.Generator], Selection]


@dataclass(frozen=True)
class Filter:
    """A filter and the judge whose verdicts it reads.

    Attributes:
      judge: None: it reads none; SCORES: those of whichever `config.judge.name` says.
    """

    name: str
    function: Function
    judge: str | None


_FILTERS: dict[str, Filter] = {}


def register(name: str, judge: str | None = None) -> Callable[[Function], Filter]:
    """Decorator that makes a function a filter known by `name`."""

    def wrap(function: Function) -> Filter:
        _FILTERS[name] = Filter(name, function, judge)
        return _FILTERS[name]

    return wrap


def get_filter(name: str) -> Filter:
    """The filter called `name`, or the one that "package.module:ATTRIBUTE" names.

    Raises:
      UserError: there is none; the message has the nearest name.
    """
    if name in _FILTERS:
        return _FILTERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"'config.filter.name' is '{name}': {nearest(name, _FILTERS)}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"'config.filter.name' is '{name}', which cannot be imported ({error}): check that "
            "the module is on PYTHONPATH and has that attribute"
        ) from error
    if not isinstance(found, Filter):
        raise UserError(f"'{name}' is not a filter: decorate its function with filters.register")
    return found


def decide(samples: Samples, *tests: tuple[np.ndarray, str], kept: str) -> Selection:
    """Drops each row for the first test that it fails; the rest are kept for the reason `kept`.

    Completions that did not reach the stop token are dropped by every filter: a row that never
    ends is not a text to train on.

    Args:
      tests: (passed_S, reason for dropping where false).
    """
    reasons = np.full(len(samples), kept, dtype=object)
    for passed_S, reason in reversed([(samples.finished_S, "did not end"), *tests]):
        reasons = np.where(passed_S, reasons, reason)
    kept_S = np.logical_and.reduce([samples.finished_S, *(passed for passed, _ in tests)])
    return Selection(kept_S=kept_S, reasons=reasons.tolist())


@register("none")
def no_filter(samples, verdicts, config, rng) -> Selection:
    """Keeps everything that ended."""
    return decide(samples, kept="everything is kept")


@register("discard")
def discard_filter(samples, verdicts, config, rng) -> Selection:
    """Keeps nothing: with `on_empty=train`, the control of equal steps without new data."""
    nothing_S = np.zeros(len(samples), bool)
    return decide(samples, (nothing_S, "nothing is kept"), kept="")


@register("random")
def random_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps a random share `rate` of what ended: the control for any filter of equal yield."""
    eligible = np.flatnonzero(samples.finished_S)
    count = min(round(config.rate * len(samples)), len(eligible))
    drawn_S = np.zeros(len(samples), bool)
    drawn_S[rng.permutation(eligible)[:count]] = True
    return decide(samples, (drawn_S, "not drawn"), kept="drawn")


@register("length")
def length_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Drops completions more than `slack` characters shorter than the longest of their difficulty.

    Models that fail on longer problems tend to drop digits (arXiv 2502.01612, §5: short outputs
    are wrong outputs); this needs no labels.
    """
    lengths_S = np.array([len(c) for c in samples.completions])
    longest_S = np.zeros_like(lengths_S)
    for difficulty in np.unique(samples.difficulty_S):
        group_S = (samples.difficulty_S == difficulty) & samples.finished_S
        if group_S.any():
            longest_S[samples.difficulty_S == difficulty] = lengths_S[group_S].max()
    return decide(samples, (lengths_S >= longest_S - config.slack, "too short"), kept="long enough")


@register("parses")
def parses_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps completions that match `pattern` whole, right or wrong.

    The control for gains in form: what a model learns from well-formed answers alone.
    """
    pattern = re.compile(config.pattern)
    parsed_S = np.array([pattern.fullmatch(c) is not None for c in samples.completions], bool)
    return decide(samples, (parsed_S, "does not parse"), kept="parses")


@register("vote", judge="vote")
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


@register("verifier", judge="verifier")
def verifier_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps what the gold verifier calls right."""
    score_S = verdicts.score_S
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S == 1.0, "wrong by the verifier"),
        kept="right by the verifier",
    )


@register("threshold", judge=SCORES)
def threshold_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps what scores `threshold` or more."""
    score_S = verdicts.score_S
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S >= config.threshold, "below the threshold"),
        kept="at or above the threshold",
    )


@register("quantile", judge=SCORES)
def quantile_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the share `rate` of all samples that scores highest; who of equals, is drawn."""
    score_S = verdicts.score_S
    eligible = rng.permutation(np.flatnonzero(samples.finished_S & ~np.isnan(score_S)))
    best_first = eligible[np.argsort(-score_S[eligible], kind="stable")]
    chosen_S = np.zeros(len(samples), bool)
    chosen_S[best_first[: round(config.rate * len(samples))]] = True
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (chosen_S, "not among the best"),
        kept="among the best",
    )


@register("best", judge=SCORES)
def best_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the completion of each prompt that scores highest (best-of-n); of equals, one is drawn.

    A prompt all of whose different completions score the same has no best one and is dropped.
    """
    score_S = verdicts.score_S
    eligible = rng.permutation(np.flatnonzero(samples.finished_S & ~np.isnan(score_S))).tolist()
    rows_of: dict[int, list[int]] = {}
    for row in eligible:
        rows_of.setdefault(int(samples.prompt_id_S[row]), []).append(row)
    chosen_S, tied_S = np.zeros(len(samples), bool), np.zeros(len(samples), bool)
    for rows in rows_of.values():
        texts = {samples.completions[row] for row in rows}
        if len(texts) > 1 and len({score_S[row] for row in rows}) == 1:
            tied_S[rows] = True
        else:
            chosen_S[max(rows, key=lambda row: score_S[row])] = True
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (~tied_S, "no better than the others"),
        (chosen_S, "not the best of its prompt"),
        kept="the best of its prompt",
    )
