"""The `judge` stage."""

from __future__ import annotations

from karploop.config import JudgeConfig
from karploop.data.tasks import Task
from karploop.errors import UserError
from karploop.judging.verifier import verifier
from karploop.judging.vote import vote
from karploop.records import VERDICTS_FILE, Samples, Verdicts
from karploop.stages import StageContext


def judge(context: StageContext, *, name: str, task: Task, config: JudgeConfig) -> None:
    """Writes `verdicts.parquet`, aligned with the members' samples laid end to end."""
    samples = Samples.gather(context.inputs)
    with context.progress(len(samples), "samples") as progress:
        verdicts = judged(name, samples, task, config)
        progress.advance(len(samples))
    context.write_table(VERDICTS_FILE, verdicts.to_table())


def judged(name: str, samples: Samples, task: Task, config: JudgeConfig) -> Verdicts:
    """Verdicts of the judge called `name`: 'verifier' or 'vote'."""
    if name == "verifier":
        return verifier(samples, task)
    if name == "vote":
        return vote(samples, task, config.voters)
    raise UserError(f"a filter asks for the judge '{name}': known are 'verifier' and 'vote'")
