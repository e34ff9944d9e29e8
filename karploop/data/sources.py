"""Stages that lay out problems: labelled seed data, held-out sets, and each round's new prompts.

Training and held-out problems are told apart by a hash (`problems.is_held_out`), so they stay
disjoint over rounds, runs and seeds. Held-out sets depend on the task alone, not on the run's
seed: arms and seeds are measured on the same problems.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from karploop.config import Config
from karploop.data.baselines import majority_answer, random_answer_accuracy
from karploop.data.decontaminate import CLEAN, EXACT, NGRAM, QUOTED, find_overlaps
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

BASELINES_FILE, OVERLAPS_FILE = "baselines.json", "overlaps.json"
_BLIND = 256  # training problems from which blind answers are learnt
_FRAME = 1024  # training prompts that tell what all prompts of a task have in common


def held_out_prompts(
    task: Task, config: Config, say: Callable[[str], None] = lambda text: None
) -> list[list[str]]:
    """Up to `evaluate.problems` held-out prompts of each of `evaluate.difficulties`, in order.

    They depend on the task alone. A small space (one-digit sums) has fewer; one with none is left
    out, and said so.

    Raises:
      UserError: there are none at all.
    """
    rng, sets = np.random.default_rng(0), []
    fraction, count = config.task.held_out, config.evaluate.problems
    for difficulty in sorted(set(config.evaluate.difficulties)):
        try:
            sets.append(draw(task, difficulty, count, held_out=True, fraction=fraction, rng=rng))
        except UserError as error:
            say(f"evaluate: difficulty {difficulty} left out: {error}")
    if not sets:
        raise UserError(
            f"no held-out problems of task '{task.name}' at any of 'config.evaluate.difficulties' "
            f"{tuple(config.evaluate.difficulties)}: raise 'config.task.held_out' or name harder "
            "ones"
        )
    return sets


def labelled_prompts(
    task: Task, config: Config, rng: np.random.Generator | None = None
) -> list[str]:
    """Prompts of the problems that come with labels, of difficulty 1 … the seed difficulty.

    In equal numbers for each where there are enough; never a held-out one, nor one that overlaps
    with those. Without `rng` they are the same for every seed of a run.
    """
    if not config.task.seed_problems:
        return []
    prompts = draw_mixture(
        task,
        range(task.min_difficulty, config.task.seed_difficulty + 1),
        config.task.seed_problems,
        held_out=False,
        fraction=config.task.held_out,
        rng=rng or np.random.default_rng(0),
    )
    held_out = [prompt for some in held_out_prompts(task, config) for prompt in some]
    return _clean(task, prompts, held_out, config.task.held_out)[0]


def seed_data(
    context: StageContext,
    *,
    task: Task,
    config: Config,
    prompting: Prompting,
    labelled: Sequence[str] | None,
) -> None:
    """The labelled problems with their gold completions; drawn here unless `labelled` names them.

    Raises:
      UserError: the task has problems without a gold answer.
    """
    if config.task.seed_problems and not task.answered:
        raise UserError(
            f"task '{task.name}' has problems without a gold answer, which the labelled seed data "
            "are made of: give every row one, or start from a published model with "
            "'config.task.seed_problems=0'"
        )
    if labelled is None:
        labelled = labelled_prompts(task, config, context.numpy_rng)
    problems = _with_answers(task, labelled)
    examples = Examples(
        prompts=problems.prompts,
        completions=[prompting.gold(answer) for answer in problems.answers],
        difficulty=problems.difficulty_S,
        source=["seed"] * len(problems),
        row=np.arange(len(problems)),
    )
    context.write_table(EXAMPLES_FILE, examples.to_table())


def held_out_sets(context: StageContext, *, task: Task, config: Config) -> None:
    """Held-out problems with gold answers where there are any, and what a blind answer scores.

    `baselines.json` maps "DIFFICULTY/majority_answer" (the best constant answer) and
    "DIFFICULTY/random_answer" (another problem's gold answer) to accuracies; see `baselines.py`.
    """
    sets = [_with_answers(task, prompts) for prompts in held_out_prompts(task, config, context.say)]
    context.write_table(HELD_OUT_FILE, Problems.concatenate(sets).to_table())
    blind = {}
    if task.answered and task.verifiable:
        for problems in sets:
            difficulty = int(problems.difficulty_S[0])
            found = _blind(task, problems.prompts, difficulty, config.task.held_out)
            blind |= {f"{difficulty}/{name}": value for name, value in found.items()}
    text = json.dumps(blind, indent=1, sort_keys=True) + "\n"
    (context.directory / BASELINES_FILE).write_text(text)


def _blind(task: Task, prompts: list[str], difficulty: int, fraction: float) -> dict[str, float]:
    """Accuracies of answers that are given without reading the problem; none where nothing is left
    to learn them from."""
    rng = np.random.default_rng(0)
    try:
        known = draw(task, difficulty, _BLIND, held_out=False, fraction=fraction, rng=rng)
    except UserError:
        return {}
    answers = [task.answer(prompt) for prompt in known]
    return {
        "majority_answer": majority_answer(known, answers, prompts, task.verify).accuracy,
        "random_answer": random_answer_accuracy(answers, prompts, task.verify, rng, draws=8),
    }


def round_prompts(
    context: StageContext,
    *,
    task: Task,
    difficulties: Sequence[int],
    count: int,
    held_out: float,
    shown: Sequence[str] = (),
) -> None:
    """New prompts, in equal numbers for each difficulty, without answers.

    Never a held-out one, nor one of `shown`, the solved examples that stand before every prompt.
    Those that overlap with the prompts of inputs['held_out'] are dropped and counted, by kind, in
    `overlaps.json`; see `decontaminate.py`.
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
    known = Problems.from_table(context.inputs["held_out"].table(HELD_OUT_FILE)).prompts
    prompts, overlaps = _clean(task, prompts, known, held_out)
    if any(overlaps.values()):
        counts = ", ".join(f"{number} {kind}" for kind, number in overlaps.items())
        context.say(f"prompts: dropped for their overlap with held-out problems: {counts}")
    if not prompts:
        raise UserError(
            f"every prompt of task '{task.name}' at difficulty {tuple(difficulties)} repeats a "
            "held-out one in other words: there is nothing to train on that could be measured"
        )
    difficulty = [task.difficulty(prompt) for prompt in prompts]
    context.write_table(PROMPTS_FILE, pa.table({"difficulty": difficulty, "prompt": prompts}))
    (context.directory / OVERLAPS_FILE).write_text(json.dumps(overlaps, indent=1) + "\n")


def labelled_again(context: StageContext, *, count: int, shown: Sequence[str] = ()) -> None:
    """Prompts of inputs['seed'], drawn without repetition, without their answers and without
    `shown`. They were held apart from the held-out ones when they were drawn."""
    examples = Examples.from_table(context.inputs["seed"].table(EXAMPLES_FILE))
    free = [i for i, prompt in enumerate(examples.prompts) if prompt not in frozenset(shown)]
    if not free:
        raise UserError(
            "'config.generate.problems=labelled' finds no labelled problem but those that are "
            "shown as examples: raise 'config.task.seed_problems'"
        )
    if len(free) < count:
        context.say(f"prompts: only {len(free)} of the {count} wanted are labelled")
    rows = context.numpy_rng.permutation(free)[:count].tolist()
    table = {
        "difficulty": examples.difficulty[rows],
        "prompt": [examples.prompts[i] for i in rows],
    }
    context.write_table(PROMPTS_FILE, pa.table(table))
    overlaps = {kind.replace("-", ""): 0 for kind in (EXACT, QUOTED, NGRAM)}
    (context.directory / OVERLAPS_FILE).write_text(json.dumps(overlaps, indent=1) + "\n")


def _clean(
    task: Task, prompts: list[str], held_out: Sequence[str], fraction: float
) -> tuple[list[str], dict[str, int]]:
    """The prompts without overlap, and how many had one, by kind.

    What a task's prompts have in common is told by many of them, however few are to be cleaned.
    """
    found = find_overlaps(held_out, [*prompts, *_others(task, prompts, fraction)])
    reasons = found.reasons[: len(prompts)]
    clean = [prompt for prompt, reason in zip(prompts, reasons, strict=True) if reason == CLEAN]
    return clean, {kind.replace("-", ""): reasons.count(kind) for kind in (EXACT, QUOTED, NGRAM)}


def _others(task: Task, prompts: list[str], fraction: float) -> list[str]:
    """More prompts of the same difficulties, where `prompts` are few and there are any."""
    if len(prompts) >= _FRAME:
        return []
    difficulties = sorted({task.difficulty(prompt) for prompt in prompts})
    rng, known = np.random.default_rng(0), frozenset(prompts)
    settings = dict(held_out=False, fraction=fraction, rng=rng, exclude=known)
    try:
        return draw_mixture(task, difficulties, _FRAME, **settings)
    except UserError:  # there are no others
        return []


def _with_answers(task: Task, prompts: Sequence[str]) -> Problems:
    return Problems(
        difficulty_S=np.array([task.difficulty(p) for p in prompts], np.int64),
        prompts=list(prompts),
        answers=[task.answer(p) for p in prompts] if task.answered else [""] * len(prompts),
    )
