"""Whether a reply is right, after arguments for and against it (after arXiv 1805.00899).

Two debaters of one model, the policy where nothing else is said, argue in turn that the reply is
right and that it is wrong; each hears what was said before. The judge then says who has the better
case, in both orders of showing them, as with any other pair.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

from jinja2 import Template

from karploop.asking import How, Role, Spent
from karploop.judging.opinion import Opinion, Reply
from karploop.judging.pairwise import both_orders
from karploop.judging.reading import AT_ONCE, Reading

SIDES = ("for", "against")
Case = dict[str, list[str]]  # what each side has said so far


def debate(
    replies: Sequence[Reply],
    judge: Role,
    debater: Role,
    argument: Template,
    verdict: Template,
    turns: int,
    reading: Reading = AT_ONCE,
) -> list[Opinion]:
    """Scores 0 … 1: how probable it is that the side "for" has the better case.

    A debater that could not be heard leaves no verdict.
    """
    cases: list[Case] = [{side: [] for side in SIDES} for _ in replies]
    errors = [""] * len(replies)
    spent = [Spent()] * len(replies)
    how = How((reading.seed,), reading.max_new_tokens, temperature=0.0)
    for _ in range(turns):
        for side in SIDES:
            going = [i for i, error in enumerate(errors) if not error]
            prompts = [
                argument.render(
                    prompt=replies[i][0], completion=replies[i][1], side=side, case=cases[i]
                )
                for i in going
            ]
            ids = [zlib.crc32(prompt.encode()) for prompt in prompts]
            for i, said in zip(going, debater.complete(prompts, ids, how), strict=True):
                spent[i] += said.spent
                if said.text is None:
                    errors[i] = f"the side {side}: {said.error}"
                else:
                    cases[i][side].append(said.text.strip())
    heard = [i for i, error in enumerate(errors) if not error]
    orders = [
        verdict.render(
            prompt=replies[i][0],
            completion=replies[i][1],
            order=order,
            case=cases[i],
            rationale=reading.rationale,
        )
        for i in heard
        for order in (SIDES, SIDES[::-1])
    ]
    found = reading.answers(judge, orders, ["A", "B"], "Better:")
    opinions = [Opinion(None, error, spent=own) for error, own in zip(errors, spent, strict=True)]
    for i, two in zip(heard, zip(found[::2], found[1::2], strict=True), strict=True):
        opinion = both_orders(*two)
        texts = tuple(f"{side}: {text}" for side in SIDES for text in cases[i][side])
        opinions[i] = replace(
            opinion, rationales=texts + opinion.rationales, spent=spent[i] + opinion.spent
        )
    return opinions
