"""How a role is asked, wherever its weights are: prompts, settings, and what is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
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
class Spent:
    """What an answer took."""

    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    seconds: float = 0.0  # of an endpoint; on the mesh prompts share a pass, and this is 0

    def __add__(self, other: Spent) -> Spent:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Spent(*(one + another for one, another in pairs))


@dataclass(frozen=True)
class Said:
    """A completion, or why there is none."""

    text: str | None
    error: str = ""
    spent: Spent = Spent()
    finished: bool = True  # it ended by itself; else it was cut at the most tokens


@dataclass(frozen=True)
class Scored:
    """How probable each option is as what comes next, or why that is not known."""

    logprobs: tuple[float, ...] | None  # nats, but for a constant that all options share
    error: str = ""
    spent: Spent = Spent()


class Role(Protocol):
    """A named model."""

    def complete(self, prompts: Sequence[Asked], ids: Sequence[int], how: How) -> list[Said]:
        """One completion of every prompt, in their order.

        What is said to a prompt depends on its id and on `how`, and not on the other prompts.
        """
        ...

    def score(self, prompts: Sequence[Asked], options: Sequence[str]) -> list[Scored]:
        """How probable the model finds each option as the beginning of its answer.

        Raises:
          UserError: it cannot tell, for any prompt.
        """
        ...


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to its first stop string, and whether there was one."""
    found = [at for at in map(text.find, stops) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text, for a template to quote."""
    return messages[0]["content"] if len(messages) == 1 else _turns(messages)


def spoken(messages: Sequence[Message]) -> str:
    """A conversation as a text in which the assistant speaks next, where there is no template."""
    return f"{_turns(messages)}\n\nAssistant:"


def _turns(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)
