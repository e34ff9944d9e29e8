"""Majority vote (self-consistency, arXiv 2203.11171): a completion's score is its answer's share.

Voters are either the samples that one model drew for a prompt, or all samples that several
independently seeded models drew for it (arXiv 2502.01612 takes five models). No gold is involved.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from karploop.data.tasks import Task
from karploop.records import Samples, Verdicts


def vote(samples: Samples, task: Task, voters: str) -> Verdicts:
    """Share of a row's voters whose answer is the row's, in (0, 1].

    A completion that did not end or holds no answer gets no verdict. It still counts as a voter
    that agrees with nobody: a prompt on which half the voters ramble has no 90% majority.

    Args:
      voters: 'samples' (of the same model, for the same prompt) or 'members' (all models' samples).
    """
    answers = [
        task.normalise(completion) if finished else ""
        for completion, finished in zip(samples.completions, samples.finished_S, strict=True)
    ]
    members = [0] * len(samples) if voters == "members" else samples.member_S.tolist()
    ballots = list(zip(samples.prompt_id_S.tolist(), members, strict=True))
    counts: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for ballot, answer in zip(ballots, answers, strict=True):
        counts[ballot][answer] += 1
    scores = [
        counts[ballot][answer] / counts[ballot].total() if answer else None
        for ballot, answer in zip(ballots, answers, strict=True)
    ]
    return Verdicts(scores=scores, reasons=["" if a else "no answer" for a in answers])
