"""Which of two replies is better, always asked in both orders.

A model prefers what it is shown first, or last (arXiv 2306.05685, section 3.3). The mean over both
orders has no such bias; where the orders disagree the pair is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jinja2 import Template

from karploop.asking import Role, Scored
from karploop.judging.opinion import Opinion

Pair = tuple[str, str, str]  # a prompt and its two completions


def pairwise(pairs: Sequence[Pair], role: Role, template: Template) -> list[Opinion]:
    """How probable it is that the first is better, by the shares of A and B as the next token."""
    return compare(pairs, role, template, [{} for _ in pairs])


def compare(
    pairs: Sequence[Pair], role: Role, template: Template, more: Sequence[Mapping[str, str]]
) -> list[Opinion]:
    """`pairwise` with more variables of the template, for each pair its own."""
    orders = [
        template.render(prompt=prompt, first=a, second=b, **given)
        for (prompt, one, two), given in zip(pairs, more, strict=True)
        for a, b in ((one, two), (two, one))
    ]
    found = role.score(orders, ["A", "B"])
    return [
        _opinion(forward, backward)
        for forward, backward in zip(found[::2], found[1::2], strict=True)
    ]


def _opinion(forward: Scored, backward: Scored) -> Opinion:
    first, second = (_share_of_a(scored) for scored in (forward, backward))
    if first is None or second is None:
        return Opinion(None, forward.error or backward.error, {}, first, second and 1 - second)
    return Opinion((first + 1 - second) / 2, "", {}, first, 1 - second)


def _share_of_a(scored: Scored) -> float | None:
    if scored.logprobs is None:
        return None
    a, b = scored.logprobs
    return float(1 / (1 + np.exp(b - a)))
