"""Ratings by weighted criteria.

Read from one forward pass, a rating is the expectation over the rating tokens and not the one most
probable: a model that is unsure between 3 and 4 says 3.5 (G-Eval, arXiv 2303.16634, section 2).
Each criterion is asked by itself, so that one does not colour the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Template

from karploop.asking import Role
from karploop.chains.rendering import read_lines
from karploop.errors import UserError
from karploop.judging.opinion import TEMPLATES, Opinion, Reply, total
from karploop.judging.reading import AT_ONCE, Answer, Reading


@dataclass(frozen=True)
class Criterion:
    name: str
    question: str
    weight: float


def read_criteria(path: str) -> tuple[Criterion, ...]:
    """The criteria in a file with "weight name: question" a line; '' is the shipped one.

    Raises:
      UserError: a line of another form, a name twice, or no weight above 0.
    """
    found = []
    for line in read_lines(path or "criteria.txt", TEMPLATES):
        match = re.fullmatch(r"(\d+(?:\.\d*)?)\s+(\w[\w-]*):\s*(.+)", line)
        if not match:
            raise UserError(
                f"'{path}': a criterion is written '2 accuracy: Is everything true?', this is not: "
                f"{line!r}"
            )
        weight, name, question = match.groups()
        found.append(Criterion(name, question, float(weight)))
    names = [criterion.name for criterion in found]
    if len(set(names)) < len(names) or not sum(c.weight for c in found):
        raise UserError(f"'{path}': criteria want names of their own, and one a weight above 0")
    return tuple(found)


def rubric(
    replies: Sequence[Reply],
    role: Role,
    template: Template,
    criteria: Sequence[Criterion],
    levels: int,
    reading: Reading = AT_ONCE,
) -> list[Opinion]:
    """Scores 0 … 1: the weighted mean over criteria. One without a rating has no score at all."""
    options = [str(level) for level in range(1, levels + 1)]
    answers: list[list[Answer]] = []  # by criterion, then by reply
    for criterion in criteria:
        prompts = [
            template.render(
                question=criterion.question,
                levels=levels,
                prompt=prompt,
                completion=completion,
                rationale=reading.rationale,
            )
            for prompt, completion in replies
        ]
        answers.append(reading.answers(role, prompts, options, "Rating:"))
    return [_opinion(criteria, of_reply) for of_reply in zip(*answers, strict=True)]


def _opinion(criteria: Sequence[Criterion], answers: Sequence[Answer]) -> Opinion:
    ratings = [_expected(answer) for answer in answers]
    reason = next((answer.reason for answer in answers if answer.shares is None), "")
    score = None
    if not reason:
        score = float(np.average(ratings, weights=[criterion.weight for criterion in criteria]))
    return Opinion(
        score,
        reason,
        {criterion.name: rating for criterion, rating in zip(criteria, ratings, strict=True)},
        rationales=tuple(answer.rationale for answer in answers if answer.rationale),
        spent=total(answer.spent for answer in answers),
    )


def _expected(answer: Answer) -> float | None:
    """The expected rating, moved to 0 … 1."""
    if answer.shares is None:
        return None
    return float(np.array(answer.shares) @ np.linspace(0, 1, len(answer.shares)))
