"""Majority vote (self-consistency, arXiv 2203.11171): a completion's score is its answer's share.

Voters are either the samples that one model drew for a prompt, or all samples that several
independently seeded models drew for it (arXiv 2502.01612 takes five models). No gold is involved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from karploop.data.tasks import Task
from karploop.judging.equivalence import Mathematics, classes
from karploop.judging.opinion import Opinion
from karploop.judging.ranking import Group
from karploop.records import Samples, Votes

NO_ANSWER = "no answer"


def vote(
    samples: Samples, task: Task, voters: str, mathematics: Mathematics | None = None
) -> Votes:
    """Share of a row's voters whose answer is the row's, in (0, 1].

    A completion that did not end or holds no answer gets no verdict. It still counts as a voter
    that agrees with nobody: a prompt on which half the voters ramble has no 90% majority.

    Args:
      voters: 'samples' (of the same model, for the same prompt) or 'members' (all models' samples).
      mathematics: tells which answers are the same; None: those that the task writes the same.
    """
    prompts = samples.prompt_id_S.tolist()
    worded = [
        task.normalise(completion) if finished else ""
        for completion, finished in zip(samples.completions, samples.finished_S, strict=True)
    ]
    answers = classes(worded, prompts, mathematics)
    members = [0] * len(samples) if voters == "members" else samples.member_S.tolist()
    scores = shares(answers, list(zip(prompts, members, strict=True)))
    reasons = ["" if answer else NO_ANSWER for answer in answers]
    return Votes(scores=scores, reasons=reasons, answers=answers)


def poll(
    groups: Sequence[Group],
    normalise: Callable[[str], str],
    voters: str,
    mathematics: Mathematics | None = None,
) -> list[list[Opinion]]:
    """`vote` over groups: an opinion on every completion of each."""
    found = []
    for group in groups:
        answers = [*map(normalise, group.completions), *[""] * len(group.cut)]
        answers = classes(answers, [group.number] * len(answers), mathematics)
        members = [*(group.members or [0] * len(group.completions)), *group.cut]
        scores = shares(answers, [0] * len(answers) if voters == "members" else members)
        of_completions = scores[: len(group.completions)]
        found.append([Opinion(s, NO_ANSWER if s is None else "") for s in of_completions])
    return found


def shares(answers: Sequence[str], ballots: Sequence[Hashable]) -> list[float | None]:
    """For each answer, how many of its ballot gave it; None where it is ''."""
    counts: dict[Hashable, Counter] = defaultdict(Counter)
    for ballot, answer in zip(ballots, answers, strict=True):
        counts[ballot][answer] += 1
    return [
        counts[ballot][answer] / counts[ballot].total() if answer else None
        for ballot, answer in zip(ballots, answers, strict=True)
    ]
