"""Copy and reverse a string of digits (Self-improving transformers, arXiv 2502.01612)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from karploop.data.tasks.base import Task
from karploop.data.tasks.digits import DIGITS, all_strings, count_strings, random_strings
from karploop.errors import UserError


@dataclass(frozen=True)
class Copy(Task):
    """Repeat a string of digits: "3141=" → "3141". The difficulty is the string's length."""

    name: str = "copy"

    alphabet = DIGITS + "="

    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        return self.sample_many(rng, difficulty, 1)[0]

    def sample_many(self, rng: np.random.Generator, difficulty: int, count: int) -> list[str]:
        return [f"{text}=" for text in random_strings(rng, difficulty, count)]

    def prompts(self, difficulty: int) -> Iterator[str]:
        return (f"{text}=" for text in all_strings(difficulty))

    def space(self, difficulty: int) -> int:
        return count_strings(difficulty)

    def difficulty(self, prompt: str) -> int:
        return len(self.source(prompt))

    def answer(self, prompt: str) -> str:
        return self.source(prompt)

    def max_prompt_length(self, difficulty: int) -> int:
        return difficulty + 1

    def max_completion_length(self, difficulty: int) -> int:
        return difficulty

    def source(self, prompt: str) -> str:
        """The digits of `prompt`. Raises UserError if it is not digits and an "="."""
        digits = prompt.removesuffix("=")
        if digits == prompt or not (digits.isascii() and digits.isdigit()):
            raise UserError(
                f"{prompt!r} is no problem of task {self.name}: write digits and then '=', "
                "such as '3141='."
            )
        return digits


@dataclass(frozen=True)
class Reverse(Copy):
    """Write a string of digits backwards: "3141=" → "1413". The difficulty is its length."""

    name: str = "reverse"

    def answer(self, prompt: str) -> str:
        return self.source(prompt)[::-1]
