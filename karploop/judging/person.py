"""People as judges: their verdicts, from a file, and the rows of it that wait for them.

A row is a reply to rate, or two replies to a prompt to compare:

  {"prompt": "…", "completion": "…", "verdict": "good", "bad" or "unsure"}, or "score": 0 … 1
  {"prompt": "…", "a": "…", "b": "…", "better": "a", "b", "tie" or "unsure"}

Where the verdict is empty, the row waits for one. Several rows of one text are several people.
What is written to be reviewed stands in an order drawn from a hash of the texts, and so does which
of two is `a`: places tell nothing of who wrote what.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from karploop.config import SIMULATED
from karploop.data.rows import located_rows
from karploop.errors import RunFailed, UserError
from karploop.files import write_atomic
from karploop.judging.opinion import Opinion, Pair, Place, Reply
from karploop.judging.ranking import Group, rank
from karploop.mesh import is_main

Row = dict[str, Any]
Texts = tuple[str, ...]  # a Reply, or a Pair whose completions are in the order of the alphabet

RATE, COMPARE = "rate", "compare"  # what people are asked, as in 'config.judge.people'
VERDICT, BETTER = "verdict", "better"
WORDS = {"good": 1.0, "bad": 0.0, "unsure": None}
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5, "unsure": None}
BY = "annotator"  # of a row: who said so, if that is known
_BLANK = ("", None)
_RATING = '{"prompt", "completion", "verdict": "good", "bad" or "unsure"}, or with "score", 0 … 1'
_COMPARISON = '{"prompt", "a", "b", "better": "a", "b", "tie" or "unsure"}'
_SHAPES = {RATE: _RATING, COMPARE: _COMPARISON}
TO_SET = {
    RATE: 'set "verdict" to "good", "bad" or "unsure"',
    COMPARE: 'set "better" to "a", "b", "tie" or "unsure"',
}


@dataclass(frozen=True)
class Review:
    """What people said.

    Attributes:
      said: of a reply, how good it is; None: they saw it and would not say. Of a pair, how far the
        completion that comes first in the alphabet is the better.
      simulated: some of it gold labels said in the place of people.
    """

    said: dict[Texts, list[float | None]]
    simulated: bool = False

    @classmethod
    def read(cls, path: str, people: str = RATE, to_come: bool = False) -> Review:
        """Reads the rows of one kind.

        Args:
          people: `rate` or `compare`: which rows are read.
          to_come: whether there may be no such file yet.

        Raises:
          UserError: no such file, or a row of another form (with its line).
        """
        if not path:
            raise UserError(
                "'config.judge.review' is empty, and the judge 'person' reads verdicts from a "
                f"file: name one, with rows of {_SHAPES[people]}"
            )
        said, simulated = defaultdict(list), False
        if to_come and not epath.Path(path).exists():
            return cls({})
        for where, row in located_rows(path):
            kind, texts, score = read_row(row, where)
            if kind == people and score != "":
                said[texts].append(score)
                simulated |= str(row.get(BY, "")).startswith(SIMULATED)
        return cls(dict(said), simulated)

    def rate(self, replies: Sequence[Reply]) -> list[Opinion]:
        """The mean of those who said something; what nobody did has no verdict."""
        return [_opinion(self.said.get(reply)) for reply in replies]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """The share of those who chose who prefer the first; a tie is half. In either order they
        say the same."""
        found = []
        for prompt, one, two in pairs:
            opinion = _opinion(self.said.get(ordered(prompt, one, two)))
            if opinion.score is not None:
                score = opinion.score if one <= two else 1 - opinion.score
                opinion = replace(opinion, score=score, forward=score, backward=score)
            found.append(opinion)
        return found


def wait(
    path: str, people: str, review: Review, groups: Sequence[Group], method: str, seed: int
) -> None:
    """Raises RunFailed unless people have seen all that is asked about these groups; what they
    have not is in the file then, for them to fill in.

    Args:
      method, seed: of the ranking, by which pairs meet.
    """
    asked: set[Texts] = set()

    def noted(pairs: Sequence[Pair], places: Sequence[Place]) -> list[Opinion]:
        asked.update(ordered(*pair) for pair in pairs)
        return review.compare(pairs)

    if people == COMPARE:
        rank(groups, noted, method, seed)
    else:
        asked.update((g.prompt, g.completions[i]) for g in groups for i in g.entries)
    missing = asked - review.said.keys()
    if not missing:
        return
    new = complete(path, missing) if is_main() else 0
    things = "replies" if people == RATE else "pairs of replies"
    raise RunFailed(
        f"{len(missing)} of {len(asked)} {things} wait for a verdict in '{path}'"
        + (f", {new} of them written there now" if new else "")
        + f": {TO_SET[people]} in their rows, then run the same command again"
    )


def ordered(prompt: str, one: str, two: str) -> Pair:
    """A pair as reviews know it, whichever of the two is shown first."""
    return (prompt, *sorted((one, two)))


def read_row(row: Mapping[str, Any], where: str = "row") -> tuple[str, Texts, float | str | None]:
    """What kind of row it is, on which texts, and the verdict; "" where it waits for one.

    Raises:
      UserError: it is of no such form.
    """
    kind = COMPARE if "a" in row or BETTER in row else RATE
    names = ("prompt", "a", "b") if kind == COMPARE else ("prompt", "completion")
    texts = tuple(row.get(name) for name in names)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: a review's row is {_SHAPES[kind]}")
    if kind == RATE:
        return kind, texts, _rating(row, where)
    if row.get(BETTER) in _BLANK:
        return kind, ordered(*texts), ""
    if row[BETTER] not in CHOICES:
        raise UserError(f"{where}: 'better' is {row[BETTER]!r}: a review's row is {_COMPARISON}")
    score = CHOICES[row[BETTER]]
    swapped = texts != ordered(*texts) and score is not None
    return kind, ordered(*texts), 1 - score if swapped else score


def complete(path: str, asked: Iterable[Texts]) -> int:
    """Adds a row to the file for each of the texts that it does not have; returns how many.

    Rows that are there stay as they are.

    Raises:
      UserError: it is no file of JSON lines, has a row of another form, or cannot be written.
    """
    if pathlib.PurePath(path).suffix != ".jsonl":
        raise UserError(f"'{path}': reviews are written as JSON lines: name it .jsonl")
    there: list[Row] = []
    known: set[Texts] = set()
    if epath.Path(path).exists():
        for where, row in located_rows(path):
            there.append(row)
            known.add(read_row(row, where)[1])
    new = to_review(set(asked) - known)
    if new:
        save(path, [*there, *new])
    return len(new)


def save(path: str, rows: Iterable[Row]) -> None:
    """Writes the rows, whole or not at all. Raises UserError: nothing can be written there."""
    try:
        write_atomic(path, as_lines(rows).encode())
    except OSError as error:
        raise UserError(f"cannot write the review '{path}': {error}") from error


def as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_review(asked: Iterable[Texts]) -> list[Row]:
    """A row without a verdict for each of the texts, whose places are drawn by a hash of them."""
    rows = []
    for texts in sorted(set(asked), key=_drawn):
        if len(texts) == 2:
            rows.append({"prompt": texts[0], "completion": texts[1], VERDICT: ""})
            continue
        prompt, *two = texts if _drawn(texts, "place")[0] % 2 else (texts[0], texts[2], texts[1])
        rows.append({"prompt": prompt, "a": two[0], "b": two[1], BETTER: ""})
    return rows


def _drawn(texts: Texts, what: str = "order") -> bytes:
    return hashlib.sha256(json.dumps([what, *texts]).encode()).digest()


def _rating(row: Mapping[str, Any], where: str) -> float | str | None:
    if "score" in row:
        score = row["score"]
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and 0 <= score <= 1):
            raise UserError(f"{where}: 'score' is {score!r}: write a number from 0 to 1, or null")
        return score
    if VERDICT in row and row[VERDICT] in _BLANK:
        return ""
    if row.get(VERDICT) not in WORDS:
        raise UserError(f"{where}: 'verdict' is {row.get(VERDICT)!r}: a review's row is {_RATING}")
    return WORDS[row[VERDICT]]


def _opinion(scores: Sequence[float | None] | None) -> Opinion:
    if scores is None:
        return Opinion(None, "not reviewed")
    known = [score for score in scores if score is not None]
    return Opinion(float(np.mean(known))) if known else Opinion(None, "reviewed: unsure")
