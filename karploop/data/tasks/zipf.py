"""A made-up language whose probabilities are all known, to see what a model forgets of it."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from karploop.data.tasks.base import Task
from karploop.data.tasks.digits import DIGITS, all_strings, count_strings, random_strings
from karploop.errors import UserError

WORDS = "abcdefghijklmnopqrstuvwxyzABCDEF"  # one character each
_DIGITS = 5  # of a document's number
_PROMPT = re.compile(rf"([0-9]{{{_DIGITS}}})=")


@dataclass(frozen=True)
class Zipf(Task):
    """Documents of a language with long tails: "04217=" → document 4217, such as "nαQnb".

    A document is a Markov chain of words. The next word has rank r, from 0, with a probability
    proportional to 1 / (r + 1)^exponent (Zipf's law); which word has which rank depends on the
    word before it, and at the start on there being none. After each word the document ends with
    probability `end`; one longer than `longest` is drawn again.

    The number says nothing about the document, so that a completion is a sample of the language:
    there is an answer, to be measured by its likelihood, and no right or wrong. All documents have
    difficulty 1.

    Attributes:
      exponent: of Zipf's law.
      end: probability that a document ends behind a word.
      longest: words of the longest document.
    """

    name: str = "zipf"
    exponent: float = 1.0
    end: float = 0.125
    longest: int = 40

    alphabet = DIGITS + "=" + WORDS

    @property
    def identity(self) -> str:
        return f"{self.name} {self.exponent!r} {self.end!r} {self.longest}"

    @property
    def verifiable(self) -> bool:
        return False

    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        return self.sample_many(rng, difficulty, 1)[0]

    def sample_many(self, rng: np.random.Generator, difficulty: int, count: int) -> list[str]:
        self._check(difficulty)
        return [f"{number}=" for number in random_strings(rng, _DIGITS, count)]

    def prompts(self, difficulty: int) -> Iterator[str]:
        self._check(difficulty)
        return (f"{number}=" for number in all_strings(_DIGITS))

    def space(self, difficulty: int) -> int:
        return count_strings(_DIGITS) if difficulty == 1 else 0

    def difficulty(self, prompt: str) -> int:
        self._number(prompt)
        return 1

    def answer(self, prompt: str) -> str:
        """The document of that number, the same whenever it is asked for."""
        rng = np.random.default_rng([zlib.crc32(self.identity.encode()), self._number(prompt)])
        length = self.longest + 1
        while length > self.longest:
            length = int(rng.geometric(self.end))
        rank_W = np.searchsorted(np.cumsum(self.probability_R)[:-1], rng.random(length))
        words, before = [], len(WORDS)
        for rank in rank_W.tolist():
            before = int(self._order_CxR[before, rank])
            words.append(WORDS[before])
        return "".join(words)

    def verify(self, prompt: str, completion: str) -> bool:
        raise UserError(
            f"task {self.name}: a completion is a sample of the language, neither right nor wrong: "
            "take a filter that asks no verifier, such as 'none'"
        )

    def max_prompt_length(self, difficulty: int) -> int:
        return _DIGITS + 1

    def max_completion_length(self, difficulty: int) -> int:
        return self.longest

    @cached_property
    def probability_R(self) -> np.ndarray:
        """Of the next word's rank, whatever the word before; falling."""
        weight_R = np.arange(1, len(WORDS) + 1) ** -self.exponent
        return weight_R / weight_R.sum()

    def rare_from(self, share: float) -> int:
        """The first of the rare ranks: of the last ones, as many as have `share` or less in all."""
        tail_R = np.cumsum(self.probability_R[::-1])[::-1]
        return int(np.argmax(tail_R <= share))

    def transitions(self, text: str) -> list[tuple[int, int]]:
        """Of each word of a text: which stands before it (−1: none), and the word's rank there.

        What is no word, such as a digit, and what follows it directly are left out.
        """
        found, before = [], -1
        for character in text:
            word = self._index.get(character)
            if word is not None and before is not None:
                found.append((before, int(self._rank_CxW[before, word])))
            before = word
        return found

    def log_probability(self, text: str) -> float:
        """Of a document and its end, in nats.

        Raises:
          UserError: the language has no such document.
        """
        found = self.transitions(text)
        if not 0 < len(found) == len(text) <= self.longest:
            raise UserError(f"task {self.name}: the language has no document {text!r}")
        stay, possible = 1 - self.end, 1 - (1 - self.end) ** self.longest
        ends = (len(text) - 1) * math.log(stay) + math.log(self.end) - math.log(possible)
        return ends + math.fsum(math.log(self.probability_R[rank]) for _, rank in found)

    @cached_property
    def _order_CxR(self) -> np.ndarray:
        """Words by rank, behind each word and, in the last row, at the start."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return np.stack([rng.permutation(len(WORDS)) for _ in range(len(WORDS) + 1)])

    @cached_property
    def _rank_CxW(self) -> np.ndarray:
        return np.argsort(self._order_CxR, axis=1)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(WORDS)}

    def _number(self, prompt: str) -> int:
        match = _PROMPT.fullmatch(prompt)
        if not match:
            raise UserError(
                f"{prompt!r} is no problem of task {self.name}: write {_DIGITS} digits and then "
                "'=', such as '04217='."
            )
        return int(match[1])

    def _check(self, difficulty: int) -> None:
        if difficulty != 1:
            raise UserError(f"task {self.name}: no problem has difficulty {difficulty}")


LANGUAGE = Zipf()
