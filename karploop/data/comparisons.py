"""Comparisons from files: of two completions of a prompt, which is the better.

Two shapes are read:

  {"prompt": "…", "chosen": "…", "rejected": "…"}
  {"prompt": "…", "completions": ["…", "…"], "winner": "first" or "second"}   as a judge writes them

with "messages" in place of "prompt" where it is a chat. A row of the second shape whose winner is
"tie", null or absent says nothing about which is better: it is counted and not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from karploop.asking import Asked, transcript
from karploop.data.rows import located_rows, to_prompt
from karploop.errors import UserError
from karploop.schema import nearest

_SHAPES = '"chosen" and "rejected", or "completions" (two texts) and "winner"'


@dataclass(frozen=True)
class Comparison:
    """The better and the worse completion of a prompt."""

    prompt: Asked
    chosen: str
    rejected: str
    where: str  # file and line, for errors

    @property
    def topic(self) -> str:
        """The prompt as one text: comparisons of the same prompt have the same."""
        return self.prompt if isinstance(self.prompt, str) else transcript(self.prompt)

    def is_held_out(self, fraction: float, seed: int) -> bool:
        """Whether its prompt lies on the held-out side of a split, which is a hash of both."""
        digest = hashlib.sha256(f"{seed}\n{self.topic}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


@dataclass(frozen=True)
class Comparisons:
    """Those of a file, in its order, and how many of its rows were none."""

    decided: Sequence[Comparison]
    ties: int
    no_winner: int


def read_comparisons(path: epath.PathLike) -> Comparisons:
    """The rows of a file as comparisons.

    Raises:
      UserError: no such file or no rows; a row of neither shape, without both texts, or with equal
        ones (the message has file and line).
    """
    decided, counts = [], {"tie": 0, None: 0}
    for where, row in located_rows(path):
        found = to_comparison(row, where)
        if isinstance(found, Comparison):
            decided.append(found)
        else:
            counts[found] += 1
    return Comparisons(decided, counts["tie"], counts[None])


def to_comparison(row: Mapping[str, Any], where: str = "row") -> Comparison | str | None:
    """One row as a comparison; "tie" or None where it does not say which is the better.

    Raises:
      UserError: see `read_comparisons`.
    """
    asked = to_prompt(row, where)
    if asked.tokens is not None:
        raise UserError(f"{where}: a comparison has a 'prompt' or 'messages', and not 'tokens'")
    pair, winner = (row.get("chosen"), row.get("rejected")), "first"
    if pair == (None, None):
        texts = row.get("completions")
        if not isinstance(texts, list) or len(texts) != 2:
            raise UserError(f"{where}: a comparison has {_SHAPES}; this row has neither")
        pair, winner = tuple(texts), row.get("winner")
    if not all(isinstance(text, str) for text in pair):
        raise UserError(f"{where}: a comparison wants two texts, {_SHAPES}; one of them is no text")
    if winner in ("tie", None):
        return winner
    if winner not in ("first", "second"):
        known = nearest(str(winner), ("first", "second", "tie"))
        raise UserError(f"{where}: 'winner' is {winner!r}: {known}")
    if pair[0] == pair[1]:
        raise UserError(
            f"{where}: both texts are the same, so that neither can be the better: {pair[0][:60]!r}"
        )
    chosen, rejected = pair if winner == "first" else pair[::-1]
    prompt = asked.text if asked.text is not None else asked.messages
    return Comparison(prompt, chosen, rejected, where)
