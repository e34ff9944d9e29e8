"""What a model scores on a task without having read the problem.

An accuracy means little before it is compared with these: on a task with few answers a constant
one may be right half of the time, and a lenient verifier may take nearly anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from karploop.errors import UserError

Verify = Callable[[str, str], bool]  # (prompt, completion) → right, such as `Task.verify`


@dataclass(frozen=True)
class Constant:
    """The best constant answer, and the share of held-out problems to which it is right."""

    answer: str
    accuracy: float


def majority_answer(
    training_prompts: Sequence[str],
    training_answers: Sequence[str],
    prompts: Sequence[str],
    verify: Verify,
    *,
    candidates: int = 8,
) -> Constant:
    """One answer to everything: chosen on training problems, measured on held-out ones.

    The `candidates` most frequent training answers are compared by `verify` on the training
    problems, because a lenient verifier may take an answer that is not the most frequent for more
    of them. The first seen wins a tie.

    Args:
      training_prompts: P prompts.
      training_answers: their P gold answers.
      prompts: held-out prompts.
      verify: whether a completion is right; called (candidates · P + len(prompts)) times at most.

    Raises:
      UserError: there are no training problems, or no held-out ones.
    """
    _check(training_answers, prompts)
    frequent = [answer for answer, _ in Counter(training_answers).most_common(candidates)]
    if len(frequent) > 1:
        # `max` returns the first of equals, and `most_common` keeps the order of equals.
        best = max(frequent, key=lambda answer: _accuracy(training_prompts, answer, verify))
    else:
        best = frequent[0]
    return Constant(best, _accuracy(prompts, best, verify))


def random_answer_accuracy(
    training_answers: Sequence[str],
    prompts: Sequence[str],
    verify: Verify,
    rng: np.random.Generator,
    *,
    draws: int = 1,
) -> float:
    """Share right when each problem gets the gold answer of a random training problem.

    This is what knowing the form of an answer is worth.

    Args:
      training_answers: gold answers to draw from; a frequent one is drawn as often as it occurs.
      prompts: held-out prompts.
      draws: answers tried for each prompt, at least 1; more make the estimate steadier.

    Raises:
      UserError: there are no training problems, or no held-out ones.
    """
    _check(training_answers, prompts)
    drawn_PxD = rng.integers(len(training_answers), size=(len(prompts), draws))
    right = sum(
        verify(prompt, training_answers[i])
        for prompt, drawn_D in zip(prompts, drawn_PxD.tolist(), strict=True)
        for i in drawn_D
    )
    return right / drawn_PxD.size


def _accuracy(prompts: Sequence[str], answer: str, verify: Verify) -> float:
    return sum(verify(prompt, answer) for prompt in prompts) / len(prompts)


def _check(training_answers: Sequence[str], prompts: Sequence[str]) -> None:
    if not training_answers or not prompts:
        raise UserError("baselines need at least one training and one held-out problem")
