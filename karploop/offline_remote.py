"""Completions for the rows of a file, by a model behind an OpenAI-compatible address."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import asdict

from karploop.data.rows import Prompt, located_rows, to_prompt
from karploop.endpoints.calls import Call, Endpoint, Failure, Reply, seed_of
from karploop.endpoints.client import Client, Outcome
from karploop.endpoints.ledger import Ledger
from karploop.errors import UserError
from karploop.files import cache_folder
from karploop.jobs import GenerateJob, Output, Row, check_job, identity_of
from karploop.reporting.progress import Progress


def generate(
    job: GenerateJob,
    endpoint: Endpoint,
    source: str,
    target: str,
    progress: Progress,
    responses: pathlib.Path | None = None,
) -> None:
    """Adds `completions` to every row of `source`: text and finish_reason.

    A row of which a call failed for good gets `error`, the reason, instead. A prompt goes to
    `/completions`, as it is; messages go to `/chat/completions`.

    Args:
      responses: the file of replies that are not asked for twice; None: one for all jobs of a user.

    Raises:
      UserError: anything wrong with rows or settings, before anything is asked; or a key or model
        that the endpoint does not know.
      RunFailed: the endpoint is down or the cap is reached; the same command goes on from there.
    """
    check_job(job)
    if job.top_k or job.min_p:
        raise UserError(
            "--top_k and --min_p are not in the protocol; a server that has them takes them by "
            f"--extra, as in --extra='{{\"top_k\": {job.top_k or 20}}}'"
        )
    rows, calls = [], []
    for where, row in located_rows(source):
        prompt = to_prompt(row, where)
        if prompt.tokens is not None:
            raise UserError(f"{where}: an endpoint takes 'prompt' or 'messages', and not 'tokens'")
        rows.append(row)
        calls += [_call(job, prompt, len(rows) - 1, sample) for sample in range(job.n)]
    settings = asdict(job) | {"batch": 0}
    identity = identity_of(settings, endpoint.base_url, dict(endpoint.extra), rows)
    ledger = Ledger(responses or cache_folder() / "responses.sqlite", identity)
    client = Client(endpoint, ledger)
    with Output(target, identity) as out:
        begin = out.done
        progress.say(client.forecast(calls[begin * job.n :]))
        with progress.stage(None, "generate", len(rows), "rows", start=begin) as stage:
            outcomes = client.complete(calls[begin * job.n :])
            for row, found in zip(rows[begin:], _in_order(outcomes, job.n), strict=True):
                out.write(row | _added(found))
                out.flush()
                stage.advance(1, tokens=sum(_tokens(outcome) for outcome in found))
    used, spent = client.usage, ledger.spent()
    cost = f", ${spent:.4f}" if spent else ""
    progress.say(
        f"{used.answered:,} calls answered, {used.from_cache:,} known before, {used.failed:,} "
        f"failed; {used.attempts:,} requests{cost}"
    )


def _call(job: GenerateJob, prompt: Prompt, row: int, sample: int) -> Call:
    return Call(
        prompt=prompt.text if prompt.text is not None else prompt.messages,
        max_tokens=job.max_new_tokens,
        temperature=job.temperature,
        top_p=job.top_p,
        seed=seed_of(job.seed, row, sample),
    )


def _in_order(outcomes: Iterator[tuple[int, Outcome]], n: int) -> Iterator[list[Outcome]]:
    """The `n` outcomes of each row, rows in order."""
    waiting: dict[int, Outcome] = {}
    following = 0
    for place, outcome in outcomes:
        waiting[place] = outcome
        while all(following + i in waiting for i in range(n)):
            yield [waiting.pop(following + i) for i in range(n)]
            following += n


def _added(found: list[Outcome]) -> Row:
    failed = next((outcome.reason for outcome in found if isinstance(outcome, Failure)), None)
    if failed:
        return {"error": failed}
    ends = ("length", "stop")
    return {"completions": [{"text": r.text, "finish_reason": ends[r.finished]} for r in found]}


def _tokens(outcome: Outcome) -> int:
    return (outcome.tokens_out or 0) if isinstance(outcome, Reply) else 0
