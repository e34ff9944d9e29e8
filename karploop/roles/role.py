"""What every role can do, wherever its weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
Asked = str | Sequence[Message]  # a text, or a conversation that ends with what is to be answered


@dataclass(frozen=True)
class How:
    """How a batch of prompts is to be completed."""

    seed: tuple[int, ...]  # of this batch; prompts in it are told apart by their ids
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # a completion is cut before the first of these


@dataclass(frozen=True)
class Said:
    """A completion, or why there is none."""

    text: str | None
    error: str = ""
    tokens: int = 0


class Role(Protocol):
    """A named model."""

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """One completion of every prompt, in their order.

        What is said to a prompt depends on its id and on `how`, and not on the other prompts.
        """
        ...


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
