"""The `experience` stage with a teacher: what it says of each token that the policy sampled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from karploop.config import ObjectiveConfig, TrainConfig
from karploop.data.prompting import Prompting
from karploop.records import EPISODES_FILE, SELECTION_FILE, Samples, Selection
from karploop.stages import Artifact, StageContext
from karploop.training.distillation import reverse_kl_advantages
from karploop.training.experience import episodes
from karploop.training.lessons import units
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Trainer


def teach(
    context: StageContext,
    *,
    trainer: Trainer,
    prompting: Prompting,
    config: ObjectiveConfig,
    train: TrainConfig,
    teacher: Callable[[Mapping[str, Artifact]], Any],
) -> None:
    """Writes `episodes.parquet`: what the filter kept, and what did not end.

    The advantage of a token is the teacher's log-probability of it minus the sampler's (see
    `reverse_kl_advantages`), so that a sample needs no verdict and no other to be compared with.
    The teacher reads what the policy read, examples included.

    Args:
      teacher: from the inputs to its parameters.
    """
    samples = Samples.gather(context.inputs)
    kept_S = Selection.from_table(context.inputs["selection"].table(SELECTION_FILE)).kept_S
    chosen = np.flatnonzero(kept_S | ~samples.finished_S).tolist()
    with context.progress(len(samples), "samples") as progress:
        texts = units(episodes(context, samples, chosen), prompting, config, train.row_length)
        read = functools.partial(trainer.teacher_logprobs, teacher(context.inputs))
        found = [logprobs_X for (logprobs_X,) in logprobs_of(texts, read, train)]
        drawn = [samples.logprobs[i] for i in chosen]
        drawn_T, found_T = (
            np.array([*itertools.chain(*rows)], np.float32) for rows in (drawn, found)
        )
        advantages_T = np.asarray(reverse_kl_advantages(drawn_T, found_T), np.float64)
        distance = f", {-advantages_T.mean():.3f} nats a token from the teacher" if chosen else ""
        progress.advance(len(samples), note=f"{len(chosen)} episodes{distance}")
    each = iter(advantages_T.tolist())
    advantages = [list(itertools.islice(each, len(row))) for row in drawn]
    made = episodes(context, samples, chosen, advantages)
    context.write_table(EPISODES_FILE, made.to_table())
