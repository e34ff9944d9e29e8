"""What tasks on two numbers share: drawing and checking operands, the commutative split key."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from karploop.data.tasks.base import Task
from karploop.data.tasks.digits import all_numbers, count_numbers, is_number, random_numbers
from karploop.errors import UserError


@dataclass(frozen=True)
class TwoOperandTask(Task):
    """A commutative operation on two decimal numbers.

    An encoding is a pair of inverse methods, `write` and `read`; a variant overrides these two. In
    all methods operands are decimal strings in the usual order, most significant digit first.
    """

    @abstractmethod
    def shapes(self, difficulty: int) -> list[tuple[int, int]]:
        """The (digits of a, digits of b) that make up `difficulty`, the larger of the two."""

    @abstractmethod
    def write(self, a: str, b: str) -> str:
        """The prompt that asks for the operation on `a` and `b`."""

    @abstractmethod
    def read(self, prompt: str) -> tuple[str, str] | None:
        """The operands that `write` was given, or None for text that `write` cannot produce."""

    def operands(self, prompt: str) -> tuple[str, str]:
        """The checked operands of `prompt`. Raises UserError if it is no problem of this task."""
        operands = self.read(prompt)
        if operands is None or not self._allowed(*operands):
            example = next(self.prompts(max(3, self.min_difficulty)))
            raise UserError(
                f"{prompt!r} is no problem of task {self.name}: expected something like "
                f"{example!r}, with operands of allowed lengths and without leading zeros."
            )
        return operands

    def _allowed(self, a: str, b: str) -> bool:
        shape = len(a), len(b)
        return is_number(a) and is_number(b) and shape in self.shapes(max(shape))

    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        return self.sample_many(rng, difficulty, 1)[0]

    def sample_many(self, rng: np.random.Generator, difficulty: int, count: int) -> list[str]:
        shapes = self.shapes(difficulty)
        shape_counts = rng.multinomial(count, [1 / len(shapes)] * len(shapes)).tolist()
        prompts = []
        for (a_digits, b_digits), shape_count in zip(shapes, shape_counts, strict=True):
            a_numbers = random_numbers(rng, a_digits, shape_count)
            b_numbers = random_numbers(rng, b_digits, shape_count)
            prompts += map(self.write, a_numbers, b_numbers)
        # Counts per shape and then a shuffle: the same as drawing a shape for each prompt in turn.
        return [prompts[i] for i in rng.permutation(count).tolist()]

    def prompts(self, difficulty: int) -> Iterator[str]:
        return (
            self.write(a, b)
            for a_digits, b_digits in self.shapes(difficulty)
            for a in all_numbers(a_digits)
            for b in all_numbers(b_digits)
        )

    def space(self, difficulty: int) -> int:
        return sum(count_numbers(a) * count_numbers(b) for a, b in self.shapes(difficulty))

    def difficulty(self, prompt: str) -> int:
        return max(map(len, self.operands(prompt)))

    def split_key(self, prompt: str) -> str:
        return " ".join(sorted(self.operands(prompt)))

    # Every format here is longest for the largest operands, so the bounds are read off an example.

    def max_prompt_length(self, difficulty: int) -> int:
        return len(self._largest(difficulty))

    def max_completion_length(self, difficulty: int) -> int:
        return len(self.answer(self._largest(difficulty)))

    def _largest(self, difficulty: int) -> str:
        return self.write("9" * difficulty, "9" * difficulty)
