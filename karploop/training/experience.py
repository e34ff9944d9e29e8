"""The `experience` stage: samples with their advantage over others of their prompt.

Where a teacher says how good each token is, `teaching.py` makes the same.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from karploop.config import ObjectiveConfig, TrainConfig
from karploop.data.prompting import Prompting
from karploop.errors import UserError
from karploop.records import (
    EPISODES_FILE,
    SELECTION_FILE,
    Episodes,
    Opinions,
    Samples,
    Selection,
    Verdicts,
    read_verdicts,
)
from karploop.stages import StageContext
from karploop.training.advantages import COMPARED, dr_grpo, grpo, penalised, rloo
from karploop.training.lessons import units
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Trainer

_ADVANTAGES = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


def experience(
    context: StageContext,
    *,
    trainer: Trainer,
    prompting: Prompting,
    config: ObjectiveConfig,
    train: TrainConfig,
) -> None:
    """Writes `episodes.parquet`: what the filter kept, and what did not end, with advantages.

    All samples of a prompt that have a verdict are what each is compared with, kept or not, one
    model's with one another. A sample that has none, or no other to be compared with, is no
    episode. One that did not end is, where its judge has a verdict on it: that it did not end is
    what is to be learnt.

    Raises:
      UserError: raw rewards are wanted of a judge that gives none.
    """
    samples = Samples.gather(context.inputs)
    verdicts = read_verdicts(context.inputs["verdicts"])
    kept_S = Selection.from_table(context.inputs["selection"].table(SELECTION_FILE)).kept_S
    rewards_S = rewards(verdicts, config.reward)
    with context.progress(len(samples), "samples") as progress:
        if config.kl and config.kl_in == "reward":
            drawn_S = np.array([sum(row) for row in samples.logprobs])
            reference_S = _reference(context, trainer, prompting, config, train, samples)
            rewards_S = penalised(rewards_S, drawn_S, reference_S, config.kl)
        groups_S = samples.prompt_id_S * (1 + samples.member_S.max(initial=0)) + samples.member_S
        found = _ADVANTAGES[config.advantage](rewards_S, groups_S)
        chosen = np.flatnonzero((found.weights_S > 0) & (kept_S | ~samples.finished_S)).tolist()
        told = Counter(reason for reason in found.reasons if reason != COMPARED)
        notes = [f"{len(chosen)} episodes", *(f"{n} with {reason}" for reason, n in told.items())]
        progress.advance(len(samples), note=", ".join(notes))
    advantages = [[found.values_S[i]] * len(samples.tokens[i]) for i in chosen]
    context.write_table(EPISODES_FILE, episodes(context, samples, chosen, advantages).to_table())


def rewards(verdicts: Verdicts, kind: str) -> np.ndarray:
    """rewards_S, NaN where there is no verdict.

    Args:
      kind: score: 0 … 1; raw: what a reward model said before it was squeezed into that.
    """
    if kind == "score":
        return verdicts.score_S
    criteria = [json.loads(c) for c in verdicts.criteria] if isinstance(verdicts, Opinions) else []
    if not any("reward" in found for found in criteria):
        raise UserError(
            "'config.objective.reward=raw' wants the numbers of a reward model, and this judge "
            "gives scores alone: set it to score, or 'config.judge.name' to reward"
        )
    return np.array([found.get("reward") for found in criteria], np.float64)


def _reference(context, trainer, prompting, config, train, samples) -> np.ndarray:
    """The reference's log-probability of each sample: reference_S."""
    texts = units(episodes(context, samples), prompting, config, train.row_length)
    params = trainer.weights.load(context.inputs["reference"])
    found = logprobs_of(texts, functools.partial(trainer.logprobs, params), train)
    return np.array([text.sum(dtype=np.float64) for (text,) in found])


def episodes(
    context: StageContext,
    samples: Samples,
    rows: Sequence[int] | None = None,
    advantages: Sequence[Sequence[float]] | None = None,
) -> Episodes:
    """Episodes of some samples, by their rows (all), with the advantages of their tokens (0)."""
    sources, rows = Samples.origins(context.inputs), range(len(samples)) if rows is None else rows
    if advantages is None:
        advantages = [[0.0] * len(samples.tokens[i]) for i in rows]
    return Episodes(
        prompts=[samples.prompts[i] for i in rows],
        tokens=[samples.tokens[i] for i in rows],
        logprobs=[samples.logprobs[i] for i in rows],
        advantages=advantages,
        difficulty=samples.difficulty_S[rows],
        source=[sources[i][0] for i in rows],
        row=np.array([sources[i][1] for i in rows], np.int64),
    )
