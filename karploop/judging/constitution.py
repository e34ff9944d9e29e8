"""Which of two replies agrees more with a principle (arXiv 2212.08073, section 4.1).

The preference is the normalised probability of the two letters, in both orders. Several principles
are drawn for every pair and averaged, which the paper found more robust than one. A judge that
reasons first is nearly always sure; its preferences are clamped, as the paper's are to 40 … 60 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jinja2 import Template

from karploop.asking import Role
from karploop.judging.opinion import Opinion, Pair, Place, total
from karploop.judging.pairwise import compare
from karploop.judging.reading import AT_ONCE, Reading


def constitution(
    pairs: Sequence[Pair],
    role: Role,
    template: Template,
    principles: Sequence[str],
    count: int,
    places: Sequence[Place],
    seed: int,
    reading: Reading = AT_ONCE,
    clamp: float = 0.0,
) -> list[Opinion]:
    """The mean over `count` principles; a pair without a verdict by one of them has none.

    Args:
      places: of the pairs; which principles a pair is judged by depends on its place and the seed.
      clamp: preferences closer than this to 0 or 1 are moved so far away.
    """
    drawn = [
        np.random.default_rng([seed, *at]).permutation(len(principles))[:count].tolist()
        for at in places
    ]
    asked = [(pair, principles[k]) for pair, own in zip(pairs, drawn, strict=True) for k in own]
    found = compare(
        [pair for pair, _ in asked], role, template, [{"principle": p} for _, p in asked], reading
    )
    found = [_clamped(opinion, clamp) for opinion in found]
    each = len(drawn[0]) if drawn else 0
    return [
        _mean(found[i : i + each], [principles[k] for k in own])
        for i, own in zip(range(0, len(found), each or 1), drawn, strict=True)
    ]


def _clamped(opinion: Opinion, clamp: float) -> Opinion:
    if not clamp or opinion.score is None:
        return opinion
    forward, backward = np.clip([opinion.forward, opinion.backward], clamp, 1 - clamp).tolist()
    return replace(opinion, score=(forward + backward) / 2, forward=forward, backward=backward)


def _mean(opinions: Sequence[Opinion], principles: Sequence[str]) -> Opinion:
    reason = next((opinion.reason for opinion in opinions if opinion.score is None), "")
    means = [
        None if reason else float(np.mean([getattr(opinion, name) for opinion in opinions]))
        for name in ("score", "forward", "backward")
    ]
    return Opinion(
        means[0],
        reason,
        {p: opinion.score for p, opinion in zip(principles, opinions, strict=True)},
        *means[1:],
        tuple(text for opinion in opinions for text in opinion.rationales),
        total(opinion.spent for opinion in opinions),
    )
