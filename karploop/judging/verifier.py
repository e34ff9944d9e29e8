"""The gold verifier as a judge: it knows the right answers, and its name says so."""

from __future__ import annotations

from collections.abc import Sequence

from karploop.data.tasks import Task
from karploop.judging.opinion import Opinion, Reply
from karploop.records import Samples, Verdicts


def verifier(samples: Samples, task: Task) -> Verdicts:
    """1 where the completion ended and its answer is the gold one, else 0.

    A completion on which the task's scorer breaks down has no verdict.
    """
    rows = zip(samples.prompts, samples.completions, samples.finished_S, strict=True)
    found = [task.verdict(p, c) if finished else (False, "") for p, c, finished in rows]
    return Verdicts([_score(right) for right, _ in found], [reason for _, reason in found])


def verified(replies: Sequence[Reply], task: Task) -> list[Opinion]:
    """`verifier` over replies, all of which ended."""
    found = [task.verdict(prompt, completion) for prompt, completion in replies]
    return [Opinion(_score(right), reason) for right, reason in found]


def _score(right: bool | None) -> float | None:
    return None if right is None else float(right)
