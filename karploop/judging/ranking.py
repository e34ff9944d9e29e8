"""From comparisons of two to scores of n.

One number a completion, 0 … 1, from the probabilities that it is better than others. Nothing is
called best and worst at once: equal texts are one entry with one score.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from karploop.judging.opinion import Opinion, Pair, Place, total

Compare = Callable[[Sequence[Pair], Sequence[Place]], list[Opinion]]

_PRIOR = 0.01  # comparisons with an average opponent, half of them won: keeps strengths finite


@dataclass
class Group:
    """Completions of one prompt.

    Attributes:
      number: of the group; with the places of two completions in it, the place of their pair.
      members: which of several models wrote each completion; empty: there is only one.
      cut: of further completions, which did not end and are not judged, the models that wrote them.
      met: opinions so far, by (i, j) with i < j: how probable it is that i is better.
    """

    number: int
    prompt: str
    completions: tuple[str, ...]
    members: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    met: dict[tuple[int, int], Opinion] = field(default_factory=dict)

    @property
    def entries(self) -> list[int]:
        """The first place of every text."""
        return sorted({text: i for i, text in reversed(list(enumerate(self.completions)))}.values())


def rank(
    groups: Sequence[Group], compare: Compare, method: str = "round_robin", seed: int = 0
) -> list[list[Opinion]]:
    """An opinion on every completion of every group; all groups are compared together.

    round_robin: every two meet; the score is the mean probability to be the better.
    bradley_terry: every two meet; strengths by maximum likelihood (Bradley and Terry 1952) of the
      probabilities; the score is the mean probability to win by them, which for comparisons that
      are missing is what those that are there suggest.
    tournament: losers drop out, the order is drawn (n − 1 comparisons instead of n (n − 1) / 2);
      the score is the share of rounds that were won, and tells little but who is first.

    A completion none of whose comparisons has a verdict has no score.
    """
    if method == "tournament":
        return _tournament(groups, compare, seed)
    _meet(
        compare,
        [(g, i, j) for g in groups for i, j in itertools.combinations(g.entries, 2)],
    )
    score = _mean_wins if method == "round_robin" else bradley_terry
    return [_opinions(group, score(_wins(group))) for group in groups]


def _meet(compare: Compare, matches: Sequence[tuple[Group, int, int]]) -> None:
    pairs = [(g.prompt, g.completions[i], g.completions[j]) for g, i, j in matches]
    found = compare(pairs, [(g.number, i, j) for g, i, j in matches]) if pairs else []
    for (group, i, j), opinion in zip(matches, found, strict=True):
        group.met[i, j] = opinion


def _wins(group: Group) -> np.ndarray:
    """wins_NxN: how probable it is that the row's entry beats the column's; NaN: not known."""
    entries = group.entries
    wins_NxN = np.full((len(entries), len(entries)), np.nan)
    for (i, j), opinion in group.met.items():
        if opinion.score is not None:
            a, b = entries.index(i), entries.index(j)
            wins_NxN[a, b], wins_NxN[b, a] = opinion.score, 1 - opinion.score
    return wins_NxN


def _mean_wins(wins_NxN: np.ndarray) -> np.ndarray:
    known_N = (~np.isnan(wins_NxN)).sum(1)
    return np.where(known_N > 0, np.nansum(wins_NxN, 1) / np.maximum(known_N, 1), np.nan)


def bradley_terry(wins_NxN: np.ndarray) -> np.ndarray:
    """Mean probability of each entry to beat another, scores_N, by fitted strengths.

    P(i beats j) = s_i / (s_i + s_j), fitted by the iteration of Zermelo (1929); an entry that met
    nobody has NaN.

    Args:
      wins_NxN: shares of wins of the row's entry over the column's; NaN where they did not meet.
    """
    met_NxN = ~np.isnan(wins_NxN)
    won_N = np.nansum(wins_NxN, 1) + _PRIOR / 2
    strength_N = np.ones(len(wins_NxN))
    for _ in range(10_000):
        pairs_NxN = met_NxN / (strength_N[:, None] + strength_N[None])
        new_N = won_N / (pairs_NxN.sum(1) + _PRIOR / (strength_N + 1))
        if np.allclose(new_N, strength_N, rtol=1e-10, atol=0):
            break
        strength_N = new_N
    beats_NxN = strength_N[:, None] / (strength_N[:, None] + strength_N[None])
    others = max(len(wins_NxN) - 1, 1)
    scores_N = (beats_NxN.sum(1) - 0.5) / others
    return np.where(met_NxN.any(1), scores_N, np.nan)


def _tournament(groups: Sequence[Group], compare: Compare, seed: int) -> list[list[Opinion]]:
    standing, won, rounds = [], [], []
    for group in groups:
        order = np.random.default_rng([seed, group.number]).permutation(group.entries)
        standing.append(order.tolist())
        won.append(dict.fromkeys(group.entries, 0))
        rounds.append(0)
    while any(len(left) > 1 for left in standing):
        drawn = [
            [tuple(sorted(left[i : i + 2])) for i in range(0, len(left) - 1, 2)]
            for left in standing
        ]
        _meet(compare, [(g, i, j) for g, ms in zip(groups, drawn, strict=True) for i, j in ms])
        for k, (group, matches) in enumerate(zip(groups, drawn, strict=True)):
            if not matches:
                continue
            through = standing[k][2 * len(matches) :]  # who has no opponent this time
            rounds[k] += 1
            for i, j in matches:
                score = group.met[i, j].score
                if score is None:
                    continue  # nobody is known to have won
                winner = i if score > 0.5 or (score == 0.5 and standing[k].index(i) % 2) else j
                won[k][winner] += 1
                through = [*through, winner]
            standing[k] = through
    found = []
    for group, wins, played in zip(groups, won, rounds, strict=True):
        known = {i for match, o in group.met.items() if o.score is not None for i in match}
        scores = [wins[i] / played if i in known else np.nan for i in group.entries]
        found.append(_opinions(group, np.array(scores)))
    return found


def _opinions(group: Group, scores_N: np.ndarray) -> list[Opinion]:
    by_text: dict[str, Opinion] = {}
    for i, score in zip(group.entries, scores_N.tolist(), strict=True):
        met = [(match, opinion) for match, opinion in group.met.items() if i in match]
        own = [opinion for _, opinion in met]
        shown_first = [o.forward if match[0] == i else _other(o.backward) for match, o in met]
        shown_second = [o.backward if match[0] == i else _other(o.forward) for match, o in met]
        missing = bool(np.isnan(score))
        reasons = [opinion.reason for opinion in own if opinion.reason]
        reason = (reasons or ["nothing to compare it with"])[0] if missing else ""
        # A comparison is paid for once, by the first of the two.
        by_text[group.completions[i]] = Opinion(
            None if missing else score,
            reason,
            {},
            _mean(shown_first),
            _mean(shown_second),
            tuple(text for opinion in own for text in opinion.rationales),
            total(opinion.spent for match, opinion in met if match[0] == i),
        )
    return [by_text[text] for text in group.completions]


def _other(score: float | None) -> float | None:
    """A comparison's score, for the other of the two."""
    return None if score is None else 1 - score


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if known else None
