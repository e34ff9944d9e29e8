"""The gold verifier as a judge: it knows the right answers, and its name says so."""

from __future__ import annotations

from collections.abc import Sequence

from karploop.data.tasks import Task
from karploop.judging.opinion import Opinion, Reply
from karploop.records import Samples, Verdicts


def verifier(samples: Samples, task: Task) -> Verdicts:
    """1 where the completion ended and its answer is the gold one, else 0."""
    right = [
        bool(finished) and task.verify(prompt, completion)
        for prompt, completion, finished in zip(
            samples.prompts, samples.completions, samples.finished_S, strict=True
        )
    ]
    return Verdicts(scores=[float(r) for r in right], reasons=[""] * len(right))


def verified(replies: Sequence[Reply], task: Task) -> list[Opinion]:
    """`verifier` over replies, all of which ended."""
    return [Opinion(float(task.verify(prompt, completion))) for prompt, completion in replies]
