"""Filters that compare the completions of one prompt with each other."""

from __future__ import annotations

import numpy as np

from karploop.config import FilterConfig
from karploop.filtering.registry import (
    GOLD,
    NO_VERDICT,
    SCORES,
    best_first,
    chosen_rows,
    decide,
    register,
    rows_by_prompt,
)
from karploop.records import Selection, Verdicts

_ROUNDING = 1e-9  # 0.9 − 0.8 is a margin of 0.1, and 0.1 + 0.2 ties with 0.3


@register("best", judge=SCORES, keys=())
def best_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the completion of each prompt that scores highest (best-of-n); of equals, one is drawn.

    A prompt all of whose different completions score the same has no best one and is dropped.
    """
    score_S = verdicts.score_S
    eligible = rng.permutation(np.flatnonzero(samples.finished_S & ~np.isnan(score_S)))
    chosen_S, tied_S = np.zeros(len(samples), bool), np.zeros(len(samples), bool)
    for rows in rows_by_prompt(samples, eligible).values():
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


@register("top_k", judge=SCORES, keys=("cap",))
def top_k_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the `cap` completions of each prompt that score highest; who of equals, is drawn.

    Unlike `best`, it keeps some where all score the same: behind `verifier` that is what is left.
    """
    score_S = verdicts.score_S
    groups = rows_by_prompt(samples, best_first(samples, score_S, rng)).values()
    chosen_S = chosen_rows(samples, [row for rows in groups for row in rows[: config.cap]])
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (chosen_S, "not among the best of its prompt"),
        kept="among the best of its prompt",
    )


@register("margin", judge=SCORES, keys=("margin",))
def margin_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps the best completion of a prompt where the judge is sure of it.

    It has to score above the best other text of the prompt, and by `margin` at least. A prompt
    with one text alone has no runner-up and is dropped.
    """
    score_S = verdicts.score_S
    least = max(_ROUNDING, config.margin - _ROUNDING)
    alone_S, close_S = np.zeros(len(samples), bool), np.zeros(len(samples), bool)
    chosen_S = np.zeros(len(samples), bool)
    for rows in rows_by_prompt(samples, best_first(samples, score_S, rng)).values():
        others = (r for r in rows if samples.completions[r] != samples.completions[rows[0]])
        runner_up = next(others, None)
        if runner_up is None:
            alone_S[rows] = True
            continue
        if score_S[rows[0]] - score_S[runner_up] > least:
            chosen_S[rows[0]] = True
        else:
            close_S[rows] = True
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (~alone_S, "no other text to compare it with"),
        (~close_S, "the best is too close to the next"),
        (chosen_S, "not the best of its prompt"),
        kept="the best of its prompt, by a margin",
    )


@register("cap", keys=("cap",))
def cap_filter(samples, verdicts, config: FilterConfig, rng) -> Selection:
    """Keeps at most `cap` completions of each prompt, drawn; `top_k` takes the best-scored ones."""
    drawn = rng.permutation(np.flatnonzero(samples.finished_S))
    groups = rows_by_prompt(samples, drawn).values()
    chosen_S = chosen_rows(samples, [row for rows in groups for row in rows[: config.cap]])
    return decide(samples, (chosen_S, "its prompt has enough rows"), kept="within the cap")


@register("oracle", judge=GOLD, keys=("count",))
def oracle_filter(samples, verdicts: Verdicts, config: FilterConfig, rng) -> Selection:
    """The perfect selector: one completion of each prompt that is right by gold, drawn.

    A diagnostic, and no filter for a result: what a loop would gain if nothing but the selection
    were perfect. With `match` it keeps as many rows as another filter, so far as there are right
    ones, and goes through the prompts in turns to reach them; so the difference between the two
    is what the other one's mistakes cost. Its verdicts come beside those of the judge that the
    other filters of a run read.
    """
    score_S = verdicts.score_S
    right = rng.permutation(np.flatnonzero(samples.finished_S & (score_S == 1.0)))
    groups = rows_by_prompt(samples, right).values()
    turns = sorted(
        ((turn, row) for rows in groups for turn, row in enumerate(rows)), key=lambda pair: pair[0]
    )
    count = config.count if config.count >= 0 else len(groups)
    chosen_S = chosen_rows(samples, [row for _, row in turns[:count]])
    return decide(
        samples,
        (~np.isnan(score_S), NO_VERDICT),
        (score_S == 1.0, "wrong by gold"),
        (chosen_S, "right by gold, and not drawn"),
        kept="right by gold",
    )
