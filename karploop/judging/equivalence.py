"""Which answers are the same one: as the task compares them, or as mathematics.

1/2, 0.5 and \\frac{1}{2} are three texts and one answer. The library math-verify tells, in a
process of its own (see `math_process`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence

from karploop.errors import RunFailed, UserError
from karploop.judging import math_process

_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
# How the kernel ends a process that a text has driven too far: out of time, memory or stack.
_TOO_HARD = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)


def identity(equivalence: str) -> dict[str, str]:
    """What decides which answers are the same, with the versions of who says so.

    Args:
      equivalence: 'task' or 'math'.

    Raises:
      UserError: a package is missing.
    """
    if equivalence == "task":
        return {"equivalence": "task"}
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"'config.judge.equivalence' is math, and the package '{error.name}' is missing; "
            "install it with: pip install 'math-verify>=0.9,<0.10'"
        ) from error
    return {"equivalence": ", ".join(versions)}


class Mathematics:
    """Whether texts are the same as mathematics. Its process starts with the first question.

    Attributes:
      seconds: of the processor that a question may take.
      given_up: questions that took longer, or too much memory; their answer is no.
    """

    def __init__(self, seconds: float = 5.0):
        self.seconds = seconds
        self.given_up = 0
        self._process: subprocess.Popen | None = None
        self._ask = functools.lru_cache(maxsize=50_000)(self._answer)

    def readable(self, text: str) -> bool:
        """Whether there is mathematics in it. What there is none in equals nothing."""
        return self._ask(text)

    def same(self, one: str, two: str) -> bool:
        """Whether two texts are. This is symmetric, and not transitive: 1/3 is 0.333333."""
        return self._ask(*sorted((one, two)))

    def _answer(self, *texts: str) -> bool:
        if self._process is None:
            self._process = _start(self.seconds)
        try:
            self._process.stdin.write(json.dumps(texts) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # how it ended is told below
        line = self._process.stdout.readline()
        if line:
            return line == "1\n"
        ended = self._process.wait()
        self.close()
        if ended not in _TOO_HARD:
            raise RunFailed(
                f"the process that compares answers as mathematics ended with {ended}: run the "
                "same command again, and all that is done is found again"
            )
        self.given_up += 1
        return False

    def close(self) -> None:
        """Ends the process; another question starts it again."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # a question that nobody reads any more
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Mathematics:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _start(seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", math_process.__file__, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # The order of sets, and with it SymPy's way through an expression, is always the same.
        env=os.environ | {"PYTHONHASHSEED": "0"},
        start_new_session=True,  # Ctrl-C is for the run, which finishes what it is at
    )


def classes(
    answers: Sequence[str], prompts: Sequence[int], mathematics: Mathematics | None
) -> list[str]:
    """For each answer, the one that stands for all that are the same; '' stays ''.

    Texts of one prompt are compared, every two. Two are the same also where others join them, so
    that it does not matter in which order they come. The shortest stands for its class.

    Args:
      prompts: of each answer, which prompt it is to.
      mathematics: None: the same text is the same answer.
    """
    if mathematics is None:
        return list(answers)
    of_prompt = defaultdict(set)
    for prompt, answer in zip(prompts, answers, strict=True):
        of_prompt[prompt].add(answer)
    stands_for = {
        prompt: {
            text: min(one_class, key=lambda t: (len(t), t))
            for one_class in _joined(sorted(texts), mathematics)
            for text in one_class
        }
        for prompt, texts in of_prompt.items()
    }
    return [stands_for[prompt][answer] for prompt, answer in zip(prompts, answers, strict=True)]


def _joined(texts: Sequence[str], mathematics: Mathematics) -> list[list[str]]:
    """The finest classes in which every two texts that are the same are together."""
    found: list[list[str]] = []
    for text in texts:
        is_same = [
            bool(text)
            and mathematics.readable(text)
            and any(mathematics.readable(t) and mathematics.same(text, t) for t in one_class)
            for one_class in found
        ]
        joined = list(itertools.compress(found, is_same))
        found = [c for c, there in zip(found, is_same, strict=True) if not there]
        found.append([text, *itertools.chain(*joined)])
    return found
