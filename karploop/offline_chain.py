"""A chain over the rows of a file."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from karploop.asking import transcript
from karploop.chains.definition import Chain
from karploop.chains.library import get_chain
from karploop.chains.rehearsal import Rehearsal, copied
from karploop.chains.rendering import Templates, load_templates, read_text
from karploop.chains.run import Run, Runner, Settings
from karploop.compiling import command_mesh
from karploop.config import ChainConfig
from karploop.data.rows import located_rows, to_prompt
from karploop.endpoints.forecast import Tally
from karploop.errors import UserError
from karploop.files import cache_folder
from karploop.jobs import Output, Row, identity_of
from karploop.reporting.progress import Progress
from karploop.roles.bind import Bound
from karploop.roles.rehearsal import rehearse


def run_file(
    config: ChainConfig,
    source: str,
    target: str,
    progress: Progress,
    responses: pathlib.Path | None = None,
) -> None:
    """Adds `output` and `steps` to every row of `source`; or `error`, and the steps before it.

    What endpoints will be asked, and what their caps allow of it, is said before.

    Args:
      responses: the file of endpoints' replies; None: one for all jobs of a user.

    Raises:
      UserError: anything wrong with chain, roles or rows, before anything is asked.
      RunFailed: an endpoint is down or its cap is reached; the same command goes on from there.
    """
    chain = get_chain(config.chain, config.options)
    templates = load_templates(ask.template for ask in chain.asks() if ask.template)
    rows, runs = [], []
    for where, row in located_rows(source):
        rows.append(row)
        runs.append(_begin(chain, row, len(runs), where))
    job = _identity(config, templates, rows)
    bound = Bound(
        {ask.role for ask in chain.asks()},
        config.roles,
        responses or cache_folder() / "responses.sqlite",
        job,
        dtype=config.dtype,
    )
    mesh = command_mesh({"config.batch": config.batch})
    with Output(target, identity_of(job, bound.identity())) as out:
        if out.done == len(rows):
            return
        settings = Settings(config.seed, config.temperature, config.top_p, config.max_new_tokens)
        parts = [
            range(start, min(start + config.rows, len(rows)))
            for start in range(out.done, len(rows), config.rows)
        ]

        def go(stand_ins: Mapping[str, Any], tally: Tally) -> None:
            rehearsal = Rehearsal(chain, stand_ins, settings, templates, tally)
            for part in parts:
                rehearsal.run(copied([runs[i] for i in part]))

        for line in rehearse(bound.names, bound.remote, go):
            progress.say(line)
        runner = Runner(chain, bound.load(mesh, config.batch), settings, templates)
        with progress.stage(None, chain.name, len(rows), "rows", start=out.done) as stage:
            for part in parts:
                runner.run([runs[i] for i in part])
                for i in part:
                    out.write(rows[i] | _added(chain, runs[i]))
                out.flush()
                stage.advance(len(part), tokens=sum(runs[i].tokens for i in part))


def _begin(chain: Chain, row: Row, number: int, where: str) -> Run:
    """Raises UserError: the row has neither a prompt nor a field of its own to start from."""
    needs_prompt = any(not ask.template for ask in chain.asks())
    if not needs_prompt and "prompt" not in row and "messages" not in row:
        return Run(number, "", dict(row))
    prompt = to_prompt(row, where)
    if prompt.tokens is not None:
        raise UserError(f"{where}: a chain takes 'prompt' or 'messages', and not 'tokens'")
    asked = prompt.text if prompt.text is not None else prompt.messages
    text = asked if isinstance(asked, str) else transcript(asked)
    return Run(number, asked, row | {"prompt": text})


def _added(chain: Chain, run: Run) -> Row:
    if run.error:
        return {"error": run.error, "steps": run.steps}
    return {"output": run.variables[chain.output], "steps": run.steps}


def _identity(config: ChainConfig, templates: Templates, rows: list[Row]) -> str:
    free = ("roles", "rows", "batch")  # without effect, or told apart by what they are bound to
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    return identity_of(settings, {name: read_text(name) for name in templates}, rows)
