"""What a tokenizer is, and one token per character for small models trained from scratch.

`karploop.data.pretrained` has the tokenizers of real language models.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from karploop.data.tasks.base import Task
from karploop.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Prompt and completion are encoded apart and joined, everywhere."""

    @property
    def pad_id(self) -> int:
        """Fills rows; masked wherever it is, so that it may be another token's id too."""

    @property
    def bos_id(self) -> int | None:
        """Begins a document; None in families whose documents begin without one."""

    @property
    def eos_id(self) -> int:
        """Ends a document."""

    @property
    def has_template(self) -> bool:
        """Whether a conversation can be written by a chat template."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a completion: `eos_id` first, then others such as the end of a turn."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest plus one."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all that decides what the tokenizer does, the same in any process."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, wherever it stands; no special token among them."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a document that begins with `text`, the start token included."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first stop id; special tokens are skipped."""

    def holding(self, strings: Sequence[str]) -> tuple[int, ...]:
        """Ids whose text holds one of `strings` whole."""


@dataclass(frozen=True)
class CharTokenizer:
    """Maps characters to ids: pad 0, bos 1, eos 2, then `alphabet` in its order from 3 on.

    Two tokenizers are equal when their alphabets are, so that a checkpoint needs to store no more
    than the alphabet.

    Raises:
      UserError: the alphabet is empty or names a character twice.
    """

    alphabet: str

    pad_id: ClassVar[int] = 0
    bos_id: ClassVar[int] = 1
    eos_id: ClassVar[int] = 2
    stop_ids: ClassVar[tuple[int, ...]] = (2,)
    has_template: ClassVar[bool] = False
    first_character_id: ClassVar[int] = 3
    special: ClassVar[tuple[str, ...]] = ("<pad>", "<bos>", "<eos>")  # as files call ids 0, 1, 2

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise UserError("CharTokenizer: the alphabet is empty; name at least one character.")
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if repeated:
            raise UserError(
                f"CharTokenizer: the alphabet {self.alphabet!r} repeats {''.join(repeated)!r}; "
                "name each character once."
            )

    @classmethod
    def ascii(cls) -> CharTokenizer:
        """A tokenizer for the printable characters of ASCII and the end of a line."""
        return cls("\n" + "".join(map(chr, range(32, 127))))

    @classmethod
    def for_tasks(cls, *tasks: Task) -> CharTokenizer:
        """A tokenizer for all characters of `tasks`, in the order in which they first appear.

        Raises:
          UserError: a task has no alphabet.
        """
        for task in tasks:
            if not task.alphabet:
                raise UserError(
                    f"task {task.name!r} has no alphabet to make a tokenizer of: name a published "
                    "model in 'config.roles.policy.path', or set 'config.model.alphabet' to ascii. "
                    "(A task of your own may set `alphabet` in its class.)"
                )
        return cls("".join(dict.fromkeys(c for task in tasks for c in task.alphabet)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the three special ones included."""
        return self.first_character_id + len(self.alphabet)

    @property
    def reachable_size(self) -> int:
        """Rows that an embedding needs: every id can occur."""
        return self.vocab_size

    def tokens(self, below: int) -> dict[str, int]:
        """The ids below `below` by their tokens, special ones included."""
        return {t: i for i, t in enumerate([*self.special, *self.alphabet]) if i < below}

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the alphabet."""
        return hashlib.sha256(f"characters:{self.alphabet}".encode()).hexdigest()

    @functools.cached_property
    def _id_of(self) -> dict[str, int]:
        return {c: i for i, c in enumerate(self.alphabet, start=self.first_character_id)}

    @functools.cached_property
    def _text_of(self) -> dict[int, str]:
        """What each id but the end token's adds to a text."""
        return {self.pad_id: "", self.bos_id: ""} | {i: c for c, i in self._id_of.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, one a character, without bos or eos.

        Raises:
          UserError: a character is not in the alphabet.
        """
        try:
            return list(map(self._id_of.__getitem__, text))
        except KeyError as error:
            raise UserError(
                f"CharTokenizer: the character {error.args[0]!r} of {text!r} is not in the "
                f"alphabet {self.alphabet!r}; correct the text, add the character to the task's "
                "alphabet, or name a published model, which reads any."
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """Bos and the ids of `text`; raises what `encode` does."""
        return [self.bos_id, *self.encode(text)]

    def holding(self, strings: Sequence[str]) -> tuple[int, ...]:
        """Ids of the characters that are one of `strings`."""
        return tuple(i for c, i in self._id_of.items() if c in strings)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos; pad and bos are skipped.

        Raises:
          ValueError: an id before the first eos lies outside [0, vocab_size).
        """
        ids = itertools.takewhile(functools.partial(operator.ne, self.eos_id), ids)
        try:
            return "".join(map(self._text_of.__getitem__, ids))
        except KeyError as error:
            raise ValueError(f"id {error} lies outside [0, {self.vocab_size})") from None
