"""What a task is: a family of problems with a difficulty scale and a gold verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from karploop.errors import UserError


class ScorerFailed(Exception):
    """A scorer broke down on a text: whether the text is right is not known. Says why."""


@dataclass(frozen=True)
class Task(ABC):
    """A family of text problems, indexed by an integer difficulty, with one gold answer each.

    Everything about a problem is computed from its prompt, so a prompt is all that needs storing.
    To add a task, subclass this, give `name` a default, set `alphabet` and write the abstract
    methods; then `register` an instance, or name it in a config as "package.module:ATTRIBUTE".
    Problems that come from a file or another library are a `DatasetTask`.

    Attributes:
      name: identifies the task in configs and salts the held-out split, so that renaming a task
        draws a new split.
      alphabet: every character that prompts and gold completions may use, each once. Empty for
        free text, which takes a pretrained model's tokenizer.
      min_difficulty: the smallest difficulty that has problems; difficulties have no upper end.
    """

    name: str
    alphabet: ClassVar[str] = ""
    min_difficulty: ClassVar[int] = 1

    @property
    def identity(self) -> str:
        """All that decides which problems there are, their answers included, but for the code.

        The name, unless problems come from data: then what they hold enters too. Whatever is
        computed with a task is filed under this, so that changed data never meets an old result.
        """
        return self.name

    @property
    def answered(self) -> bool:
        """Whether `answer` knows the gold completion of every problem."""
        return True

    @property
    def verifiable(self) -> bool:
        """Whether `verify` can judge every problem; a task without answers may still do so."""
        return True

    @property
    def hintable(self) -> bool:
        """Whether `hinted` can write every problem."""
        return False

    @abstractmethod
    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        """One prompt at exactly `difficulty`; each prompt there has a chance above zero.

        The draw is uniform unless the task's docstring says otherwise.
        """

    def sample_many(self, rng: np.random.Generator, difficulty: int, count: int) -> list[str]:
        """`count` independent draws of `sample`, repeats included; override it for speed."""
        return [self.sample(rng, difficulty) for _ in range(count)]

    @abstractmethod
    def prompts(self, difficulty: int) -> Iterator[str]:
        """All prompts at `difficulty`, each once. Iterated over only when the space is small."""

    @abstractmethod
    def space(self, difficulty: int) -> int:
        """Number of distinct prompts at `difficulty`."""

    @abstractmethod
    def difficulty(self, prompt: str) -> int:
        """The difficulty of `prompt`. Raises UserError if it is no problem of this task."""

    @abstractmethod
    def answer(self, prompt: str) -> str:
        """The gold completion. Raises UserError if `prompt` is no problem of this task."""

    @abstractmethod
    def max_prompt_length(self, difficulty: int) -> int:
        """Length in characters, without bos and eos, of the longest prompt at `difficulty`."""

    @abstractmethod
    def max_completion_length(self, difficulty: int) -> int:
        """Length in characters, without eos, of the longest gold completion at `difficulty`."""

    def hinted(self, prompt: str) -> str:
        """The prompt with its gold answer as a hint, for those who rationalise (arXiv 2203.14465).

        Raises:
          UserError: the task writes no hints, or `prompt` is no problem of it.
        """
        raise UserError(f"task {self.name} does not say how a hint is written: give it `hinted`")

    def max_hinted_length(self, difficulty: int) -> int:
        """Length in characters, without bos and eos, of the longest hinted prompt there."""
        raise UserError(f"task {self.name} does not say how a hint is written: give it `hinted`")

    def normalise(self, completion: str) -> str:
        """What votes and the verifier compare: the final answer, stripped of blanks.

        The empty string means that the completion gives no answer; it must never win a vote.
        """
        return completion.strip()

    def verify(self, prompt: str, completion: str) -> bool:
        """The gold verifier: whether the final answer is the gold one, exactly.

        It knows the truth. A loop that filters with it is an oracle, an upper bound to compare
        with; a loop that claims to do without labels may use it for measurement only.
        """
        return self.normalise(completion) == self.normalise(self.answer(prompt))

    def verdict(self, prompt: str, completion: str) -> tuple[bool | None, str]:
        """What `verify` says; or None, and why, where its scorer broke down on the text.

        `verify` calls such a text wrong, as a measurement must; a judge has no verdict on it.
        """
        return self.verify(prompt, completion), ""

    def worth(self, prompt: str, completion: str) -> float | None:
        """How good a completion is by gold, 0 … 1; None where the scorer broke down on it.

        Override it where there is more between right and wrong. Of all judges, it is asked by
        `simulated_annotators` alone.
        """
        right, _ = self.verdict(prompt, completion)
        return None if right is None else float(right)

    def measures(self, prompt: str, completion: str) -> Mapping[str, float]:
        """What else is to be known of a completion, by name, such as how rude it is.

        Averaged in the metrics of `watch` and `evaluate`, and read by nothing else. Problems of one
        difficulty have the same names.
        """
        return {}

    def split_key(self, prompt: str) -> str:
        """Canonical form that decides the side of the held-out split.

        Prompts that are trivial rewrites of each other, such as a+b and b+a, share one key.
        """
        return prompt
