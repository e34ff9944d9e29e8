"""People as judges: their verdicts, from a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karploop.data.rows import located_rows
from karploop.errors import UserError
from karploop.judging.opinion import Opinion, Reply

WORDS = {"good": 1.0, "bad": 0.0, "unsure": None}
_SHAPE = '{"prompt", "completion", "verdict": "good", "bad" or "unsure"}, or with "score", 0 … 1'


@dataclass(frozen=True)
class Review:
    """What people said, by prompt and completion; None: they saw it and would not say."""

    said: dict[Reply, list[float | None]]

    @classmethod
    def read(cls, path: str) -> Review:
        """Reads rows of prompt, completion and a verdict; several of one text are several people.

        Raises:
          UserError: no such file, or a row of another form (with its line).
        """
        if not path:
            raise UserError(
                "'config.judge.review' is empty, and the judge 'person' reads verdicts from a "
                f"file: name one, with rows of {_SHAPE}"
            )
        said = defaultdict(list)
        for where, row in located_rows(path):
            texts = (row.get("prompt"), row.get("completion"))
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: a review's row is {_SHAPE}")
            said[texts].append(_score(row, where))
        return cls(dict(said))

    def rate(self, replies: Sequence[Reply]) -> list[Opinion]:
        """The mean of those who said something; what nobody did has no verdict."""
        return [_opinion(self.said.get(reply)) for reply in replies]


def _score(row: dict[str, Any], where: str) -> float | None:
    if "score" in row:
        score = row["score"]
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and 0 <= score <= 1):
            raise UserError(f"{where}: 'score' is {score!r}: write a number from 0 to 1, or null")
        return score
    if row.get("verdict") not in WORDS:
        raise UserError(f"{where}: 'verdict' is {row.get('verdict')!r}: a review's row is {_SHAPE}")
    return WORDS[row["verdict"]]


def _opinion(scores: Sequence[float | None] | None) -> Opinion:
    if scores is None:
        return Opinion(None, "not reviewed")
    known = [score for score in scores if score is not None]
    return Opinion(float(np.mean(known))) if known else Opinion(None, "reviewed: unsure")
