"""Where a stage's randomness comes from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np


def folded(words: Sequence[int]) -> jax.Array:
    """The key of the first word with the others folded into it, in their order."""
    key = jax.random.key(words[0])
    for word in words[1:]:
        key = jax.random.fold_in(key, word)
    return key


@dataclass(frozen=True)
class Rng:
    """Identity of a stage's randomness: one key per (seed, member, round, stage name)."""

    seed: int
    member: int
    round: int  # −1 before the first round

    def words(self, stage: str) -> list[int]:
        return [self.seed, self.member, self.round + 1, zlib.crc32(stage.encode())]

    def key(self, stage: str) -> jax.Array:
        """The root key folded with member, round and stage, for device code."""
        return folded(self.words(stage))

    def numpy(self, stage: str) -> np.random.Generator:
        """The same identity for host code."""
        return np.random.default_rng(self.words(stage))
