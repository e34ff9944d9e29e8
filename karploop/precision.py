"""How far sampling with smaller caches and weights is from the model itself."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from karploop.compiling import command_mesh
from karploop.data.rows import located_rows
from karploop.jobs import GenerateJob, check_job
from karploop.offline import lengths_for, read_prompt, room_for
from karploop.reporting.progress import Progress
from karploop.reporting.statistics import mean_interval
from karploop.reporting.tables import text_table
from karploop.roles.local import LocalModel
from karploop.sampling.distributions import Sampling
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Sampler, batches

WAYS = (
    Decoding(),
    Decoding(cache="bfloat16"),
    Decoding(cache="int8"),
    Decoding(weights="int8"),
    Decoding(cache="int8", weights="int8"),
)


def measure(job: GenerateJob, source: str, progress: Progress) -> dict[Decoding, list[np.ndarray]]:
    """Of each way to decode and row: what sampling says of its tokens less what the model says.

    Returns:
      nats_T of each row's completion.

    Raises:
      UserError: anything wrong with model, rows or settings, before anything is compiled.
    """
    check_job(job)
    model = LocalModel.describe(job.model, dtype=job.dtype)
    prompts = [read_prompt(model, row, where) for where, row in located_rows(source)]
    mesh = command_mesh({"--batch": job.batch})
    weights, params = model.load(mesh)
    sampler = Sampler(
        weights,
        model.tokenizer,
        prompt_length=lengths_for(prompts),
        completion_length=job.max_new_tokens - 1,
    )

    def of_batch(part: range, way: Decoding) -> list[np.ndarray]:
        texts = [prompts[i] for i in part]
        drawn = sampler.complete(
            params,
            texts,
            list(part),
            jax.random.key(job.seed),
            samples=1,
            sampling=Sampling(job.temperature),
            limits=[room_for(model, text, job.max_new_tokens) - 1 for text in texts],
            batch=job.batch,
            decoding=way,
        )
        tokens = [completion.tokens for (completion,) in drawn]
        expected = sampler.score(params, texts, tokens, job.batch, stop=False)
        return [
            np.subtract(completion.logprobs, logprobs_T)
            for (completion,), logprobs_T in zip(drawn, expected, strict=True)
        ]

    found: dict[Decoding, list[np.ndarray]] = {way: [] for way in WAYS}
    with progress.stage(None, "precision", len(WAYS) * len(prompts), "rows") as stage:
        for way, rows in found.items():
            for part in batches(len(prompts), job.batch):
                rows += of_batch(part, way)
                stage.advance(len(part), tokens=sum(map(len, rows[-len(part) :])))
    return found


def report(found: dict[Decoding, list[np.ndarray]]) -> str:
    """A table: mean of rows' means, as tokens of a row are no independent measurements."""

    def line(way: Decoding, rows: list[np.ndarray]) -> list[Any]:
        mean = mean_interval([float(row_T.mean()) for row_T in rows])
        every = np.abs(np.concatenate(rows))
        interval = f"{mean.low:.5f} to {mean.high:.5f}"
        sizes = f"{every.mean():.5f}", f"{every.max():.3f}"
        return [way.cache, way.weights, str(every.size), f"{mean.mean:.5f}", interval, *sizes]

    header = ["cache", "weights", "tokens", "divergence", "95%", "mean size", "largest"]
    return text_table(header, [line(way, rows) for way, rows in found.items()])
