"""Which of two replies agrees more with a principle (arXiv 2212.08073, section 4.1).

The preference is the normalised probability of the two letters, in both orders. Several principles
are drawn for every pair and averaged, which the paper found more robust than one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jinja2 import Template

from karploop.asking import Role
from karploop.judging.opinion import Opinion
from karploop.judging.pairwise import Pair, compare


def constitution(
    pairs: Sequence[Pair],
    role: Role,
    template: Template,
    principles: Sequence[str],
    count: int,
    ids: Sequence[int],
    seed: int,
) -> list[Opinion]:
    """The mean over `count` principles; a pair without a verdict by one of them has none.

    Args:
      ids: of the pairs; which principles a pair is judged by depends on its id and the seed.
    """
    drawn = [
        np.random.default_rng([seed, i]).permutation(len(principles))[:count].tolist() for i in ids
    ]
    asked = [(pair, principles[k]) for pair, own in zip(pairs, drawn, strict=True) for k in own]
    found = compare(
        [pair for pair, _ in asked], role, template, [{"principle": p} for _, p in asked]
    )
    each = len(drawn[0]) if drawn else 0
    return [
        _mean(found[i : i + each], [principles[k] for k in own])
        for i, own in zip(range(0, len(found), each or 1), drawn, strict=True)
    ]


def _mean(opinions: Sequence[Opinion], principles: Sequence[str]) -> Opinion:
    scores = {p: opinion.score for p, opinion in zip(principles, opinions, strict=True)}
    reason = next((opinion.reason for opinion in opinions if opinion.score is None), "")
    if reason:
        return Opinion(None, reason, scores)
    score, forward, backward = (
        float(np.mean([getattr(opinion, name) for opinion in opinions]))
        for name in ("score", "forward", "backward")
    )
    return Opinion(score, "", scores, forward, backward)
