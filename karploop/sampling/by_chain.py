"""The `generate` stage where a completion is what a chain makes of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karploop.asking import Role
from karploop.chains.definition import Chain
from karploop.chains.rendering import Templates
from karploop.chains.run import Run, Runner, Settings
from karploop.config import GenerateConfig
from karploop.data.prompting import Prompting
from karploop.data.tokenizer import Tokenizer
from karploop.errors import UserError
from karploop.records import PROMPTS_FILE, SAMPLES_FILE, Samples
from karploop.sampling.sampler import batches
from karploop.stages import Artifact, StageContext


@dataclass(frozen=True)
class ChainSamples(Samples):
    """Samples, each with all that was asked and said on the way to it."""

    steps: list[str]  # JSON: [{step, role, prompt, text}, …]


def generate_by_chain(
    context: StageContext,
    *,
    chain: Chain,
    templates: Templates,
    load: Callable[[Mapping[str, Artifact]], Mapping[str, Role]],
    prompting: Prompting,
    longest: int,
    config: GenerateConfig,
    stop: tuple[str, ...],
) -> None:
    """Takes inputs['prompts'] through the chain, into `samples.parquet` (ChainSamples).

    The policy is asked a prompt as it is in every other round; steps with a template ask in the
    template's words alone. A run that failed, has no output, one that the policy has no tokens
    for, or one that was cut in the step that it is from, did not end. What another model may have
    written has no log-probabilities.

    Args:
      longest: most tokens of an output, and of every step, without a stop token.
      stop: where the policy's answer to the prompt itself ends.
    """
    prompts = context.inputs["prompts"].table(PROMPTS_FILE).to_pydict()
    settings = Settings(
        seed=int(context.numpy_rng.integers(2**31)),
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=longest + 1,
        stop=stop,
    )
    runner = Runner(chain, load(context.inputs), settings, templates)
    parts = []
    count = len(prompts["prompt"])

    def sample(rows: range):
        runs = [
            Run(i * config.samples + k, prompting.asked(text), {"prompt": text})
            for i in rows
            for text in [prompts["prompt"][i]]
            for k in range(config.samples)
        ]
        runner.run(runs)
        return _record(runs, rows, prompts, chain, prompting, longest, config, context.rng.member)

    with context.progress(count * config.samples, "samples") as progress:
        for rows in batches(count, config.batch):
            table = context.chunk(rows, lambda rows=rows: sample(rows).to_table())
            parts.append(ChainSamples.from_table(table))
            progress.advance(len(table), tokens=sum(map(len, parts[-1].tokens)))
    context.write_table(SAMPLES_FILE, ChainSamples.concatenate(parts).to_table())


def _record(
    runs: list[Run],
    rows: range,
    prompts: Mapping[str, Any],
    chain: Chain,
    prompting: Prompting,
    longest: int,
    config: GenerateConfig,
    member: int,
) -> ChainSamples:
    texts = [_output(run, chain, prompting) for run in runs]
    tokens = [_encode(prompting.tokenizer, text) for text in texts]
    ids = np.repeat(np.array(rows), config.samples)
    return ChainSamples(
        prompt_id_S=ids,
        sample_S=np.tile(np.arange(config.samples), len(rows)),
        member_S=np.full(len(runs), member),
        difficulty_S=np.array([prompts["difficulty"][i] for i in ids]),
        prompts=[prompts["prompt"][i] for i in ids],
        completions=[text or "" for text in texts],
        finished_S=np.array(
            [
                ids_of_text is not None and len(ids_of_text) <= longest and run.whole(chain.output)
                for run, ids_of_text in zip(runs, tokens, strict=True)
            ]
        ),
        tokens=[ids_of_text or [] for ids_of_text in tokens],
        logprobs=[[] for _ in runs],
        entropy_S=np.full(len(runs), np.nan),
        steps=[json.dumps(run.steps, ensure_ascii=False) for run in runs],
    )


def _encode(tokenizer: Tokenizer, text: str | None) -> list[int] | None:
    """None where there is no text, or one that the tokenizer cannot write."""
    try:
        return None if text is None else tokenizer.encode(text)
    except UserError:
        return None


def _output(run: Run, chain: Chain, prompting: Prompting) -> str | None:
    """What the run came to, written as the policy writes an answer."""
    value = None if run.error else run.variables[chain.output]
    if value is None:
        return None
    return prompting.gold(value if isinstance(value, str) else json.dumps(value))
