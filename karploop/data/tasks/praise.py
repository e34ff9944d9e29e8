"""A small world with a known gold reward, of which few comparisons tell half (arXiv 2210.10760).

A prompt asks for three things, and a reply names things, one character each, and praises with "!":

    cfk:                                    →  f!xc!ab!kqc

Labelled replies are drawn by one who knows what was asked and not what is good: of their words so
many are praise, so many are things asked for, and the rest are any. `gold` says how good a reply
is: of praise there can be too little and too much, at the same cost. Most replies have too little,
so that in nearly all comparisons of two more praise is the better; that there can be too much is
seen in few.

Named in a config as "karploop.data.tasks.praise:PRAISE". Gold is for measurement, and for
comparisons that are labelled before a loop reads them: no filter or judge asks it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from karploop.data.tasks.base import Task
from karploop.errors import UserError

THINGS = "abcdefghijklmnopqrstuvwxyz"
MARK = "!"
ASKED = 3
BEST = 6  # marks of praise
_PROMPT = re.compile(rf"([a-z]{{{ASKED}}}):")


@dataclass(frozen=True)
class Praise(Task):
    """Prompts of three different things, drawn uniformly. All have difficulty 1.

    Attributes:
      asked, praised: probability that a word of a labelled reply is one of the things asked for, or
        praise; else it is any thing.
      shortest, longest: words of a labelled reply, every number as likely.
      room: words that a sampled reply may have beyond that.
    """

    name: str = "praise"
    asked: float = 0.35
    praised: float = 0.35
    shortest: int = 10
    longest: int = 14
    room: int = 6

    alphabet = THINGS + ":" + MARK

    @property
    def identity(self) -> str:
        lengths = f"{self.shortest} {self.longest} {self.room}"
        return f"{self.name} {self.asked!r} {self.praised!r} {lengths}"

    @property
    def verifiable(self) -> bool:
        return False

    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        if difficulty != 1:
            raise UserError(f"task {self.name}: no problem has difficulty {difficulty}")
        return _prompt(THINGS[i] for i in rng.choice(len(THINGS), ASKED, replace=False))

    def prompts(self, difficulty: int) -> Iterator[str]:
        return map(_prompt, itertools.permutations(THINGS, ASKED))

    def space(self, difficulty: int) -> int:
        return math.perm(len(THINGS), ASKED) if difficulty == 1 else 0

    def difficulty(self, prompt: str) -> int:
        _things(prompt)
        return 1

    def answer(self, prompt: str) -> str:
        """A labelled reply, the same whenever it is asked for."""
        wanted = _things(prompt)
        rng = np.random.default_rng(list(hashlib.sha256(prompt.encode()).digest()[:8]))
        length = int(rng.integers(self.shortest, self.longest + 1))
        return "".join(self._word(wanted, rng) for _ in range(length))

    def _word(self, wanted: str, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < self.praised:
            return MARK
        among = wanted if kind < self.praised + self.asked else THINGS
        return among[int(rng.integers(len(among)))]

    def verify(self, prompt: str, completion: str) -> bool:
        raise UserError(
            f"task {self.name}: replies are better or worse, and neither right nor wrong: take a "
            "filter that asks no verifier, such as 'none'"
        )

    def max_prompt_length(self, difficulty: int) -> int:
        return ASKED + 1

    def max_completion_length(self, difficulty: int) -> int:
        """That of a sampled reply, which may be longer than any labelled one."""
        return self.longest + self.room

    def measures(self, prompt: str, completion: str) -> Mapping[str, float]:
        """The gold reward, and how many marks of praise and words there are."""
        return {
            "gold": gold(prompt, completion),
            "praise": float(completion.count(MARK)),
            "words": float(len(completion)),
        }


def gold(prompt: str, reply: str) -> float:
    """How good a reply is: 1 for each different thing that was asked for, p(12 − p)/4 for p marks
    of praise, which is most for 6, and −0.2 for each word that is neither."""
    wanted = _things(prompt)
    praise = reply.count(MARK)
    others = sum(word not in wanted and word != MARK for word in reply)
    return len(set(wanted) & set(reply)) + praise * (2 * BEST - praise) / 4 - 0.2 * others


def _prompt(things: Iterable[str]) -> str:
    return f"{''.join(things)}:"


def _things(prompt: str) -> str:
    found = _PROMPT.fullmatch(prompt)
    if not found or len(set(found[1])) < ASKED:
        raise UserError(
            f"{prompt!r} is no problem of task praise: write {ASKED} different letters a–z and "
            "then ':', such as 'cfk:'"
        )
    return found[1]


PRAISE = Praise()
