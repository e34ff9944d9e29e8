"""From verdicts to pairs of a better and a worse completion of one prompt.

Pure functions from samples and verdicts to `Pairs`, for objectives that learn from comparisons.
What holds of all of them:

- A tie or a missing verdict makes no pair, and neither do equal texts. A text that a prompt has
  several times stands once, as the first of its rows with a verdict (of those that may be chosen,
  if there are any).
- Completions that did not end are in no pair. They are never chosen, because a text that never ends
  is nothing to learn; and they are never rejected, because a judge that rates whole answers says
  nothing of a part of one, and its length would decide what is learnt from it.
- With a selection, only rows that the filter kept are chosen; any row may be rejected.
- Pairs are in the order of the prompts among the samples, of a prompt by falling margin. Where
  their number is limited, the first ones stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from karploop.config import PreferenceConfig
from karploop.errors import UserError
from karploop.filtering.registry import rows_by_prompt
from karploop.records import Opinions, Pairs, Samples, Selection, Verdicts

_ROUNDING = 1e-9  # 0.9 − 0.8 is a margin of 0.1, and 0.1 + 0.2 ties with 0.3


Pair = tuple[int, int]  # the rows of the better and of the worse one
# From rows of a prompt that may be chosen, all its rows, score_S, and shown_SxO: of each row, the
# mean score when it was shown first and when second, NaN where nobody asked.
Pairing = Callable[[Sequence[int], Sequence[int], np.ndarray, np.ndarray], list[Pair]]


def best_worst(winners, rows, score_S, shown_SxO) -> list[Pair]:
    """The highest-scored of the winners and the lowest-scored row; of equals, the first."""
    worst = min(rows, key=lambda row: score_S[row])
    return [(max(winners, key=lambda row: score_S[row]), worst)]


def all_pairs(winners, rows, score_S, shown_SxO) -> list[Pair]:
    """Every winner with every row."""
    return list(itertools.product(winners, rows))


def consistent(winners, rows, score_S, shown_SxO) -> list[Pair]:
    """Pairs that do not depend on the order in which a judge was shown its comparisons.

    The better one wins on average both when it is shown first and when it is shown second, and the
    worse one loses in both. Of two completions these say the same: that both orders agree.
    """
    better = [row for row in winners if (shown_SxO[row] > 0.5).all()]
    worse = [row for row in rows if (shown_SxO[row] < 0.5).all()]
    return list(itertools.product(better, worse))


PAIRINGS: dict[str, Pairing] = {
    "best_worst": best_worst,
    "all_pairs": all_pairs,
    "consistent": consistent,
}


def preferences(
    samples: Samples,
    verdicts: Verdicts,
    config: PreferenceConfig,
    selection: Selection | None = None,
) -> Pairs:
    """The pairs that `config.pairing` makes of every prompt's completions, whoever wrote them.

    Raises:
      UserError: both orders are needed of verdicts that have none.
    """
    score_S, shown_SxO = verdicts.score_S, _shown(verdicts)
    if config.pairing == "consistent" and len(verdicts) and np.isnan(shown_SxO).all():
        raise UserError(
            "'config.preference.pairing=consistent' wants verdicts that were asked for in both "
            "orders, and these have none: let a judge that compares ('pairwise', 'constitution') "
            "give them, or set it to best_worst or all_pairs"
        )
    eligible_S = samples.finished_S & ~np.isnan(score_S)
    may_win_S = selection.kept_S if selection is not None else np.ones(len(samples), bool)
    found: list[Pair] = []
    for rows in rows_by_prompt(samples, np.flatnonzero(eligible_S)).values():
        preferred = sorted(rows, key=lambda row: not may_win_S[row])
        first = {samples.completions[row]: row for row in reversed(preferred)}
        distinct = sorted(first.values())
        winners = [row for row in distinct if may_win_S[row]]
        pairs = PAIRINGS[config.pairing](winners, distinct, score_S, shown_SxO) if winners else []
        leads = {pair: score_S[pair[0]] - score_S[pair[1]] for pair in pairs}
        least = max(_ROUNDING, config.margin - _ROUNDING)
        apart = sorted((p for p in pairs if leads[p] > least), key=lambda pair: -leads[pair])
        found += apart[: config.per_prompt or None]
    return _record(samples, score_S, found[: config.count or None])


def _record(samples: Samples, score_S: np.ndarray, pairs: Sequence[Pair]) -> Pairs:
    chosen_P = np.array([i for i, _ in pairs], np.int64)
    rejected_P = np.array([j for _, j in pairs], np.int64)
    return Pairs(
        prompt_id_P=samples.prompt_id_S[chosen_P],
        prompts=[samples.prompts[row] for row in chosen_P],
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        difficulty_P=samples.difficulty_S[chosen_P],
        margin_P=score_S[chosen_P] - score_S[rejected_P],
        member_P=samples.member_S[chosen_P],
    )


def _shown(verdicts: Verdicts) -> np.ndarray:
    """shown_SxO, as of `Pairing`."""
    if not isinstance(verdicts, Opinions):
        return np.full((len(verdicts), 2), np.nan)
    return np.array([verdicts.forward, verdicts.backward], float).T  # None becomes NaN
