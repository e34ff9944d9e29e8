"""Stages that lay out problems: labelled seed data, held-out sets, and each round's new prompts.

Training and held-out problems are told apart by a hash (`problems.is_held_out`), so they stay
disjoint over rounds, runs and seeds. Held-out sets depend on the task alone, not on the run's
seed: arms and seeds are measured on the same problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from karploop.data.problems import draw, draw_mixture
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


def seed_data(
    context: StageContext, *, task: Task, difficulty: int, count: int, held_out: float
) -> None:
    """Labelled problems of difficulty 1 … `difficulty`, in equal numbers where there are enough.

    Raises:
      UserError: the task has problems without a gold answer.
    """
    if not task.answered:
        raise UserError(
            f"task '{task.name}' has problems without a gold answer, which the labelled seed data "
            "are made of: give every row one"
        )
    prompts = draw_mixture(
        task,
        range(task.min_difficulty, difficulty + 1),
        count,
        held_out=False,
        fraction=held_out,
        rng=context.numpy_rng,
    )
    problems = _with_answers(task, prompts)
    examples = Examples(
        prompts=problems.prompts,
        completions=problems.answers,
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
    context: StageContext, *, task: Task, difficulties: Sequence[int], count: int, held_out: float
) -> None:
    """New prompts, in equal numbers for each difficulty, without answers; never a held-out one."""
    prompts = draw_mixture(
        task, difficulties, count, held_out=False, fraction=held_out, rng=context.numpy_rng
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
