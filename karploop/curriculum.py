"""How hard each round's problems are.

Round 0 samples one step beyond the seed data. From then on the newest difficulty grows by a step
whenever enough of what was sampled there has been kept; a round samples the newest difficulty and,
with `spread` above 1, those just below it. Only the filter's decisions enter, so that a label-free
filter leaves the curriculum label-free.
"""

from __future__ import annotations

import numpy as np

from karploop.config import Config


def first(config: Config) -> int:
    """The newest difficulty of round 0."""
    return _capped(config, config.task.seed_difficulty + config.generate.difficulty_step)


def window(config: Config, newest: int) -> list[int]:
    """Difficulties that a round samples, in equal numbers."""
    learnt = config.task.seed_difficulty if config.generate.difficulty_step else 0
    lowest = max(newest - config.generate.spread + 1, learnt + 1)
    return list(range(min(lowest, newest), newest + 1))


def following(config: Config, newest: int, difficulty_S: np.ndarray, kept_S: np.ndarray) -> int:
    """The newest difficulty of the next round, from what this one kept."""
    at_newest_S = difficulty_S == newest
    if not at_newest_S.any() or kept_S[at_newest_S].mean() < config.generate.advance:
        return newest
    return _capped(config, newest + config.generate.difficulty_step)


def hardest(config: Config) -> int:
    """The largest difficulty that any stage of the run may touch."""
    reach = config.task.seed_difficulty + config.rounds * config.generate.difficulty_step
    seen = [config.task.seed_difficulty, *config.evaluate.difficulties]
    return max([*seen, _capped(config, reach)])


def _capped(config: Config, difficulty: int) -> int:
    return min(difficulty, config.generate.max_difficulty or difficulty)
