"""Completions and scores for the rows of a file, by one model: no loop, no store.

Rows go through in batches, in order, and are written as soon as their batch is done. An interrupted
job leaves a hidden partial file beside its output; the same job finds it and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
from jax.sharding import Mesh

from karploop.compiling import command_mesh, compiling
from karploop.data.rows import located_rows, to_prompt
from karploop.errors import UserError
from karploop.jobs import GenerateJob, Output, Row, ScoreJob, check_job, identity_of
from karploop.models.checkpoint import load_params
from karploop.reporting.progress import Progress, Stage
from karploop.roles.local import LocalModel, prompt_tokens
from karploop.sampling.distributions import Sampling
from karploop.sampling.prefix import shared_beginning
from karploop.sampling.rollout import Decoding
from karploop.sampling.sampler import Sampler, batches

Compute = Callable[[range], Iterator[tuple[Row, int]]]
_SHORTEST_BUCKET = 16
_WORTH_SHARING = 32  # tokens


def generate(job: GenerateJob, source: str, target: str, progress: Progress) -> None:
    """Adds `completions` to every row of `source`: text, tokens, logprobs, finish_reason.

    A row's completions depend on the model, its place in the file and the seed, and not on the
    batch size. Log-probabilities are the unfiltered model's, in nats. What all prompts begin with,
    such as solved examples, is read once for a batch.

    Raises:
      UserError: anything wrong with model, rows or settings, before anything is compiled.
    """

    def load(model: LocalModel, mesh: Mesh, rows: list[Row], prompts: list[list[int]]) -> Compute:
        weights = model.weights(mesh)
        shared = shared_beginning(prompts)
        prefix = shared if len(prompts) > 1 and len(shared) >= _WORTH_SHARING else ()
        rests = [prompt[len(prefix) :] for prompt in prompts]
        sampler = Sampler(
            weights,
            model.tokenizer,
            prompt_length=lengths_for(rests),
            completion_length=job.max_new_tokens - 1,
            prefix=prefix,
        )
        how = dict(
            samples=job.n,
            sampling=Sampling.of(job),
            decoding=Decoding(job.slots, cache=job.cache, weights=job.weights),
        )
        first = max(map(len, rests[: job.batch]))
        with compiling(lambda: sampler.lower_decode(job.batch, longest=first, **how)):
            params = load_params(model.checkpoint, weights)

        def complete(part: range) -> Iterator[tuple[Row, int]]:
            completions = sampler.complete(
                params,
                [rests[i] for i in part],
                list(part),
                jax.random.key(job.seed),
                limits=[room_for(model, prompts[i], job.max_new_tokens) - 1 for i in part],
                batch=job.batch,
                **how,
            )
            for i, of_row in zip(part, completions, strict=True):
                found = [
                    {
                        "text": c.text,
                        "tokens": c.tokens,
                        "logprobs": c.logprobs,
                        "finish_reason": "stop" if c.finished else "length",
                    }
                    for c in of_row
                ]
                yield rows[i] | {"completions": found}, sum(len(c.tokens) for c in of_row)

        return complete

    _run("generate", job, source, target, progress, read_prompt, load)


def read_prompt(model: LocalModel, row: Row, where: str) -> list[int]:
    """The tokens of a row's prompt.

    Raises:
      UserError: there is none, or it leaves no room in the model's context.
    """
    prompt = prompt_tokens(model.tokenizer, to_prompt(row, where), where)
    if len(prompt) >= model.config.max_length:
        raise UserError(
            f"{where}: the prompt takes {len(prompt)} tokens, and the model's context of "
            f"{model.config.max_length} must hold the completion too: shorten it"
        )
    return prompt


def score(job: ScoreJob, source: str, target: str, progress: Progress) -> None:
    """Adds `logprobs` (nats a token) and their `sum` to every row of `source`.

    Rows are {"prompt", "completion"}, scored on the completion; {"text"}; or {"tokens"}. Where the
    row does not give them, the scored `tokens` are added. The first token of a row without a prompt
    has nothing before it, and null for a log-probability.

    Raises:
      UserError: anything wrong with model, rows or settings, before anything is compiled.
    """

    def read(model: LocalModel, row: Row, where: str) -> tuple[list[int], list[int]]:
        pair = _scored(model, row, where)
        length = sum(map(len, pair))
        if length > model.config.max_length:
            raise UserError(
                f"{where}: the row takes {length} tokens, more than the model's context of "
                f"{model.config.max_length}: shorten it"
            )
        return pair

    def load(model: LocalModel, mesh: Mesh, rows: list[Row], pairs: list) -> Compute:
        weights, lengths = model.weights(mesh), [len(start) + len(end) for start, end in pairs]
        buckets = lengths_for([start + end for start, end in pairs])
        sampler = Sampler(weights, model.tokenizer, prompt_length=buckets, completion_length=0)
        first = max(lengths[: job.batch])
        with compiling(lambda: sampler.lower_score(job.batch, longest=first)):
            params = load_params(model.checkpoint, weights)

        def score_part(part: range) -> Iterator[tuple[Row, int]]:
            starts, ends = zip(*(pairs[i] for i in part), strict=True)
            found = sampler.score(params, starts, ends, job.batch, stop=False)
            for i, logprobs_L in zip(part, found, strict=True):
                values = [float(x) for x in logprobs_L]
                total = sum(values)
                if not pairs[i][0]:
                    values[0] = None  # the sampler has a 0 there
                added = {"logprobs": values, "sum": total}
                yield {"tokens": pairs[i][1]} | rows[i] | added, len(values)

        return score_part

    _run("score", job, source, target, progress, read, load)


def _run(
    name: str,
    job: GenerateJob | ScoreJob,
    source: str,
    target: str,
    progress: Progress,
    read: Callable[[LocalModel, Row, str], Any],
    load: Callable[[LocalModel, Mesh, list[Row], list[Any]], Compute],
) -> None:
    """Reads and checks every row, then loads the model, unless all is done, and works in batches.

    Args:
      read: the tokens of a row at a place in the file; raises UserError where they do not fit.
      load: given all of them, what computes the finished rows of a part, each with its tokens.
    """
    check_job(job)
    model = LocalModel.describe(job.model, dtype=job.dtype)
    rows, encoded = [], []
    for where, row in located_rows(source):
        rows.append(row)
        encoded.append(read(model, row, where))
    mesh = command_mesh({"--batch": job.batch, "--slots": getattr(job, "slots", 0)})
    with _open(target, job, model, rows) as out:
        if out.done == len(rows):
            return
        compute = load(model, mesh, rows, encoded)
        with progress.stage(None, name, len(rows), "rows", start=out.done) as stage:
            for part in batches(len(rows) - out.done, job.batch):
                _write(out, compute(range(part.start + out.done, part.stop + out.done)), stage)


def _open(target: str, job: Any, model: LocalModel, rows: Sequence[Row]) -> Output:
    settings = asdict(job) | {"batch": 0, "slots": 0, "model": model.stamps()}
    return Output(target, identity_of(settings, list(rows)))


def _write(out: Output, rows: Iterator[tuple[Row, int]], stage: Stage) -> None:
    for row, tokens in rows:
        out.write(row)
        stage.advance(1, tokens=tokens)
    out.flush()


def _scored(model: LocalModel, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    """Tokens to read and tokens to score."""
    text, tokenizer = row.get("text"), model.tokenizer
    if isinstance(text, str) and text:
        return [], tokenizer.encode_prompt(text)
    prompt = to_prompt(row, where)
    if prompt.tokens is not None:
        return [], prompt_tokens(tokenizer, prompt, where)
    completion = row.get("completion")
    if not isinstance(completion, str) or not completion:
        raise UserError(
            f"{where}: a row to score has a 'completion' beside its prompt, or a 'text', or "
            "'tokens'; this one has none of them"
        )
    return prompt_tokens(tokenizer, prompt, where), tokenizer.encode(completion)


def room_for(model: LocalModel, prompt: Sequence[int], wanted: int) -> int:
    """New tokens that the context has room for."""
    return min(wanted, model.config.max_length - len(prompt))


def lengths_for(texts: Sequence[Sequence[int]]) -> list[int]:
    """Powers of two up to the longest text: lengths to compile for."""
    longest, lengths = max(map(len, texts)), [_SHORTEST_BUCKET]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return lengths
