"""The `rationalise` stage: prompts without a right completion, asked again with the gold answer.

Rationalisation of STaR (arXiv 2203.14465, algorithm 1): given the answer, a model may write steps
that lead to it where it finds none by itself. The generator sees gold here and nowhere else, and
its completions are judged and filtered as any are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from karploop.config import GenerateConfig
from karploop.data.prompting import Prompting
from karploop.data.tasks import Task
from karploop.mesh import Begun
from karploop.models.weights import Weights
from karploop.records import (
    PROMPTS_FILE,
    SAMPLES_FILE,
    HintedSamples,
    Samples,
    read_verdicts,
)
from karploop.sampling.generate import sampled, tokens_of
from karploop.sampling.sampler import Sampler, batches
from karploop.stages import StageContext


def rationalise(
    context: StageContext,
    *,
    sampler: Sampler,
    weights: Weights,
    prompting: Prompting,
    limit: Callable[[int], int],
    task: Task,
    config: GenerateConfig,
) -> None:
    """Samples from inputs['params'] into `samples.parquet` (HintedSamples).

    Asked are those of inputs['prompts'] of which inputs['gold'] calls none of inputs['samples_0']
    right. The rows are filed under the prompt without its hint, by the prompt's row, and so they
    are learnt; a prompt's samples go by the numbers that follow those of inputs['samples_0'].
    Log-probabilities are those with the hint, and left out: no filter can mistake them for what
    the model thinks of the text by itself.

    Args:
      limit: most tokens of a completion, without its stop token, by the prompt's difficulty.
    """
    prompts = context.inputs["prompts"].table(PROMPTS_FILE).to_pydict()
    rows = _unsolved(context, len(prompts["prompt"]))
    params = weights.load(context.inputs["params"])
    sampling = dict(prompting=prompting, limit=limit, config=config, asked=task.hinted)

    def begin(part: range) -> Begun:
        chosen = [rows[i] for i in part]
        return sampled(context, sampler, params, prompts, chosen, **sampling).then(record)

    def record(columns):
        hinted = [task.hinted(prompt) for prompt in columns["prompts"]]
        found = HintedSamples(**columns, hinted=hinted)
        return replace(
            found,
            sample_S=found.sample_S + config.samples,
            logprobs=[[] for _ in hinted],
            entropy_S=np.full(len(hinted), np.nan),
        ).to_table()

    tables = [HintedSamples.empty().to_table()]  # every prompt may have been solved
    with context.progress(len(rows) * config.samples, "samples") as progress:
        for table in context.chunks(batches(len(rows), config.batch), begin):
            tables.append(table)
            progress.advance(len(table), tokens=tokens_of(table))
    context.write_table(SAMPLES_FILE, pa.concat_tables(tables).combine_chunks())


def _unsolved(context: StageContext, count: int) -> list[int]:
    """Rows of the prompts that have no right completion; no verdict is none."""
    samples = Samples.gather(context.inputs)
    right_S = read_verdicts(context.inputs["gold"]).score_S == 1.0
    solved = set(samples.prompt_id_S[right_S].tolist())
    return [row for row in range(count) if row not in solved]
