"""Training workloads: one update, as a training stage makes it, on random tokens.

Rows are full, and every objective goes the way of a stage: records to units, packing, the jitted
step, its metrics on the host. In `sft` and `sft_lora` every token is learnt; a pair of `dpo` is 64
tokens of prompt and 65 of either completion, and the reference reads it in the same call, which a
stage does once for many passes. An update of `grpo` is sampling, advantages of drawn rewards, and a
step on all samples, without a reference, as is the default. What answers one prompt is a row, which
holds the prompt once (`train.share_prompts`). Learning rates are those of the config.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from karploop.benchmark.costs import Texts, as_lora, forward, sampling, training
from karploop.benchmark.measure import clocked
from karploop.benchmark.subject import AsGiven, Subject
from karploop.benchmark.workloads import Asked, Drawing, Work
from karploop.config import LoraConfig, ObjectiveConfig, TrainConfig
from karploop.mesh import to_host
from karploop.records import Contrasts, Episodes, Examples, Record
from karploop.training.advantages import grpo
from karploop.training.lessons import lesson_of, with_reference
from karploop.training.objectives import make_objective
from karploop.training.packing import Unit, pack
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Trainer

_RANK = 16  # of an adapter, where the config has none
_ROWS, _LENGTH, _PAIRS = 8, 128, 4


class _Learner:
    """A trainer and its state, from step to step."""

    def __init__(self, subject: Subject, config: TrainConfig, objective: ObjectiveConfig):
        self.config, self.objective = config, objective
        made = make_objective(objective, longest=config.row_length)
        given = (subject.weights, config.optimizer, config.lora, made)
        self.trainer = Trainer(*given, accumulation=config.accumulation)
        params = subject.load()
        trained, self.frozen = self.trainer.parts.divide(params, jax.random.key(0))
        self.state = self.trainer.start(trained)

    def step(self, lesson: Sequence[Unit]) -> None:
        """One update on all of these, which fit into one batch."""
        c = self.config
        shape = c.rows, c.row_length, c.accumulation, c.share_prompts
        ((batch, taken),) = pack(lesson, iter(range(len(lesson))), *shape)
        assert len(taken) == len(lesson)
        rate = self.config.optimizer.learning_rate
        self.state, metrics = self.trainer.step(self.state, batch, rate, self.frozen)
        to_host(metrics)

    def units(self, rows: Record) -> Sequence[Unit]:
        given = AsGiven(), self.objective, self.config
        return lesson_of(rows, np.ones(len(rows)), *given).units


def imitate(name: str, subject: Subject) -> Work:
    """`sft` and `sft_lora`."""
    subject.check_length(name, _LENGTH)
    config = _stage(subject, _ROWS, _LENGTH, name == "sft_lora")
    learner = _Learner(subject, config, ObjectiveConfig())
    texts = subject.tokens(4, *[_LENGTH + 1] * _ROWS)
    rows = Examples(
        [text[:1] for text in texts], [text[1:] for text in texts], **_origin(_ROWS, "source")
    )

    def run() -> dict[str, float]:
        learner.step(learner.units(rows))
        return {}

    costs = training(subject.shape, Texts(_ROWS, _LENGTH), _ROWS * _LENGTH, config.lora)
    return Work(run, _ROWS * _LENGTH, costs)


def prefer(name: str, subject: Subject) -> Work:
    """`dpo`: parts are the reference's pass and the step."""
    half, row_length = _LENGTH // 2, _shared(_LENGTH // 2, 2, _LENGTH // 2 + 1)
    subject.check_length(name, row_length)
    config = _stage(subject, _PAIRS, row_length, share_prompts=True)
    learner = _Learner(subject, config, ObjectiveConfig(name="dpo"))
    reference = subject.load()  # its own copy: the trained one is donated
    prompts = subject.tokens(5, *[half] * _PAIRS)
    replies = subject.tokens(6, *[half + 1] * 2 * _PAIRS)
    rows = Contrasts(
        prompts,
        replies[::2],
        replies[1::2],
        margin=np.ones(_PAIRS),
        **_origin(_PAIRS, "chosen_source", "rejected_source"),
    )

    def refer() -> list[Unit]:
        lesson = learner.units(rows)
        read = functools.partial(learner.trainer.logprobs, reference)
        return with_reference(lesson, logprobs_of(lesson, read, config), "text")

    def run() -> dict[str, float]:
        lesson, first = clocked(refer)
        _, second = clocked(lambda: learner.step(lesson))
        return {"reference": first, "step": second}

    texts, shape = Texts(_PAIRS, half, 2, half), subject.shape
    costs = [forward(shape, texts.tokens, texts.pairs(shape), texts.predicted)]
    costs += training(shape, texts, texts.predicted, config.lora)
    return Work(run, 2 * _PAIRS * _LENGTH, costs)


def reinforce(name: str, subject: Subject) -> Work:
    """`grpo`: parts are sampling and the step."""
    prompts, samples, length, new = 4, 4, 64, 32
    row_length = _shared(length, samples, new)
    subject.check_length(name, row_length)
    config = _stage(subject, prompts, row_length, share_prompts=True)
    objective = ObjectiveConfig(name="policy_gradient", advantage="grpo")
    learner = _Learner(subject, config, objective)
    wanted = Asked([length] * prompts, [new] * prompts, samples, prompts, (length,))
    drawing = Drawing(name, subject, wanted)
    groups_S, calls = np.repeat(np.arange(prompts), samples), iter(range(1 << 30))

    def learn(found) -> None:
        flat = [completion for of_prompt in found for completion in of_prompt]
        rewards_S = np.random.default_rng(0).random(len(flat))
        advantages_S = grpo(rewards_S, groups_S).values_S.tolist()
        episodes = Episodes(
            [drawing.prompts[i] for i in groups_S],
            [c.tokens for c in flat],
            [c.logprobs for c in flat],
            [[value] * new for value in advantages_S],
            **_origin(len(flat), "source"),
        )
        learner.step(learner.units(episodes))

    def run() -> dict[str, float]:
        found, first = clocked(lambda: drawing(next(calls), learner.state.params))
        _, second = clocked(lambda: learn(found))
        return {"sampling": first, "step": second}

    rows, shape = prompts * samples, subject.shape
    costs = sampling(shape, wanted.lengths, wanted.new, rows, samples)
    texts = Texts(prompts, length, samples, new - 1)
    costs += training(shape, texts, texts.predicted, config.lora)
    return Work(run, rows * new, costs)


def _shared(prompt: int, completions: int, length: int) -> int:
    """Tokens of a row that holds so many completions, stop token included, and their prompt once.

    The prompt's last token is read with each completion, whose last one is not read.
    """
    return prompt - 1 + completions * length


def _stage(
    subject: Subject,
    rows: int,
    row_length: int,
    adapted: bool = False,
    share_prompts: bool = False,
) -> TrainConfig:
    """The config's training stage in the workload's size."""
    given = subject.config.train
    lora = as_lora(given.lora, _RANK) if adapted else LoraConfig()
    return replace(
        given,
        rows=subject.rows(rows),
        row_length=row_length,
        lora=lora,
        share_prompts=share_prompts,
    )


def _origin(count: int, *sources: str) -> dict[str, Any]:
    """Columns of records that say where a row is from, which nothing here reads."""
    rows = {name.replace("source", "row"): np.arange(count) for name in sources}
    texts = {name: ["random"] * count for name in sources}
    return texts | rows | {"difficulty": np.zeros(count, np.int64)}
