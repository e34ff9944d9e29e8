"""Ratings by weighted criteria, each from one forward pass.

A rating is the expectation over the rating tokens and not the one most probable: a model that is
unsure between 3 and 4 says 3.5 (G-Eval, arXiv 2303.16634, section 2). Each criterion is asked by
itself, so that one does not colour the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Template

from karploop.asking import Role, Scored
from karploop.chains.rendering import read_lines
from karploop.errors import UserError
from karploop.judging.opinion import TEMPLATES, Opinion

Reply = tuple[str, str]  # a prompt and its completion


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
) -> list[Opinion]:
    """Scores 0 … 1: the weighted mean over criteria. One without a rating has no score at all."""
    options = [str(level) for level in range(1, levels + 1)]
    ratings: dict[str, list[float | None]] = {}
    reasons = [""] * len(replies)
    for criterion in criteria:
        prompts = [
            template.render(
                question=criterion.question, levels=levels, prompt=prompt, completion=completion
            )
            for prompt, completion in replies
        ]
        found = role.score(prompts, options)
        ratings[criterion.name] = [_expected(scored) for scored in found]
        reasons = [reason or scored.error for reason, scored in zip(reasons, found, strict=True)]
    weights = np.array([criterion.weight for criterion in criteria])
    opinions = []
    for i, reason in enumerate(reasons):
        by_criterion = {name: values[i] for name, values in ratings.items()}
        if reason:
            opinions.append(Opinion(None, reason, by_criterion))
        else:
            values = np.array(list(by_criterion.values()))
            opinions.append(Opinion(float(np.average(values, weights=weights)), "", by_criterion))
    return opinions


def _expected(scored: Scored) -> float | None:
    """The expected rating, moved to 0 … 1."""
    if scored.logprobs is None:
        return None
    logprobs = np.array(scored.logprobs, np.float64)
    share = np.exp(logprobs - logprobs.max())
    return float(share @ np.linspace(0, 1, len(share)) / share.sum())
