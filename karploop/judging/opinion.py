"""What a judge that is a model says of one reply, or of one pair."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from karploop.asking import Spent

TEMPLATES = pathlib.Path(__file__).parent / "templates"

Reply = tuple[str, str]  # a prompt and its completion
Pair = tuple[str, str, str]  # a prompt and its two completions
Place = tuple[int, ...]  # which reply or pair that is, for what is drawn for each


@dataclass(frozen=True)
class Opinion:
    """A verdict with what it was made of. No verdict is a missing score, never a number.

    Attributes:
      score: 0 … 1; of a pair, how probable it is that the first is the better.
      reason: why there is none.
      criteria: the score by each criterion or principle.
      forward, backward: of a pair, the scores when it is shown in its order and the other way
        round; both for the first of the pair.
      rationales: what the judge wrote before its answers.
    """

    score: float | None
    reason: str = ""
    criteria: Mapping[str, float | None] = field(default_factory=dict)
    forward: float | None = None
    backward: float | None = None
    rationales: tuple[str, ...] = ()
    spent: Spent = Spent()

    @property
    def winner(self) -> str | None:
        """ "first", "second", or "tie" where the two orders disagree; None without a verdict."""
        if self.score is None or self.forward is None or self.backward is None:
            return None
        if min(self.forward, self.backward) > 0.5:
            return "first"
        return "second" if max(self.forward, self.backward) < 0.5 else "tie"


def total(spent) -> Spent:
    """The sum of what was spent."""
    return sum(spent, Spent())
