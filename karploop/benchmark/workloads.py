"""Sampling and scoring workloads: what is called, on what, and what it costs at least.

They call the sampler that a loop, `experiments.generate` and `experiments.score` call, on random
tokens. With random weights a model rarely stops, with real ones early, so here no token ends a
completion: each gets exactly as many as the workload asks for, and a call that returns another
number fails. The output lengths of `w4` are geometric with mean 64, drawn from the config's seed
and cut at 256; prompts are as unequal. There are 16 slots: as one is done, the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from karploop.benchmark.costs import Cost, sampling, scoring
from karploop.benchmark.subject import Subject
from karploop.errors import RunFailed
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Completion, Sampler

NO_STOP = (-1,)  # is no token's number
Run = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Work:
    """A workload, ready to be timed.

    Attributes:
      run: does it once; returns seconds of its parts, if it has any.
      tokens: that its speed is told in: new ones of sampling, else those of the texts that are
        read, of each with its prompt.
      costs: of each program, or step of its loop, one after the other.
    """

    run: Run
    tokens: int
    costs: list[Cost]


@dataclass(frozen=True)
class Asked:
    """Prompts, and how much is wanted of each.

    Attributes:
      lengths, new: tokens of each prompt and of each of its completions.
      slots: prompts that are sampled from at a time.
      buckets: prompt lengths to compile for.
    """

    lengths: Sequence[int]
    new: Sequence[int]
    samples: int
    slots: int
    buckets: Sequence[int]


def asked(name: str, seed: int) -> Asked:
    """What a sampling workload asks for."""
    if name == "w4":
        rng = np.random.default_rng([seed, 4])
        lengths = rng.integers(16, 513, 64).tolist()
        new = np.minimum(rng.geometric(1 / 64, 64), 256).tolist()
        return Asked(lengths, new, 1, 16, (64, 128, 256, 512))
    prompts, length, samples, new = {
        "w1": (32, 64, 1, 64),
        "w2": (1, 64, 1, 128),
        "w3": (8, 256, 8, 64),
    }[name]
    return Asked([length] * prompts, [new] * prompts, samples, prompts, (length,))


class Drawing:
    """A sampler for what is asked, and its calls."""

    def __init__(
        self, name: str, subject: Subject, wanted: Asked, params: Any = None, room: int = 0
    ):
        """Args:
        params: what samples; None: what each call is given.
        room: new tokens to compile for, at least; the most wanted, if that is more.
        """
        self._name, self._wanted, self._params = name, wanted, params
        self._prompts = subject.tokens(1, *wanted.lengths)
        self._batch = subject.rows(len(wanted.lengths))
        decoding = Decoding(subject.rows(wanted.slots))
        self._how = dict(samples=wanted.samples, sampling=Sampling(), decoding=decoding)
        start = 0 if subject.tokenizer.bos_id is None else 1  # the sampler makes room for one
        self._sampler = Sampler(
            subject.weights,
            subject.tokenizer,
            prompt_length=[length - start for length in wanted.buckets],
            completion_length=max(room, *wanted.new) - 1,
            stop_ids=NO_STOP,
        )

    def lower(self) -> jax.stages.Lowered:
        """The program that calls run."""
        return self._sampler.lower_decode(
            self._batch, longest=max(map(len, self._prompts)), **self._how
        )

    def __call__(self, call: int, params: Any = None) -> list[list[Completion]]:
        """The completions of all prompts; other random numbers in each call."""
        found = self._sampler.complete(
            self._params if params is None else params,
            self._prompts,
            range(len(self._prompts)),
            jax.random.key(call),
            limits=[new - 1 for new in self._wanted.new],
            batch=self._batch,
            **self._how,
        )
        self._check(found)
        return found

    @property
    def prompts(self) -> list[list[int]]:
        return self._prompts

    def _check(self, found: list[list[Completion]]) -> None:
        for wanted, completions in zip(self._wanted.new, found, strict=True):
            lengths = {len(c.tokens) for c in completions}
            if lengths != {wanted}:
                raise RunFailed(
                    f"the workload '{self._name}' got completions of {sorted(lengths)} tokens "
                    f"where {wanted} were asked for"
                )


def draw(name: str, subject: Subject) -> Work:
    """`w1` … `w4`."""
    wanted = asked(name, subject.config.seed)
    pairs = zip(wanted.lengths, wanted.new, strict=True)
    subject.check_length(name, max(length + new for length, new in pairs))
    drawing, calls = Drawing(name, subject, wanted, subject.load()), iter(range(1 << 30))

    def run() -> dict[str, float]:
        drawing(next(calls))
        return {}

    rows = wanted.slots * wanted.samples
    costs = sampling(subject.shape, wanted.lengths, wanted.new, rows, wanted.samples)
    return Work(run, wanted.samples * sum(wanted.new), costs)


def rate(name: str, subject: Subject) -> Work:
    """`score` and `score_prefix`."""
    rows, prefix, length = {"score": (64, 0, 256), "score_prefix": (64, 192, 64)}[name]
    subject.check_length(name, prefix + length)
    texts = subject.tokens(2, *[length] * rows)
    start = 0 if prefix or subject.tokenizer.bos_id is None else 1
    sampler = Sampler(
        subject.weights,
        subject.tokenizer,
        prompt_length=length - 1 - start,
        completion_length=0,
        prefix=subject.tokens(3, prefix)[0],
    )
    params = subject.load()

    def run() -> dict[str, float]:
        nothing = [[]] * rows
        found = sampler.score(params, nothing, texts, subject.rows(rows), stop=False)
        assert [len(row) for row in found] == [length] * rows
        return {}

    tokens = prefix + rows * length
    return Work(run, tokens, scoring(subject.shape, rows, length, prefix))
