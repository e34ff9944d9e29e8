"""Completions and scores for the rows of a file, by a model behind an OpenAI-compatible address."""

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
from karploop.jobs import GenerateJob, Output, Row, ScoreJob, check_job, identity_of
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
    _run("generate", settings, endpoint, rows, calls, target, progress, responses)


def score(
    job: ScoreJob,
    endpoint: Endpoint,
    source: str,
    target: str,
    progress: Progress,
    responses: pathlib.Path | None = None,
) -> None:
    """Adds `logprobs` (nats a token), their `sum` and the tokens' texts, `pieces`, to every row.

    Rows are {"prompt", "completion"}, scored on the completion, or {"text"}, whose first token may
    have null for a log-probability. Tokens are the server's, of prompt and completion read as one
    text. A row of which nothing can be said for sure has `error`, the reason, instead: one token is
    of both prompt and completion, say.

    Args:
      responses: as of `generate`.

    Raises:
      UserError, RunFailed: as `generate` does; also an endpoint that gives no log-probabilities of
        what it is sent, before it is sent the first row.
    """
    check_job(job)
    rows, calls = [], []
    for where, row in located_rows(source):
        rows.append(row)
        calls.append(_scoring(row, where))
    settings = {"score": job.model}
    _run("score", settings, endpoint, rows, calls, target, progress, responses)


def _run(
    name: str,
    settings: Row,
    endpoint: Endpoint,
    rows: list[Row],
    calls: list[Call],
    target: str,
    progress: Progress,
    responses: pathlib.Path | None,
) -> None:
    """Asks what is not done yet, as many calls for each row, and writes rows in their order."""
    identity = identity_of(settings, endpoint.base_url, dict(endpoint.extra), rows)
    ledger = Ledger(responses or cache_folder() / "responses.sqlite", identity)
    client, n = Client(endpoint, ledger), len(calls) // len(rows)
    with Output(target, identity) as out:
        begin = out.done
        left = calls[begin * n :]
        if left and left[0].continuation is not None:
            client.check_scoring("--model")
        forecast = client.forecast(left)
        for line in filter(None, (str(forecast), forecast.warning)):
            progress.say(line)
        with progress.stage(None, name, len(rows), "rows", start=begin) as stage:
            for row, found in zip(rows[begin:], _in_order(client.complete(left), n), strict=True):
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


def _scoring(row: Row, where: str) -> Call:
    """Raises UserError: the row has nothing to score, or nothing that an endpoint takes."""
    text, prompt, completion = (row.get(name) for name in ("text", "prompt", "completion"))
    if isinstance(text, str) and text:
        return Call.scoring("", text)
    texts = (prompt, completion)
    if not all(isinstance(one, str) and one for one in texts):
        raise UserError(
            f"{where}: to be scored by an endpoint, a row has a text 'completion' beside a text "
            "'prompt', or a 'text'; a server scores neither 'messages' nor 'tokens'"
        )
    return Call.scoring(*texts)


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
    if found[0].logprobs is not None:
        values = found[0].logprobs
        total = sum(value for value in values if value is not None)
        return {"pieces": found[0].pieces, "logprobs": values, "sum": total}
    ends = ("length", "stop")
    return {"completions": [{"text": r.text, "finish_reason": ends[r.finished]} for r in found]}


def _tokens(outcome: Outcome) -> int:
    if not isinstance(outcome, Reply):
        return 0
    return (outcome.tokens_out or 0) if outcome.pieces is None else len(outcome.pieces)
