"""How a judge's answer is read: from probabilities in one pass, or from what it writes.

A text that does not end in one of the options is no answer. It is never taken for the nearest one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from karploop.asking import How, Role, Scored, Spent

READABLE = "\nRating: 1\nBetter: A"  # ends a text that is an answer, whatever the question
_TEMPERATURE = 0.0  # of what a judge writes


@dataclass(frozen=True)
class Answer:
    """What a judge answers to one question.

    Attributes:
      shares: of the options, which sum to 1; None: no answer.
      reason: why there is none.
      rationale: what it wrote before its answer.
    """

    shares: tuple[float, ...] | None
    reason: str = ""
    rationale: str = ""
    spent: Spent = Spent()


@dataclass(frozen=True)
class Reading:
    """How questions are asked.

    Attributes:
      rationale: the judge writes its reasons and then its answer; else nothing but an answer.
      max_new_tokens: of what it writes.
      seed: of what it writes, where its server draws.
    """

    rationale: bool = False
    max_new_tokens: int = 256
    seed: int = 0

    def answers(
        self, role: Role, prompts: Sequence[str], options: Sequence[str], marker: str
    ) -> list[Answer]:
        """The role's answer to every prompt: one of `options`.

        Args:
          marker: what stands before the answer in a text with reasons, as in "Rating:".
        """
        if not self.rationale:
            return [_weighed(found) for found in role.score(prompts, options)]
        how = How((self.seed,), self.max_new_tokens, _TEMPERATURE)
        # What is drawn for a prompt depends on its text, wherever it stands.
        said = role.complete(prompts, [zlib.crc32(prompt.encode()) for prompt in prompts], how)
        answers = []
        for found in said:
            if found.text is None:
                answers.append(Answer(None, found.error, "", found.spent))
                continue
            chosen = read(found.text, options, marker)
            one_hot = None if chosen is None else tuple(float(o == chosen) for o in options)
            reason = "" if one_hot else f"no answer behind '{marker}'"
            answers.append(Answer(one_hot, reason, found.text, found.spent))
        return answers


AT_ONCE = Reading()


def read(text: str, options: Sequence[str], marker: str) -> str | None:
    """The option on the line behind the last `marker`; None where there is none, or more than it.

    "4", "**4**", "4/5" and "4." are four; "4.5", "3 or 4" and "four" are nothing.
    """
    _, found, rest = text.rpartition(marker)
    line = rest.strip().split("\n", 1)[0]
    names = "|".join(map(re.escape, options))
    match = re.fullmatch(rf"[\W_]*({names})(\s*/\s*{re.escape(options[-1])})?[\W_]*", line)
    return match[1] if found and match else None


def _weighed(found: Scored) -> Answer:
    """From log-probabilities up to a constant. A model that has none (NaN) has no answer."""
    if found.logprobs is None:
        return Answer(None, found.error, "", found.spent)
    values = np.array(found.logprobs, np.float64)
    if not np.isfinite(values).all():
        return Answer(None, "the model gives no probabilities", "", found.spent)
    values = np.exp(values - values.max())
    return Answer(tuple((values / values.sum()).tolist()), "", "", found.spent)
