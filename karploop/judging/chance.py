"""A judge that asks nobody: what a loop does with it comes of no judgement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from karploop.judging.opinion import Opinion, Reply


def chance(replies: Sequence[Reply], seed: int) -> list[Opinion]:
    """Scores uniform in 0 … 1, of a text to a prompt always the same one, drawn by the seed."""
    return [Opinion(_drawn(reply, seed)) for reply in replies]


def _drawn(reply: Reply, seed: int) -> float:
    digest = hashlib.sha256(repr(reply).encode()).digest()
    return float(np.random.default_rng([seed, *digest]).random())
