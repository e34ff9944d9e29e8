"""Packs tokenized texts into rows of one static shape, in an order fixed by a seed.

Several texts share a row; `segments` tells them apart (0 is padding) and attention stays within
each. Only completions and their stop token are targets: a prompt's tokens are the task's choice,
not the model's. What an objective knows of a token or of a text, such as its advantage, travels
beside it. Texts that are compared with one another make a unit, and a unit is never torn apart.

Where it is asked for, what the texts of a unit begin with is read once: one segment holds the
shared beginning and behind it a branch for each text, which sees the beginning and itself. Its
positions go on from the beginning, so that every token is read as in a text by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from karploop.data.prompting import Prompting
from karploop.errors import UserError


class Batch(NamedTuple):
    """One step's rows."""

    tokens_BxL: np.ndarray  # int32, what the model reads
    targets_BxL: np.ndarray  # int32, the token after each
    weights_BxL: np.ndarray  # float32, above 0 where the target is learnt from
    segments_BxL: np.ndarray  # int32, 1 … within a row; 0 on padding
    branches_BxL: np.ndarray  # int32, 1 … where a segment has forked; 0 before, and elsewhere
    positions_BxL: np.ndarray  # int32, from 0 within each text
    # int32, which of the batch's texts, unit by unit; 0 on padding. Of what is shared, the first.
    places_BxL: np.ndarray
    by_token: dict[str, np.ndarray]  # float32, of each target; shaped like the rows
    by_text: dict[str, np.ndarray]  # float32, of each place: `places` for each part of the rows


@dataclass(frozen=True)
class Tokenized:
    """A text ready to pack."""

    tokens: np.ndarray  # int32: start token, prompt, completion, stop token
    prompt_length: int  # tokens before the completion, start token included
    weight: float = 1.0  # of each of its targets
    by_token: Mapping[str, np.ndarray] = field(default_factory=dict)  # of each of its targets
    by_text: Mapping[str, float] = field(default_factory=dict)

    @property
    def targets(self) -> int:
        """Tokens that are learnt from."""
        return len(self.tokens) - self.prompt_length


Unit = Sequence[Tokenized]


def tokenize(
    prompting: Prompting, prompts: Sequence[str], completions: Sequence[str], row_length: int
) -> list[Tokenized]:
    """Raises UserError for an example that no row can hold."""
    return [
        checked(prompting.example(prompt, completion), row_length, prompt + completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def checked(
    tokens: tuple[Sequence[int], Sequence[int]], row_length: int, text: str, **more
) -> Tokenized:
    """A prompt's and a completion's tokens as one text. Raises UserError: no row can hold it."""
    start, end = tokens
    length = len(start) + len(end) - 1
    if length > row_length:
        raise UserError(
            f"a training example takes {length} tokens, 'row_length' is {row_length}: raise it "
            f"(and 'config.model.max_length'); the example: '{text}'"
        )
    return Tokenized(np.array([*start, *end], np.int32), len(start), **more)


def ending(tokens: Sequence[int], row_length: int, text: str, **more) -> Tokenized:
    """A text that is read to its last token, and learnt from at that one alone.

    What stands there as the target is the token itself, and means nothing. Raises UserError: no row
    can hold it.
    """
    return checked((tokens, tokens[-1:]), row_length, text, **more)


def stream(weights_N: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Endless indices of units, drawn in proportion to their weights.

    Goes in passes as long as the data: a unit of mean weight comes once in every pass, in a random
    place; one of weight 1.5 times the mean once or twice. Equal weights give plain epochs.
    """
    copies_N = weights_N / weights_N.mean()
    while True:
        whole_N = np.floor(copies_N + rng.random(len(copies_N))).astype(np.int64)
        yield from rng.permutation(np.repeat(np.arange(len(copies_N)), whole_N)).tolist()


def shared_length(unit: Unit, row_length: int) -> int:
    """Tokens that all texts of a unit begin with and that are read once for all of them.

    No token behind which something is learnt is among them: a prompt's last stands in each branch.
    0 where there is nothing to share, or no row holds the texts together.
    """
    if len(unit) < 2:
        return 0
    most = min(text.prompt_length for text in unit) - 1
    first, *others = (text.tokens[:most] for text in unit)
    apart = np.flatnonzero(np.any([first != other for other in others], axis=0))
    alike = int(apart[0]) if len(apart) else most
    return alike if branched_length(unit, alike) <= row_length else 0


def branched_length(unit: Unit, shared: int) -> int:
    """Tokens of a row that a unit takes as one segment, so many of them shared."""
    return shared + sum(len(text.tokens) - 1 - shared for text in unit)


def places(rows: int, row_length: int) -> int:
    """The most texts of so many rows, if each is one token long; even, for pairs."""
    return rows * row_length + rows * row_length % 2


def pack(
    units: Sequence[Unit],
    order: Iterator[int],
    rows: int,
    row_length: int,
    parts: int = 1,
    share: bool = False,
) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of `rows` rows, and the units in each; first fit, in the order given.

    A unit that does not fit into the batch opens the next one. The last batch of an order that
    ends may be nearly empty.

    Args:
      parts: of the rows, equally many each and a divisor of `rows`. All texts of a unit are in one
        part, so that a part is a batch by itself (see `accumulation.py`). Units of one text are
        packed as they are without.
      share: what the texts of a unit begin with is read once, see `shared_length`.

    Raises:
      UserError: the texts of one unit do not fit into a part together.
    """
    size = rows // parts
    waiting = next(order, None)
    while waiting is not None:
        batch, taken = _empty(units[waiting], size, row_length, parts), []
        used, segments, counts = [0] * rows, [0] * rows, [0] * parts
        while waiting is not None:
            unit = units[waiting]
            shared = shared_length(unit, row_length) if share else 0
            at = _fit(_segments(unit, shared), used, row_length, size)
            if at is None:
                break
            part = at[0] // size
            first = part * places(size, row_length) + counts[part]
            _lay(batch, unit, shared, at, used, segments, first)
            counts[part] += len(unit)
            taken.append(waiting)
            waiting = next(order, None)
        if not taken:
            raise UserError(
                f"{len(units[waiting])} texts that are compared do not fit into a batch of {size} "
                f"rows of {row_length} tokens together: raise 'rows' or 'row_length'"
                + (", or lower 'accumulation'" if parts > 1 else "")
            )
        yield batch, taken


def _empty(like: Unit, size: int, row_length: int, parts: int) -> Batch:
    rows, many = parts * size, parts * places(size, row_length)
    arrays = (np.zeros((rows, row_length), t) for t in _DTYPES)
    by_token = {name: np.zeros((rows, row_length), np.float32) for name in like[0].by_token}
    return Batch(*arrays, by_token, {name: np.zeros(many, np.float32) for name in like[0].by_text})


_DTYPES = (np.int32, np.int32, np.float32, np.int32, np.int32, np.int32, np.int32)


def _segments(unit: Unit, shared: int) -> list[int]:
    """Tokens of each segment that a unit takes."""
    return [branched_length(unit, shared)] if shared else [len(text.tokens) - 1 for text in unit]


def _fit(
    lengths: Sequence[int], used: Sequence[int], row_length: int, size: int
) -> list[int] | None:
    """A row for each segment of a unit, all in one part of `size` rows; None if there is none."""
    for first in range(0, len(used), size):
        room, at = list(used[first : first + size]), []
        for length in lengths:
            row = next((r for r, u in enumerate(room) if u + length <= row_length), None)
            if row is None:
                break
            room[row] += length
            at.append(first + row)
        if len(at) == len(lengths):
            return at
    return None


def _lay(
    batch: Batch,
    unit: Unit,
    shared: int,
    at: Sequence[int],
    used: list[int],
    segments: list[int],
    first: int,
) -> None:
    """Lays a unit into the rows `at` of its segments, behind what is there.

    Args:
      used, segments: of each row, moved on.
      first: the place of its first text.
    """
    row = at[0]
    if shared:
        segments[row] += 1
        _read(batch, row, used[row], unit[0], range(shared), segments[row], 0, first)
        used[row] += shared
    for number, text in enumerate(unit):
        branch, place = (number + 1 if shared else 0), first + number
        if not shared:
            row = at[number]
            segments[row] += 1
        own = range(shared, len(text.tokens) - 1)
        _read(batch, row, used[row], text, own, segments[row], branch, place)
        _learn(batch, row, used[row] - shared, text, place)
        used[row] += len(own)


def _read(
    batch: Batch,
    row: int,
    start: int,
    text: Tokenized,
    which: range,
    segment: int,
    branch: int,
    place: int,
) -> None:
    """Lays some of a text's tokens into a row, from its column `start` on."""
    here = row, slice(start, start + len(which))
    batch.tokens_BxL[here] = text.tokens[which.start : which.stop]
    batch.targets_BxL[here] = text.tokens[which.start + 1 : which.stop + 1]
    batch.segments_BxL[here] = segment
    batch.branches_BxL[here] = branch
    batch.positions_BxL[here] = which
    batch.places_BxL[here] = place


def _learn(batch: Batch, row: int, start: int, text: Tokenized, place: int) -> None:
    """What is learnt of a text, whose first token stands in column `start` or would if it were not
    shared."""
    learnt = row, slice(start + text.prompt_length - 1, start + len(text.tokens) - 1)
    batch.weights_BxL[learnt] = text.weight
    for name, values in text.by_token.items():
        batch.by_token[name][learnt] = values
    for name, value in text.by_text.items():
        batch.by_text[name][place] = value
