"""What a round trains on: labelled rows, and what was kept in this round and in earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from karploop.config import RegimeConfig, TrainConfig
from karploop.records import HINTED_FILE, Record
from karploop.stages import Artifact


@dataclass(frozen=True)
class Mixture:
    """Rows laid end to end with the weight at which each is drawn."""

    rows: Record  # Examples, Contrasts or Episodes
    weights_N: np.ndarray


def mix(
    inputs: Mapping[str, Artifact],
    kind: type[Record],
    file: str,
    config: TrainConfig,
    regime: RegimeConfig,
    rng: np.random.Generator,
) -> Mixture:
    """Labelled rows and the kept rows that the regime wants, each with its weight.

    Args:
      inputs: 'seed' where labelled rows are learnt from, with hints if it has such, and 'kept_0' …
        'kept_r', of the rounds, newest last.
      kind: of record, in `file` of each.
    """
    kept = sorted((n for n in inputs if n.startswith("kept_")), key=lambda n: int(n[5:]))
    names = [*(["seed"] if "seed" in inputs else []), *kept]
    files = [(name, file) for name in names]
    if "seed" in inputs and HINTED_FILE in inputs["seed"].manifest.files:
        files.insert(1, ("seed", HINTED_FILE))
    parts = [inputs[name].table(file, kind.columns()) for name, file in files]
    part_N = np.repeat([name for name, _ in files], [len(part) for part in parts])
    chosen_N = np.ones(len(part_N), bool)
    if kept and regime.data == "budget":
        # A labelled row that counts as any other comes out of the budget, too.
        drawn = np.flatnonzero((part_N != "seed") | (regime.seed_share < 0))
        chosen_N[rng.permutation(drawn)[regime.budget :]] = False
    if kept and regime.seed_share == 0 and (part_N != "seed").any():
        chosen_N &= part_N != "seed"
    rows = kind.from_table(pa.concat_tables(parts).filter(chosen_N))
    part_N = part_N[chosen_N]
    groups = []
    if kept and regime.seed_share > 0:
        groups.append((part_N == "seed", regime.seed_share))
    if kept and config.newest_share:
        groups.append((part_N == kept[-1], config.newest_share))
    return Mixture(rows, draw_weights(rows.difficulty, config, *groups))


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
