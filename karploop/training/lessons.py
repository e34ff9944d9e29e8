"""From kept rows, pairs or episodes to units that training packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from karploop.config import ObjectiveConfig, TrainConfig
from karploop.data.prompting import Prompting
from karploop.errors import UserError
from karploop.records import (
    EPISODES_FILE,
    EXAMPLES_FILE,
    LABELLED_FILE,
    PAIRS_FILE,
    Contrasts,
    Episodes,
    Examples,
    Labelled,
    Record,
)
from karploop.training.objectives import EPISODES, EXAMPLES, LABELS, PAIRS
from karploop.training.packing import Tokenized, Unit, branched_length, checked, ending, tokenize

RECORDS: dict[str, tuple[type[Record], str]] = {  # by what an objective learns from
    EXAMPLES: (Examples, EXAMPLES_FILE),
    PAIRS: (Contrasts, PAIRS_FILE),
    LABELS: (Labelled, LABELLED_FILE),
    EPISODES: (Episodes, EPISODES_FILE),
}
Origin = tuple[str, int]  # the stage that wrote a text, and its row there


class Lesson(NamedTuple):
    """What a stage learns from."""

    units: Sequence[Unit]
    origins: Sequence[tuple[Origin, ...]]  # of each unit's texts
    weights_N: np.ndarray  # how often each unit is drawn, relative to the others


def lesson_of(
    rows: Record,
    weights_N: np.ndarray,
    prompting: Prompting,
    objective: ObjectiveConfig,
    config: TrainConfig,
) -> Lesson:
    """Units of some rows, each of this weight, where they come from, and how often they are drawn.

    With `share_prompts` the episodes of a prompt are one unit, or as many as rows it takes to hold
    them. Raises UserError as `units` does.
    """
    lesson = Lesson(units(rows, prompting, objective, config.row_length), origins(rows), weights_N)
    if config.share_prompts and isinstance(rows, Episodes):
        return _grouped(lesson, config.row_length)
    return lesson


def _grouped(lesson: Lesson, row_length: int) -> Lesson:
    """Units of one text, those of one prompt put together as far as a row holds them.

    Every text is drawn as often as it was: only such of one weight make a unit, which has that one.
    """
    groups: list[list[int]] = []
    newest: dict[tuple[bytes, float], list[int]] = {}
    for i, ((text,), weight) in enumerate(zip(lesson.units, lesson.weights_N, strict=True)):
        key = text.tokens[: text.prompt_length].tobytes(), float(weight)
        group = newest.get(key, [])
        together = [*(lesson.units[j][0] for j in group), text]
        shared = text.prompt_length - 1
        if not group or not shared or branched_length(together, shared) > row_length:
            groups.append(group := [])
            newest[key] = group
        group.append(i)

    def gathered(of_units: Sequence[Sequence]) -> list[tuple]:
        return [tuple(of_units[i][0] for i in group) for group in groups]

    first_of_each = [group[0] for group in groups]
    weights_N = lesson.weights_N[first_of_each]
    return Lesson(gathered(lesson.units), gathered(lesson.origins), weights_N)


def units(
    rows: Record, prompting: Prompting, config: ObjectiveConfig, row_length: int
) -> list[Unit]:
    """A unit for each row.

    Raises:
      UserError: one that no row of a batch can hold; labelled rows of a single prompt.
    """
    if isinstance(rows, Labelled):
        return _labelled(rows, prompting, row_length)
    if isinstance(rows, Examples):
        texts = tokenize(prompting, rows.prompts, rows.completions, row_length)
        if config.weighting == "example":
            texts = [replace(text, weight=1 / text.targets) for text in texts]
        return [(text,) for text in texts]
    if isinstance(rows, Contrasts) and config.name == "reward":

        def whole(prompt: str, completion: str) -> Tokenized:
            start, end = prompting.example(prompt, completion)
            return rewarded([*start, *end], row_length, prompt + completion)

        return [
            (whole(prompt, chosen), whole(prompt, rejected))
            for prompt, chosen, rejected in zip(
                rows.prompts, rows.chosen, rows.rejected, strict=True
            )
        ]
    if isinstance(rows, Contrasts):
        present = {"present": 1.0}
        sides = (
            tokenize(prompting, rows.prompts, completions, row_length)
            for completions in (rows.chosen, rows.rejected)
        )
        return [
            tuple(replace(text, by_text=present) for text in pair)
            for pair in zip(*sides, strict=True)
        ]
    assert isinstance(rows, Episodes)
    return [(_episode(rows, i, prompting, row_length),) for i in range(len(rows))]


def rewarded(
    tokens: Sequence[int], row_length: int, text: str = "", weight: float = 1.0
) -> Tokenized:
    """A text of a pair, of this weight, whose reward is read at its last token."""
    return ending(tokens, row_length, text, by_text={"present": weight})


def _labelled(rows: Labelled, prompting: Prompting, row_length: int) -> list[Unit]:
    """Each completion, and behind its prompt the next one that answers another prompt."""
    if len(set(rows.prompts)) < 2:
        raise UserError(
            "'config.objective.name=kto' puts completions behind prompts that are not theirs, and "
            "all of these answer one: raise 'config.generate.prompts'"
        )
    count, others = len(rows), []
    for i, prompt in enumerate(rows.prompts):
        others.append(
            next(j % count for j in range(i + 1, i + count) if rows.prompts[j % count] != prompt)
        )
    own = tokenize(prompting, rows.prompts, rows.completions, row_length)
    strange = tokenize(prompting, rows.prompts, [rows.completions[j] for j in others], row_length)
    return [
        tuple(replace(text, by_text={"present": 1.0, "desirable": float(good)}) for text in pair)
        for *pair, good in zip(own, strange, rows.desirable, strict=True)
    ]


def _episode(rows: Episodes, i: int, prompting: Prompting, row_length: int) -> Tokenized:
    """Sampled tokens behind what they were sampled from, examples included."""
    prompt = [*prompting.prefix, *prompting.prompt(rows.prompts[i])]
    return checked(
        (prompt, rows.tokens[i]),
        row_length,
        rows.prompts[i],
        by_token={
            "sampler": np.array(rows.logprobs[i], np.float32),
            "advantage": np.array(rows.advantages[i], np.float32),
        },
        by_text={"present": 1.0},
    )


def origins(rows: Record) -> list[tuple[Origin, ...]]:
    """Where the texts of each unit come from."""
    if isinstance(rows, Contrasts):
        chosen = zip(rows.chosen_source, rows.chosen_row.tolist(), strict=True)
        rejected = zip(rows.rejected_source, rows.rejected_row.tolist(), strict=True)
        return list(zip(chosen, rejected, strict=True))
    return [(origin,) for origin in zip(rows.source, rows.row.tolist(), strict=True)]


def with_reference(
    given: Sequence[Unit], logprobs: Sequence[Sequence[np.ndarray]], by: str
) -> list[Unit]:
    """Units that carry what the reference says of them.

    Args:
      logprobs: of each text of each unit, of its targets.
      by: "text": their sum; "token": each.
    """

    def carry(text: Tokenized, of_targets: np.ndarray) -> Tokenized:
        if by == "token":
            return replace(text, by_token=dict(text.by_token) | {"reference": of_targets})
        return replace(text, by_text=dict(text.by_text) | {"reference": float(of_targets.sum())})

    return [
        tuple(carry(text, x) for text, x in zip(unit, found, strict=True))
        for unit, found in zip(given, logprobs, strict=True)
    ]
