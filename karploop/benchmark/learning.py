"""Training workloads: one update, as a training stage makes it, on random tokens.

Rows are full, and every objective goes the way of a stage: records to units, packing, the jitted
step, its metrics on the host. In `sft` and `sft_lora` every token is learnt; a pair of `dpo` is 64
tokens of prompt and 65 of either completion, and the reference reads it in the same call, which a
stage does once for many passes. An update of `grpo` is sampling, advantages of drawn rewards, and a
step on all samples, without a reference, as is the default. Learning rates are those of the config.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from karploop.benchmark.costs import as_lora, sampling, scoring, training
from karploop.benchmark.subject import AsGiven, Subject
from karploop.benchmark.workloads import Asked, Drawing, Work
from karploop.config import LoraConfig, ObjectiveConfig, TrainConfig
from karploop.mesh import to_host
from karploop.records import Contrasts, Episodes, Examples
from karploop.training.advantages import grpo
from karploop.training.lessons import units, with_reference
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

    def step(self, lesson: list[Unit]) -> None:
        """One update on all of these, which fit into one batch."""
        shape = self.config.rows, self.config.row_length, self.config.accumulation
        ((batch, taken),) = pack(lesson, iter(range(len(lesson))), *shape)
        assert len(taken) == len(lesson)
        rate = self.config.optimizer.learning_rate
        self.state, metrics = self.trainer.step(self.state, batch, rate, self.frozen)
        to_host(metrics)

    def units(self, rows) -> list[Unit]:
        return units(rows, AsGiven(), self.objective, self.config.row_length)


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

    costs = training(subject.shape, _ROWS, _LENGTH, _ROWS * _LENGTH, config.lora)
    return Work(run, _ROWS * _LENGTH, costs)


def prefer(name: str, subject: Subject) -> Work:
    """`dpo`: parts are the reference's pass and the step."""
    subject.check_length(name, _LENGTH)
    config, half = _stage(subject, 2 * _PAIRS, _LENGTH), _LENGTH // 2
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
        lesson, first = _clocked(refer)
        _, second = _clocked(lambda: learner.step(lesson))
        return {"reference": first, "step": second}

    texts, predicted = 2 * _PAIRS, 2 * _PAIRS * (half + 1)
    costs = scoring(subject.shape, texts, _LENGTH)
    costs += training(subject.shape, texts, _LENGTH, predicted, config.lora)
    return Work(run, texts * _LENGTH, costs)


def reinforce(name: str, subject: Subject) -> Work:
    """`grpo`: parts are sampling and the step."""
    prompts, samples, length, new = 4, 4, 64, 32
    subject.check_length(name, length + new)
    config = _stage(subject, prompts * samples, length + new)
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
        found, first = _clocked(lambda: drawing(next(calls), learner.state.params))
        _, second = _clocked(lambda: learn(found))
        return {"sampling": first, "step": second}

    rows, shape = prompts * samples, subject.shape
    costs = sampling(shape, wanted.lengths, wanted.new, rows, samples)
    costs += training(shape, rows, length + new - 1, rows * new, config.lora)
    return Work(run, rows * new, costs)


def _stage(subject: Subject, rows: int, row_length: int, adapted: bool = False) -> TrainConfig:
    """The config's training stage in the workload's size."""
    lora = as_lora(subject.config.train.lora, _RANK) if adapted else LoraConfig()
    rows = subject.rows(rows)
    return replace(subject.config.train, rows=rows, row_length=row_length, lora=lora)


def _origin(count: int, *sources: str) -> dict[str, Any]:
    """Columns of records that say where a row is from, which nothing here reads."""
    rows = {name.replace("source", "row"): np.arange(count) for name in sources}
    texts = {name: ["random"] * count for name in sources}
    return texts | rows | {"difficulty": np.zeros(count, np.int64)}


def _clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = function()
    return found, time.perf_counter() - started
