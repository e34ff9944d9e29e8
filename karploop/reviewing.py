"""From a run's samples to a review file, and annotators who fill one in.

People get the texts of a round, and nothing else that is known of them: no gold answer, no score,
no author. Held-out problems are not sampled in rounds, and so are in no review.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import pyarrow.parquet as pq

from karploop.catalogue import Run, read_catalogue
from karploop.config import SIMULATED
from karploop.data.rows import located_rows
from karploop.data.tasks import get_task
from karploop.errors import UserError
from karploop.judging.person import BETTER, BY, CHOICES, COMPARE, VERDICT, Texts, ordered, read_row
from karploop.judging.person import save as save_review
from karploop.judging.simulated_annotators import Annotators
from karploop.phases import in_round, laid
from karploop.records import SAMPLES_FILE, Samples
from karploop.schema import nearest
from karploop.store import Store

_WAITING = (
    "a run that waits for its judge 'person' has written what it wants to know to the file that "
    "'config.judge.review' names"
)


def find_run(store: Store, name: str) -> Run:
    """Raises UserError: there is no such run, or it has no config."""
    runs = {run.name: run for run in read_catalogue(store).runs}
    if name not in runs:
        raise UserError(f"no run '{name}' in '{store.root}': {nearest(name, runs)}")
    if not runs[name].config:
        raise UserError(f"the run '{name}' has no config.json: start it again, which writes it")
    return runs[name]


def texts_of_round(store: Store, run: Run, round: int | None, people: str) -> list[Texts]:
    """What is to be reviewed of a complete round: all its replies that ended, or all their pairs.

    Args:
      round: its number; None: the last that sampled.
      people: `rate`, `compare`, or "" for what the run's judge asks of people in that round.

    Raises:
      UserError: there is no such round yet, it sampled nothing, or its samples were collected.
    """
    sampled = {i: keys for i, names in run.stages.items() if (keys := _generated(names))}
    round = max(sampled, default=None) if round is None else round
    if round not in sampled:
        known = ", ".join(map(str, sampled)) or "none"
        raise UserError(
            f"the run '{run.name}' has no complete round {'' if round is None else round} with "
            f"samples (it has: {known}); {_WAITING}"
        )
    samples = Samples.concatenate([_samples(store, key) for key in sampled[round]])
    of_prompt: dict[str, dict[str, None]] = defaultdict(dict)
    for prompt, text, finished in zip(
        samples.prompts, samples.completions, samples.finished_S, strict=True
    ):
        if finished:
            of_prompt[prompt][text] = None
    if (people or in_round(laid(run.config), round)["judge"]["people"]) == COMPARE:
        return [
            ordered(prompt, *two)
            for prompt, texts in of_prompt.items()
            for two in itertools.combinations(texts, 2)
        ]
    return [(prompt, text) for prompt, texts in of_prompt.items() for text in texts]


def annotate(path: str, run: Run, error: float) -> int:
    """Fills in the rows of a review that wait for a verdict; returns how many there were.

    Annotators that see the gold of the run's task do so, and the rows say it.

    Args:
      error: how often they are wrong, 0 … 1.

    Raises:
      UserError: no such file, or one that is no review; the task has no gold for these prompts.
    """
    if not 0 <= error <= 1:
        raise UserError(f"--annotate={error:g}: write how often annotators err, from 0 to 1")
    annotators = Annotators(get_task(run.config["task"]["name"]), 1, error, run.config["seed"])
    rows, filled = [], 0
    for where, row in located_rows(path):
        kind, _, score = read_row(row, where)
        if score == "":
            by_pair = kind == COMPARE
            asked = [(row["prompt"], *([row["a"], row["b"]] if by_pair else [row["completion"]]))]
            (said,) = (annotators.compare if by_pair else annotators.rate)(asked)
            words = {value: word for word, value in CHOICES.items()}
            if by_pair:
                row = row | {BETTER: words[said.score]}
            else:
                row = row | {VERDICT: {1.0: "good", 0.0: "bad", None: "unsure"}[said.score]}
            row |= {BY: f"{SIMULATED}, wrong in {error:.0%}"}
            filled += 1
        rows.append(row)
    if filled:
        save_review(path, rows)
    return filled


def _generated(names: Sequence[tuple[str, str]]) -> list[str]:
    return [key for stage, key in names if stage == "generate"]


def _samples(store: Store, key: str) -> Samples:
    manifest = store.manifest("generate", key)
    if manifest is None or store.gone(manifest, SAMPLES_FILE):
        raise UserError(f"the samples generate/{key} were collected: start the run again")
    return Samples.from_table(pq.read_table(store.fetch(manifest, SAMPLES_FILE)))
