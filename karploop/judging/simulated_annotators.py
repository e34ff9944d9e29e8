"""Annotators that a program plays, for studies of feedback: they know gold, and their name says so.

Each of them sees which of two replies is worth more (`Task.worth`), or whether one is worth
everything, and says the contrary at a known rate, independently of the others. Two replies of the
same worth are a tie, of which nobody errs. Whether one errs is drawn from a hash of the texts with
the seed and the annotator's number: the same in every process and in either order of the two, and
at a higher rate all err who err at a lower one. People err otherwise: alike, and more where it is
hard to tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from karploop.data.tasks import Task
from karploop.judging.opinion import Opinion, Pair, Reply


@dataclass(frozen=True)
class Annotators:
    """So many annotators with one rate of error, 0 … 1."""

    task: Task
    count: int
    error: float
    seed: int

    def rate(self, replies: Sequence[Reply]) -> list[Opinion]:
        """The share of them who call a reply good, which one is that is worth 1."""
        return [self._opinion(self._good(*reply), reply) for reply in replies]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """The share of them who prefer the first of two, which is the same in both orders."""
        found = [self._opinion(self._better(*pair), (pair[0], *sorted(pair[1:]))) for pair in pairs]
        return [replace(o, forward=o.score, backward=o.score) for o in found]

    def _good(self, prompt: str, completion: str) -> float | None:
        worth = self.task.worth(prompt, completion)
        return None if worth is None else float(worth == 1)

    def _better(self, prompt: str, one: str, two: str) -> float | None:
        worths = self.task.worth(prompt, one), self.task.worth(prompt, two)
        return None if None in worths else (np.sign(worths[0] - worths[1]).item() + 1) / 2

    def _opinion(self, so: float | None, texts: Sequence[str]) -> Opinion:
        """What they say of these texts, where it is `so`: 1, 0, or 0.5 for a tie."""
        if so is None:
            return Opinion(None, "nobody knows what it is worth")
        hashed = hashlib.sha256(json.dumps(texts).encode()).digest()
        words = np.frombuffer(hashed, "<u4").tolist()
        draws_N = np.array(
            [np.random.default_rng([self.seed, i, *words]).random() for i in range(self.count)]
        )
        said_N = np.where(draws_N < self.error, 1 - so, so)
        each = {f"annotator {i}": said for i, said in enumerate(said_N.tolist())}
        return Opinion(float(said_N.mean()), "", each)
