"""Which of two replies is better, always asked in both orders.

A model prefers what it is shown first, or last (arXiv 2306.05685, section 3.3). The mean over both
orders has no such bias; where the orders disagree the pair is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Template

from karploop.asking import Role
from karploop.judging.opinion import Opinion, Pair
from karploop.judging.reading import AT_ONCE, Answer, Reading


def pairwise(
    pairs: Sequence[Pair], role: Role, template: Template, reading: Reading = AT_ONCE
) -> list[Opinion]:
    """How probable it is that the first is better, by the shares of A and B."""
    return compare(pairs, role, template, [{} for _ in pairs], reading)


def compare(
    pairs: Sequence[Pair],
    role: Role,
    template: Template,
    more: Sequence[Mapping[str, str]],
    reading: Reading = AT_ONCE,
) -> list[Opinion]:
    """`pairwise` with more variables of the template, for each pair its own."""
    orders = [
        template.render(prompt=prompt, first=a, second=b, rationale=reading.rationale, **given)
        for (prompt, one, two), given in zip(pairs, more, strict=True)
        for a, b in ((one, two), (two, one))
    ]
    found = reading.answers(role, orders, ["A", "B"], "Better:")
    return [both_orders(*two) for two in zip(found[::2], found[1::2], strict=True)]


def both_orders(forward: Answer, backward: Answer) -> Opinion:
    """The mean of two answers, in the second of which what is A in the first is B."""
    first = forward.shares and forward.shares[0]
    second = backward.shares and backward.shares[1]
    missing = first is None or second is None
    return Opinion(
        None if missing else (first + second) / 2,
        forward.reason or backward.reason,
        {},
        first,
        second,
        tuple(answer.rationale for answer in (forward, backward) if answer.rationale),
        forward.spent + backward.spent,
    )
