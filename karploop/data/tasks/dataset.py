"""Tasks whose problems are data: a finite pool, read when it is first needed."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from karploop.data.tasks.base import ScorerFailed, Task
from karploop.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One problem of a pool."""

    prompt: str
    answer: str | None = None  # gold; None or blank: unknown
    difficulty: int = 1
    where: str = ""  # file and line or the like, for errors
    evidence: Any = field(default=None, repr=False)  # what a scorer wants to see besides


@dataclass(frozen=True)
class DatasetTask(Task):
    """Problems from a file, a data set or another library.

    Free text, so there is no alphabet: it takes a pretrained model. `sample` is uniform over the
    problems of a difficulty. A completion is right if it is the gold answer but for white space;
    letter case counts. A task with a `scorer` asks that instead.

    A prompt that occurs again is dropped; a gold answer found later serves one that had none. Two
    different answers to one prompt are refused, because only the owner of the data can know which
    is right; `conflicts="first"` keeps the first.

    Attributes:
      load: gives the problems. Called once, when something asks for them; the order matters to
        which are drawn, so it must be the same in every process.
      scorer: `scorer(problem, completion)` tells whether `completion`, stripped and not empty, is
        right, or raises ScorerFailed. Without one the gold answer decides.
      version: what decides on problems and scores besides the pool's content, such as the version
        of the library that scores; part of `identity`.
      conflicts: "refuse" or "first".
    """

    load: Callable[[], Iterable[Problem]] = field(repr=False)
    scorer: Callable[[Problem, str], bool] | None = field(default=None, repr=False)
    version: str = ""
    conflicts: str = "refuse"

    def __post_init__(self) -> None:
        if self.conflicts not in ("refuse", "first"):
            raise UserError(
                f"task {self.name}: 'conflicts' is 'refuse' or 'first', not {self.conflicts!r}"
            )

    @cached_property
    def identity(self) -> str:
        """The name and the SHA-256 (hex) of all problems in their order and of `version`."""
        digest = hashlib.sha256(json.dumps(self.version).encode())
        for p in self._pool.values():
            digest.update(json.dumps([p.prompt, p.answer, p.difficulty]).encode())
        return f"{self.name} {digest.hexdigest()}"

    @cached_property
    def answered(self) -> bool:
        return all(p.answer is not None for p in self._pool.values())

    @property
    def verifiable(self) -> bool:
        return self.scorer is not None or self.answered

    @property
    def min_difficulty(self) -> int:
        """The smallest difficulty of the pool."""
        return min(self._by_difficulty)

    def sample(self, rng: np.random.Generator, difficulty: int) -> str:
        return self.sample_many(rng, difficulty, 1)[0]

    def sample_many(self, rng: np.random.Generator, difficulty: int, count: int) -> list[str]:
        prompts = self._by_difficulty.get(difficulty)
        if not prompts:
            raise UserError(f"task {self.name}: no problem has difficulty {difficulty}")
        return [prompts[i] for i in rng.integers(len(prompts), size=count).tolist()]

    def prompts(self, difficulty: int) -> Iterator[str]:
        return iter(self._by_difficulty.get(difficulty, ()))

    def space(self, difficulty: int) -> int:
        return len(self._by_difficulty.get(difficulty, ()))

    def difficulty(self, prompt: str) -> int:
        return self.problem(prompt).difficulty

    def answer(self, prompt: str) -> str:
        """The gold completion as the data has it. Raises UserError if it is not known."""
        problem = self.problem(prompt)
        if problem.answer is None:
            raise UserError(f"{self._about(problem)} has no gold answer; {_NO_GOLD}")
        return problem.answer

    def max_prompt_length(self, difficulty: int) -> int:
        """Characters of the longest prompt at any difficulty up to `difficulty`.

        Characters, not tokens: with a pretrained tokenizer, measure the prompts themselves.
        """
        return max((n for d, (n, _) in self._longest.items() if d <= difficulty), default=0)

    def max_completion_length(self, difficulty: int) -> int:
        """Characters of the longest gold answer up to `difficulty`; 0 where none is known."""
        return max((n for d, (_, n) in self._longest.items() if d <= difficulty), default=0)

    def normalise(self, completion: str) -> str:
        """The completion with each run of white space as one blank, stripped."""
        return " ".join(completion.split())

    def verify(self, prompt: str, completion: str) -> bool:
        """Whether the scorer or, without one, the gold answer calls `completion` right.

        Where the scorer fails on a text, the text is wrong; `verdict` tells the two apart.

        Raises:
          UserError: `prompt` is no problem of this task, or has neither scorer nor gold answer.
        """
        return bool(self.verdict(prompt, completion)[0])

    def verdict(self, prompt: str, completion: str) -> tuple[bool | None, str]:
        problem = self.problem(prompt)
        if self.scorer is not None:
            stripped = completion.strip()
            try:
                return bool(stripped) and self.scorer(problem, stripped), ""
            except ScorerFailed as error:
                return None, str(error)
        if problem.answer is None:
            raise UserError(f"{self._about(problem)} has no gold answer to verify with; {_NO_GOLD}")
        return self.normalise(completion) == self.normalise(problem.answer), ""

    def split_key(self, prompt: str) -> str:
        """The prompt without differences of letter case, white space and Unicode composition."""
        return " ".join(unicodedata.normalize("NFC", prompt).casefold().split())

    def problem(self, prompt: str) -> Problem:
        """The problem that `prompt` asks. Raises UserError if the pool has none."""
        problem = self._pool.get(prompt)
        if problem is None:
            raise UserError(
                f"{_short(prompt)} is no problem of task {self.name}: it is not among its "
                f"{len(self._pool)} prompts, letter by letter"
            )
        return problem

    @cached_property
    def _pool(self) -> dict[str, Problem]:
        """Prompt → problem, each prompt once, in the order of the data."""
        pool: dict[str, Problem] = {}
        for problem in self.load():
            if not problem.prompt.strip():
                raise UserError(f"{self._about(problem)}: the prompt is blank")
            if problem.answer is not None and not problem.answer.strip():
                # A blank answer means none everywhere: an empty completion must never be right.
                problem = replace(problem, answer=None)
            known = pool.setdefault(problem.prompt, problem)
            if known is problem or problem.answer is None:
                continue
            if known.answer is None:
                pool[problem.prompt] = problem
            elif self.conflicts == "refuse":
                if self.normalise(known.answer) != self.normalise(problem.answer):
                    raise UserError(
                        f"task {self.name}: two answers to one prompt, {_short(problem.prompt)}: "
                        f"{_short(known.answer)} at {known.where or 'first'} and "
                        f"{_short(problem.answer)} at {problem.where or 'later'}. Correct the "
                        "data, or keep the first of such rows with 'conflicts=first'"
                    )
        if not pool:
            raise UserError(f"task {self.name}: there are no problems in it")
        return pool

    @cached_property
    def _by_difficulty(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for prompt, problem in self._pool.items():
            groups.setdefault(problem.difficulty, []).append(prompt)
        return groups

    @cached_property
    def _longest(self) -> dict[int, tuple[int, int]]:
        """Difficulty → characters of the longest prompt and of the longest answer there."""
        longest: dict[int, tuple[int, int]] = {}
        for p in self._pool.values():
            prompt, answer = longest.get(p.difficulty, (0, 0))
            found = max(prompt, len(p.prompt)), max(answer, len(p.answer or ""))
            longest[p.difficulty] = found
        return longest

    def _about(self, problem: Problem) -> str:
        at = f" ({problem.where})" if problem.where else ""
        return f"task {self.name}: the problem {_short(problem.prompt)}{at}"


_NO_GOLD = (
    "name the field that holds it ('answer=FIELD'), complete the data, or do without gold: a "
    "filter that needs none, no seed data and no evaluation"
)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57] + "...")
