"""What a round trains on: labelled rows, and the kept rows of this round and of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from karploop.config import RegimeConfig, TrainConfig
from karploop.records import EXAMPLES_FILE, Examples
from karploop.stages import Artifact


@dataclass(frozen=True)
class Mixture:
    """Examples laid end to end with the weight at which each is drawn."""

    examples: Examples
    weights_N: np.ndarray


def mix(
    inputs: Mapping[str, Artifact],
    config: TrainConfig,
    regime: RegimeConfig,
    rng: np.random.Generator,
) -> Mixture:
    """Labelled rows and the kept rows that the regime wants, each with its weight.

    Args:
      inputs: 'seed', and 'kept_0' … 'kept_r', the selections of the rounds, newest last.
    """
    kept = sorted((n for n in inputs if n.startswith("kept_")), key=lambda n: int(n[5:]))
    parts = [Examples.from_table(inputs[name].table(EXAMPLES_FILE)) for name in ["seed", *kept]]
    examples = Examples.concatenate(parts)
    part_N = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if kept and regime.data == "budget":
        own = np.flatnonzero(part_N > 0)
        chosen = np.sort(rng.permutation(own)[: regime.budget])
        at = np.concatenate([np.flatnonzero(part_N == 0), chosen])
        examples = Examples.from_table(examples.to_table().take(at))
        part_N = part_N[at]
    seed_N, newest_N = part_N == 0, (part_N == len(kept)) & bool(kept)
    if kept and regime.seed_share == 0 and not seed_N.all():
        examples = Examples.from_table(examples.to_table().filter(~seed_N))
        seed_N, newest_N = seed_N[~seed_N], newest_N[~seed_N]
    shares = {}
    if kept and regime.seed_share > 0:
        shares["seed"] = (seed_N, regime.seed_share)
    if config.newest_share:
        shares["newest"] = (newest_N, config.newest_share)
    weights_N = draw_weights(examples.difficulty, config, *shares.values())
    return Mixture(examples, weights_N)


def draw_weights(
    difficulty_N: np.ndarray, config: TrainConfig, *groups: tuple[np.ndarray, float]
) -> np.ndarray:
    """How often each row is drawn, relative to the others (see `TrainConfig.mixing`).

    Args:
      groups: rows (member_N, bool) that have a share of all draws between them. Those in none of
        them have the rest. A share falls away where there are no such rows, or no others.
    """
    weights_N = np.ones(len(difficulty_N))
    if config.mixing == "by_difficulty":
        values, place_N, counts = np.unique(difficulty_N, return_inverse=True, return_counts=True)
        weights_N = (values / counts)[place_N]
    groups = [(member_N, share) for member_N, share in groups if member_N.any()]
    rest_N = ~np.logical_or.reduce([np.zeros(len(weights_N), bool), *(m for m, _ in groups)])
    if not rest_N.any():  # the shares of what there is, in proportion
        total = sum(share for _, share in groups)
        groups = [(member_N, share / total) for member_N, share in groups] if total else []
    left = 1.0 - sum(share for _, share in groups)
    totals = [weights_N[member_N].sum() for member_N, _ in groups]
    if groups and rest_N.any():
        weights_N[rest_N] *= left / weights_N[rest_N].sum()
    for (member_N, share), total in zip(groups, totals, strict=True):
        weights_N[member_N] *= share / total
    return weights_N
