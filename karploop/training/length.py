"""How long a training stage is: so many steps, so many tokens, or so many passes over its data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from karploop.config import TrainConfig
from karploop.training.packing import Batch


@dataclass(frozen=True)
class Length:
    """What is counted, and how much of it there is to be.

    The learning rate follows the share that is done, so that stages of equal length have equal
    schedules whatever the number of their steps.
    """

    unit: str  # "steps", "tokens" or "examples": rows, pairs, or groups of episodes
    total: int

    def of(self, batch: Batch, taken: list[int]) -> int:
        """What a step counts for on this batch, which holds the units `taken`."""
        if self.unit == "tokens":
            return tokens_of(batch)
        return len(taken) if self.unit == "examples" else 1

    def cut(self, order: Iterator[int]) -> Iterator[int]:
        """As many units as there are to be, where these are counted; else all."""
        return itertools.islice(order, self.total) if self.unit == "examples" else order


def length_of(config: TrainConfig, units: int) -> Length:
    """The length of a stage that learns from so many units."""
    if config.tokens:
        return Length("tokens", config.tokens)
    if config.epochs:
        return Length("examples", max(1, round(config.epochs * units)))
    return Length("steps", config.steps)


def tokens_of(batch: Batch) -> int:
    """Tokens that the model reads: prompts included, one that is shared once, and padding not."""
    return int(np.count_nonzero(batch.segments_BxL))
