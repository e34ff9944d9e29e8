"""Filters that ask nobody: everything, nothing, a draw, the length, the form, the likelihood."""

from __future__ import annotations

import re

import numpy as np

from karploop.config import FilterConfig
from karploop.filtering.registry import chosen_rows, decide, register, wanted
from karploop.records import Selection


@register("none", keys=())
def no_filter(samples, verdicts, config, rng) -> Selection:
    """Keeps everything that ended."""
    return decide(samples, kept="everything is kept")


@register("discard", keys=())
def discard_filter(samples, verdicts, config, rng) -> Selection:
    """Keeps nothing: with `on_empty=train`, the control of equal steps without new data."""
    nothing_S = np.zeros(len(samples), bool)
    return decide(samples, (nothing_S, "nothing is kept"), kept="")


@register("random", keys=("rate", "count"))
def random_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps a random share of what ended: the control for any filter of equal yield."""
    eligible = rng.permutation(np.flatnonzero(samples.finished_S))
    drawn_S = chosen_rows(samples, eligible[: wanted(config, samples)])
    return decide(samples, (drawn_S, "not drawn"), kept="drawn")


@register("length", keys=("slack",))
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


@register("parses", keys=("pattern",))
def parses_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps completions that match `pattern` whole, right or wrong.

    The control for gains in form: what a model learns from well-formed answers alone.
    """
    pattern = re.compile(config.pattern)
    parsed_S = np.array([pattern.fullmatch(c) is not None for c in samples.completions], bool)
    return decide(samples, (parsed_S, "does not parse"), kept="parses")


@register("perplexity", keys=("nll_low", "nll_high", "nll_by"))
def perplexity_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps what the model that wrote it finds neither too likely nor too unlikely.

    Bounds, both included, are on the log of the perplexity: the mean negative log-probability a
    token of a completion, in nats, its stop token included, at temperature 1 whatever it was
    sampled at. By quantile they are shares of the completions that ended. What another model may
    have written has no log-probabilities and is dropped.
    """
    nll_S = np.array([-np.mean(row) if len(row) else np.nan for row in samples.logprobs])
    known_S = ~np.isnan(nll_S)
    low, high = config.nll_low, config.nll_high
    among_S = nll_S[known_S & samples.finished_S]
    if config.nll_by == "quantile" and len(among_S):
        low, high = np.quantile(among_S, [low, high])
    return decide(
        samples,
        (known_S, "no log-probabilities"),
        (~(nll_S < low), "too likely"),
        (~(nll_S > high), "too unlikely"),
        kept="within the bounds of perplexity",
    )
