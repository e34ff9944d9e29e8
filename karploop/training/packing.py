"""Packs tokenized examples into rows of one static shape, in an order fixed by a seed.

Several examples share a row; `segments` tells them apart (0 is padding) and attention stays within
each. Only completions and their stop token are targets: a prompt's tokens are the task's choice,
not the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from karploop.data.prompting import Prompting
from karploop.errors import UserError


class Batch(NamedTuple):
    """One step's rows."""

    tokens_BxL: np.ndarray  # int32, what the model reads
    targets_BxL: np.ndarray  # int32, the token after each
    weights_BxL: np.ndarray  # float32, 1 where the target is learnt from
    segments_BxL: np.ndarray  # int32, 1 … within a row; 0 on padding
    positions_BxL: np.ndarray  # int32, from 0 within each segment


@dataclass(frozen=True)
class Tokenized:
    """An example ready to pack."""

    tokens: np.ndarray  # int32: start token, prompt, completion, stop token
    prompt_length: int  # tokens before the completion, start token included


def tokenize(
    prompting: Prompting, prompts: Sequence[str], completions: Sequence[str], row_length: int
) -> list[Tokenized]:
    """Raises UserError for an example that no row can hold."""
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        start, end = prompting.example(prompt, completion)
        tokens = [*start, *end]
        if len(tokens) - 1 > row_length:
            raise UserError(
                f"a training example takes {len(tokens) - 1} tokens, 'row_length' is {row_length}: "
                f"raise it (and 'config.model.max_length'); the example: '{prompt}{completion}'"
            )
        examples.append(Tokenized(np.array(tokens, np.int32), len(start)))
    return examples


def stream(weights_N: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Endless indices of examples, drawn in proportion to their weights.

    Goes in passes as long as the data: an example of mean weight comes once in every pass, in a
    random place; one of weight 1.5 times the mean once or twice. Equal weights give plain epochs.
    """
    copies_N = weights_N / weights_N.mean()
    while True:
        whole_N = np.floor(copies_N + rng.random(len(copies_N))).astype(np.int64)
        yield from rng.permutation(np.repeat(np.arange(len(copies_N)), whole_N)).tolist()


def pack(
    examples: Sequence[Tokenized], order: Iterator[int], rows: int, row_length: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of `rows` rows, and the examples in each; first fit, in the order given.

    An example that fits in no row of the batch opens the next batch.
    """
    waiting = next(order)
    while True:
        batch = Batch(*(np.zeros((rows, row_length), t) for t in _DTYPES))
        used, segments, taken = [0] * rows, [0] * rows, []
        while True:
            length = len(examples[waiting].tokens) - 1
            row = next((r for r in range(rows) if used[r] + length <= row_length), None)
            if row is None:
                break
            segments[row] += 1
            _place(batch, row, used[row], segments[row], examples[waiting])
            used[row] += length
            taken.append(waiting)
            waiting = next(order)
        yield batch, taken


_DTYPES = (np.int32, np.int32, np.float32, np.int32, np.int32)


def _place(batch: Batch, row: int, start: int, segment: int, example: Tokenized) -> None:
    length = len(example.tokens) - 1
    span = slice(start, start + length)
    batch.tokens_BxL[row, span] = example.tokens[:-1]
    batch.targets_BxL[row, span] = example.tokens[1:]
    batch.weights_BxL[row, start + example.prompt_length - 1 : start + length] = 1.0
    batch.segments_BxL[row, span] = segment
    batch.positions_BxL[row, span] = np.arange(length)
