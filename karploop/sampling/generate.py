"""The `generate` stage: new completions for a round's prompts, committed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from karploop.config import GenerateConfig
from karploop.data.prompting import Prompting
from karploop.models.weights import Weights
from karploop.records import PROMPTS_FILE, SAMPLES_FILE, Samples
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Sampler, batches
from karploop.stages import StageContext


def generate(
    context: StageContext,
    *,
    sampler: Sampler,
    weights: Weights,
    prompting: Prompting,
    limit: Callable[[int], int],
    config: GenerateConfig,
) -> None:
    """Samples from inputs['params'] on inputs['prompts'] into `samples.parquet` (Samples).

    Args:
      limit: most tokens of a completion, without its stop token, by the prompt's difficulty.
    """
    prompts = context.inputs["prompts"].table(PROMPTS_FILE).to_pydict()
    params = weights.load(context.inputs["params"])
    parts = []
    count = len(prompts["prompt"])

    def sample(rows: range):
        sampling = dict(prompting=prompting, limit=limit, config=config)
        return Samples(**sampled(context, sampler, params, prompts, rows, **sampling)).to_table()

    with context.progress(count * config.samples, "samples") as progress:
        for rows in batches(count, config.batch):
            table = context.chunk(rows, lambda rows=rows: sample(rows))
            parts.append(Samples.from_table(table))
            progress.advance(len(table), tokens=sum(map(len, parts[-1].tokens)))
    context.write_table(SAMPLES_FILE, Samples.concatenate(parts).to_table())


def sampled(
    context: StageContext,
    sampler: Sampler,
    params: Any,
    prompts: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    *,
    prompting: Prompting,
    limit: Callable[[int], int],
    config: GenerateConfig,
    asked: Callable[[str], str] = str,
) -> dict[str, Any]:
    """The columns of Samples for some rows of a table of prompts, at most a batch.

    Args:
      asked: from a prompt to the text that is sampled from in its place.
    """
    completions = sampler.complete(
        params,
        [prompting.prompt(asked(prompts["prompt"][i])) for i in rows],
        list(rows),
        context.key,
        samples=config.samples,
        sampling=Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
        limits=[limit(prompts["difficulty"][i]) for i in rows],
        batch=config.batch,
        decoding=Decoding.of(config),
    )
    ids = np.repeat(np.array(rows), config.samples)
    flat = [c for of_prompt in completions for c in of_prompt]
    ends = [prompting.completion(c.tokens, c.finished) for c in flat]
    return dict(
        prompt_id_S=ids,
        sample_S=np.tile(np.arange(config.samples), len(rows)),
        member_S=np.full(len(flat), context.rng.member),
        difficulty_S=np.array([prompts["difficulty"][i] for i in ids]),
        prompts=[prompts["prompt"][i] for i in ids],
        completions=[text for text, _ in ends],
        finished_S=np.array([finished for _, finished in ends]),
        tokens=[c.tokens for c in flat],
        logprobs=[c.logprobs for c in flat],
        entropy_S=np.array([c.entropy for c in flat]),
    )
