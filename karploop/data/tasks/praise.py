"""A small world with a known gold reward, of which few comparisons tell half (arXiv 2210.10760).

A prompt asks for three things, and a reply names things, one character each, and praises with "!":

    cfk:                                    →  f!xc!ab!kqcamf!dlcmuzb!rk

Labelled replies are drawn by one who knows what was asked and not what is good: of their words some
are praise, more in one reply than in another, of the rest some are things asked for, and the others
are vowels, more in one reply than in another, or consonants. `gold` says how good a reply is: of
praise there can be too little and too much, at the same cost. Most replies have too little, so that
in nearly all comparisons of two more praise is the better; that there can be too much is seen in
few. Vowels are worth a little: some hundreds of comparisons tell, some tens do not. What was asked
for is worth most a word, and is the hardest to see: it depends on the prompt.

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
VOWELS = "aeiou"
CONSONANTS = "".join(sorted(set(THINGS) - set(VOWELS)))
BEST = 8  # marks of praise
_PROMPT = re.compile(rf"([a-z]{{{ASKED}}}):")


@dataclass(frozen=True)
class Praise(Task):
    """Prompts of three different things, drawn uniformly. All have difficulty 1.

    Attributes:
      praised: share of praise among a labelled reply's words, in the mean over replies; each has
        its own, Beta-distributed as after 20 words.
      asked: of other words, the probability to be one of the things asked for.
      vowels: share of vowels among what is left, Beta-distributed as after 10 words.
      shortest, longest: words of a labelled reply, every number as likely.
      room: words that a sampled reply may have beyond that.
    """

    name: str = "praise"
    praised: float = 0.15
    asked: float = 0.25
    vowels: float = 0.3
    shortest: int = 24
    longest: int = 32
    room: int = 6

    alphabet = THINGS + ":" + MARK

    @property
    def identity(self) -> str:
        lengths = f"{self.shortest} {self.longest} {self.room}"
        return f"{self.name} {self.praised!r} {self.asked!r} {self.vowels!r} {lengths}"

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
        praised, vowels = _share(rng, self.praised, 20), _share(rng, self.vowels, 10)
        return "".join(self._word(wanted, praised, vowels, rng) for _ in range(length))

    def _word(self, wanted: str, praised: float, vowels: float, rng: np.random.Generator) -> str:
        if rng.random() < praised:
            return MARK
        if rng.random() < self.asked:
            among = wanted
        else:
            among = VOWELS if rng.random() < vowels else CONSONANTS
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
    """How good a reply is: 1 for each word that was asked for, p(16 − p)/4 for p marks of praise,
    which is most for 8, 0.3 for each vowel, and −0.2 for each word that is neither asked for nor
    praise."""
    wanted = _things(prompt)
    praise = reply.count(MARK)
    asked = sum(word in wanted for word in reply)
    vowels = sum(word in VOWELS for word in reply)
    others = len(reply) - praise - asked
    return asked + praise * (2 * BEST - praise) / 4 + 0.3 * vowels - 0.2 * others


def _share(rng: np.random.Generator, mean: float, words: float) -> float:
    return float(rng.beta(mean * words, (1 - mean) * words))


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
