"""Stages that lay out problems: labelled seed data, held-out sets, and each round's new prompts.

Training and held-out problems are told apart by a hash (`problems.is_held_out`), so they stay
disjoint over rounds, runs and seeds. Held-out sets depend on the task alone, not on the run's
seed: arms and seeds are measured on the same problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from karploop.config import TaskConfig
from karploop.data.problems import draw, draw_mixture
from karploop.data.prompting import Prompting
from karploop.data.tasks import Task
from karploop.errors import UserError
from karploop.records import (
    EXAMPLES_FILE,
    HELD_OUT_FILE,
    PROMPTS_FILE,
    Examples,
    Problems,
)
from karploop.stages import StageContext


def labelled_prompts(
    task: Task, config: TaskConfig, rng: np.random.Generator | None = None
) -> list[str]:
    """Prompts of the problems that come with labels, of difficulty 1 … the seed difficulty.

    In equal numbers for each where there are enough; never a held-out one. Without `rng` they are
    the same for every seed of a run.
    """
    return draw_mixture(
        task,
        range(task.min_difficulty, config.seed_difficulty + 1),
        config.seed_problems,
        held_out=False,
        fraction=config.held_out,
        rng=rng or np.random.default_rng(0),
    )


def seed_data(
    context: StageContext,
    *,
    task: Task,
    config: TaskConfig,
    prompting: Prompting,
    labelled: Sequence[str] | None,
) -> None:
    """The labelled problems with their gold completions; drawn here unless `labelled` names them.

    Raises:
      UserError: the task has problems without a gold answer.
    """
    if not task.answered:
        raise UserError(
            f"task '{task.name}' has problems without a gold answer, which the labelled seed data "
            "are made of: give every row one"
        )
    prompts = labelled or labelled_prompts(task, config, context.numpy_rng)
    problems = _with_answers(task, prompts)
    examples = Examples(
        prompts=problems.prompts,
        completions=[prompting.gold(answer) for answer in problems.answers],
        difficulty=problems.difficulty_S,
        source=["seed"] * len(problems),
        row=np.arange(len(problems)),
    )
    context.write_table(EXAMPLES_FILE, examples.to_table())


def held_out_sets(
    context: StageContext, *, task: Task, difficulties: Sequence[int], count: int, held_out: float
) -> None:
    """Up to `count` held-out problems of each difficulty, with gold answers where there are any.

    A small space (one-digit sums) has fewer; one with none is left out, and said so.
    """
    rng = np.random.default_rng(0)  # the sets are the same for every seed
    sets = []
    for difficulty in sorted(set(difficulties)):
        try:
            prompts = draw(task, difficulty, count, held_out=True, fraction=held_out, rng=rng)
        except UserError as error:
            context.say(f"evaluate: difficulty {difficulty} left out: {error}")
            continue
        sets.append(_with_answers(task, prompts))
    if not sets:
        raise UserError(
            f"no held-out problems of task '{task.name}' at any of 'config.evaluate.difficulties' "
            f"{tuple(difficulties)}: raise 'config.task.held_out' or name harder ones"
        )
    context.write_table(HELD_OUT_FILE, Problems.concatenate(sets).to_table())


def round_prompts(
    context: StageContext,
    *,
    task: Task,
    difficulties: Sequence[int],
    count: int,
    held_out: float,
    shown: Sequence[str] = (),
) -> None:
    """New prompts, in equal numbers for each difficulty, without answers; never a held-out one.

    Nor one of `shown`, the solved examples that stand before every prompt.
    """
    prompts = draw_mixture(
        task,
        difficulties,
        count,
        held_out=False,
        fraction=held_out,
        rng=context.numpy_rng,
        exclude=frozenset(shown),
    )
    if len(prompts) < count:
        context.say(f"prompts: only {len(prompts)} of the {count} wanted exist")
    difficulty = [task.difficulty(prompt) for prompt in prompts]
    context.write_table(PROMPTS_FILE, pa.table({"difficulty": difficulty, "prompt": prompts}))


def _with_answers(task: Task, prompts: list[str]) -> Problems:
    return Problems(
        difficulty_S=np.array([task.difficulty(p) for p in prompts]),
        prompts=prompts,
        answers=[task.answer(p) for p in prompts] if task.answered else [""] * len(prompts),
    )
