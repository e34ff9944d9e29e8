"""The `judge` stage."""

from __future__ import annotations

from karploop.config import JudgeConfig
from karploop.data.tasks import Task
from karploop.errors import UserError
from karploop.judging.equivalence import Mathematics
from karploop.judging.verifier import verifier
from karploop.judging.vote import vote
from karploop.records import VERDICTS_FILE, Samples, Verdicts
from karploop.stages import StageContext


def judge(context: StageContext, *, name: str, task: Task, config: JudgeConfig) -> None:
    """Writes `verdicts.parquet`, aligned with the members' samples laid end to end."""
    samples = Samples.gather(context.inputs)
    with context.progress(len(samples), "samples") as progress, Mathematics() as mathematics:
        asked = mathematics if config.equivalence == "math" else None
        verdicts = judged(name, samples, task, config.voters, asked)
        progress.advance(len(samples))
    if mathematics.given_up:
        context.say(
            f"{mathematics.given_up} questions about answers were too hard for math-verify: these "
            "answers count as different"
        )
    context.write_table(VERDICTS_FILE, verdicts.to_table())


def judged(
    name: str, samples: Samples, task: Task, voters: str, mathematics: Mathematics | None = None
) -> Verdicts:
    """Verdicts of the judge called `name`: 'verifier' or 'vote'; see `vote` for the others."""
    if name == "verifier":
        return verifier(samples, task)
    if name == "vote":
        return vote(samples, task, voters, mathematics)
    raise UserError(f"a filter asks for the judge '{name}': known are 'verifier' and 'vote'")
