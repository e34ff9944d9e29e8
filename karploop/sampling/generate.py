"""The `generate` stage: new completions for a round's prompts, committed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karploop.config import GenerateConfig
from karploop.data.prompting import Prompting
from karploop.mesh import Begun
from karploop.models.weights import Weights
from karploop.records import PROMPTS_FILE, SAMPLES_FILE, Samples
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Completion, Sampler, batches
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
    how = dict(samples=config.samples, sampling=Sampling.of(config), decoding=Decoding.of(config))
    params = weights.load(
        context.inputs["params"], meanwhile=lambda: sampler.lower_decode(config.batch, **how)
    )
    tables = []
    count = len(prompts["prompt"])

    def begin(rows: range) -> Begun:
        sampling = dict(prompting=prompting, limit=limit, config=config)
        begun = sampled(context, sampler, params, prompts, rows, **sampling)
        return begun.then(lambda columns: Samples(**columns).to_table())

    with context.progress(count * config.samples, "samples") as progress:
        for table in context.chunks(batches(count, config.batch), begin):
            tables.append(table)
            progress.advance(len(table), tokens=tokens_of(table))
    context.write_table(SAMPLES_FILE, pa.concat_tables(tables).combine_chunks())


def tokens_of(table: pa.Table) -> int:
    """Sampled tokens in a table of Samples."""
    return pc.sum(pc.list_value_length(table.column("tokens"))).as_py() or 0


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
) -> Begun[dict[str, Any]]:
    """The columns of Samples for some rows of a table of prompts, at most a batch.

    Args:
      asked: from a prompt to the text that is sampled from in its place.
    """
    limits = {d: limit(d) for d in {prompts["difficulty"][i] for i in rows}}
    begun = sampler.begin(
        params,
        [prompting.prompt(asked(prompts["prompt"][i])) for i in rows],
        list(rows),
        context.key,
        samples=config.samples,
        sampling=Sampling.of(config),
        limits=[limits[prompts["difficulty"][i]] for i in rows],
        batch=config.batch,
        decoding=Decoding.of(config),
    )

    def columns(completions: list[list[Completion]]) -> dict[str, Any]:
        ids = np.repeat(np.array(rows), config.samples)
        flat = [c for of_prompt in completions for c in of_prompt]
        ends = [prompting.completion(c.text, c.finished) for c in flat]
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

    return begun.then(columns)
