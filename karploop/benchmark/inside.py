"""Sampling inside a loop, beside the sampler alone: what the stage around it costs."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from karploop import curriculum
from karploop.benchmark.measure import clocked
from karploop.bindings import Bindings
from karploop.config import Config
from karploop.errors import RunFailed, UserError
from karploop.loop import BASE
from karploop.machinery import prepare
from karploop.records import PROMPTS_FILE, SAMPLES_FILE, Samples
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import batches
from karploop.stages import Stages
from karploop.store import Store

Tokens = list[list[int]]


def sampling_in_loop(config: Config, repeats: int) -> dict[str, Any]:
    """Runs a loop's base, and of `repeats` rounds, after one to warm up, prompts and `generate`.

    The stage runs as in a loop: found missing in the store, read, sampled, packed, written, hashed
    and committed. Then the sampler alone is asked for the same prompts, whose tokens and
    parameters it is given, in the same batches with the same key, so that it writes the same
    tokens. All rounds sample from the base at the first round's difficulties.

    Returns:
      seconds: of the stage in each round.
      parts: `stage`, and `sampler` alone, seconds in each of these rounds.
      tokens: of all of these rounds, stop tokens included.
      tokens_per_second, alone_per_second: medians over the rounds, of the stage and of the sampler.
      of_alone: median of the former over the latter.

    Raises:
      UserError: a config whose completions come from a chain.
      RunFailed: the two did not write the same.
    """
    machinery = prepare(config)
    if machinery.chain:
        raise UserError(
            f"the completions of '{config.name}' come from the chain "
            f"'{config.generate.chain}', and not from the sampler alone: name another --loop"
        )
    with tempfile.TemporaryDirectory() as workdir:
        store = Store(workdir)
        store.open()
        whole = Bindings(machinery, Stages(store, Progress(rounds=repeats + 1)))
        base, reach = whole.at(BASE).base(0), curriculum.first(config)
        rounds = []
        for index in range(repeats + 1):
            loop = whole.at(index)
            prompts = loop.prompts(index, reach)
            staged, inside = clocked(lambda: loop.generate(index, 0, prompts, base, [base]))  # noqa: B023
            found = Samples.from_table(staged.table(SAMPLES_FILE)).tokens
            asked = prompts.table(PROMPTS_FILE).to_pydict()
            alone, outside = _alone(machinery, asked, base, Rng(config.seed, 0, index))
            if found != alone:
                raise RunFailed("the sampler alone wrote other tokens than the stage 'generate'")
            rounds.append((inside, outside, sum(map(len, found))))
    stage, sampler, tokens = (list(column) for column in zip(*rounds[1:], strict=True))
    of_stage, of_sampler = np.array(stage), np.array(sampler)
    return {
        "seconds": stage,
        "parts": {"stage": stage, "sampler": sampler},
        "tokens": sum(tokens),
        "tokens_per_second": float(np.median(tokens / of_stage)),
        "alone_per_second": float(np.median(tokens / of_sampler)),
        "of_alone": float(np.median(of_sampler / of_stage)),
    }


def _alone(machinery, prompts: dict[str, list], base, rng: Rng) -> tuple[Tokens, float]:
    """Tokens of each sample, and the seconds that the sampler took for them."""
    config, policy = machinery.config.generate, machinery.policy
    texts = [policy.prompting.prompt(text) for text in prompts["prompt"]]
    limits = [policy.limit(machinery.task, difficulty) for difficulty in prompts["difficulty"]]
    params, key = machinery.weights.load(base), rng.key("generate")

    def sample() -> list:
        return [
            completions
            for rows in batches(len(texts), config.batch)
            for completions in machinery.sampler.complete(
                params,
                [texts[i] for i in rows],
                list(rows),
                key,
                samples=config.samples,
                sampling=Sampling.of(config),
                limits=[limits[i] for i in rows],
                batch=config.batch,
                decoding=Decoding.of(config),
            )
        ]

    found, seconds = clocked(sample)
    return [c.tokens for of_prompt in found for c in of_prompt], seconds
