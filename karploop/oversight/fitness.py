"""The `fitness` stage: is the judge at least as capable as the model that it judges?

Both are measured on the same labelled problems before the policy trains on the judge's word. The
policy answers each of them once. The judge is shown the gold answer and a wrong one, the policy's
own where that is wrong, else the gold answer to another problem, and is right where it scores the
gold answer higher. Which is which it is not told, and no filter reads what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from karploop.data.prompting import Prompting
from karploop.data.tasks import Task
from karploop.judging.model_judge import ModelJudge, Roles
from karploop.judging.ranking import Group
from karploop.models.weights import Weights
from karploop.records import EXAMPLES_FILE, Examples
from karploop.reporting.statistics import wilson
from karploop.sampling.distributions import Sampling
from karploop.sampling.sampler import Sampler, batches
from karploop.stages import Artifact, StageContext

FITNESS_FILE = "fitness.json"


@dataclass(frozen=True)
class Fitness:
    """What the two got right.

    Attributes:
      problems: how many both were asked.
      policy: share that the policy answers right.
      judge: share of those that the judge has a verdict on, where it prefers the gold answer; a tie
        is half. None: it has none on any.
      judge_low: lower end of its 95% interval (Wilson).
      coverage: share of the problems that the judge has a verdict on.
    """

    problems: int
    policy: float
    judge: float | None
    judge_low: float | None
    coverage: float

    @property
    def objection(self) -> str:
        """Why the judge is not fit; empty if it is."""
        if self.judge is None:
            return f"the judge has no verdict on any of {self.problems} labelled problems"
        if self.judge_low <= 0.5:
            return (
                f"the judge tells right from wrong in {self.judge:.0%} of {self.problems} cases, "
                f"which may be chance (95% interval from {self.judge_low:.0%})"
            )
        if self.judge < self.policy:
            return (
                f"the judge is right in {self.judge:.0%} of {self.problems} cases and the policy "
                f"in {self.policy:.0%}"
            )
        return ""

    def metrics(self) -> dict[str, float | None]:
        """As they stand beside a round's others."""
        return {
            "fitness/policy": self.policy,
            "fitness/judge": self.judge,
            "fitness/coverage": self.coverage,
        }


def fitness(
    context: StageContext,
    *,
    sampler: Sampler,
    weights: Weights,
    prompting: Prompting,
    limit: Callable[[int], int],
    task: Task,
    judge: ModelJudge,
    load: Callable[[Mapping[str, Artifact]], Roles],
    ranking: str,
    seed: int,
    count: int,
    temperature: float,
    batch: int,
) -> None:
    """Writes `fitness.json` from inputs['params'] and labelled problems, inputs['seed'].

    Args:
      count: most problems.
      temperature, batch: of the policy's answers.
    """
    problems = Examples.from_table(context.inputs["seed"].table(EXAMPLES_FILE))
    order = context.numpy_rng.permutation(len(problems)).tolist()
    rows = [i for i in order if problems.prompts[i] not in prompting.shown][:count]
    prompts = [problems.prompts[i] for i in rows]
    with context.progress(len(rows), "problems") as progress:
        params, answers = weights.load(context.inputs["params"]), []
        for part in batches(len(rows), batch):
            completions = sampler.complete(
                params,
                [prompting.prompt(prompts[i]) for i in part],
                list(part),
                context.key,
                samples=1,
                sampling=Sampling(temperature),
                limits=[limit(int(problems.difficulty[rows[i]])) for i in part],
                batch=batch,
            )
            answers += [prompting.completion(c.text, c.finished) for (c,) in completions]
        right = [e and task.verify(p, text) for p, (text, e) in zip(prompts, answers, strict=True)]
        gold = [problems.completions[i] for i in rows]
        groups = [
            Group(i, prompt, (gold[i], wrong))
            for i, prompt in enumerate(prompts)
            if (wrong := _wrong(i, answers[i], right[i], gold, task)) is not None
        ]
        found = judge.judge(groups, load(context.inputs), ranking, seed)
        progress.advance(len(rows))
    pairs = [(one.score, two.score) for one, two in found]
    result = measured(right, pairs)
    (context.directory / FITNESS_FILE).write_text(json.dumps(vars(result), indent=1) + "\n")


def _wrong(
    i: int, answer: tuple[str, bool], right: bool, gold: Sequence[str], task: Task
) -> str | None:
    """A wrong completion of problem `i`: the policy's, or the gold one of the next that differs."""
    text, ended = answer
    if ended and not right and text.strip():
        return text
    others = (gold[(i + k) % len(gold)] for k in range(1, len(gold)))
    return next((o for o in others if task.normalise(o) != task.normalise(gold[i])), None)


def measured(right: Sequence[bool], pairs: Sequence[tuple[float | None, float | None]]) -> Fitness:
    """From the policy's answers, and the judge's scores of a gold and a wrong one each."""
    known = [(one, two) for one, two in pairs if one is not None and two is not None]
    wins = [1.0 if one > two else 0.5 if one == two else 0.0 for one, two in known]
    share = float(np.mean(wins)) if wins else None
    return Fitness(
        problems=len(right),
        policy=float(np.mean(right)) if right else 0.0,
        judge=share,
        judge_low=None if share is None else wilson(share, len(wins))[0],
        coverage=len(known) / len(pairs) if pairs else 0.0,
    )
