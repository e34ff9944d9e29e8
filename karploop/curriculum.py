"""How hard each round's problems are.

    step         Round 0 samples one step beyond the seed data. From then on the newest difficulty
                 grows by a step whenever enough of what was sampled there has been kept; a round
                 samples the newest difficulty and, with `spread` above 1, those just below it.
    accelerated  A round reaches further the better the one before went: all new difficulties up to
                 the last one of which enough was kept are unlocked at once, and the next round
                 reaches as many steps beyond them as were unlocked, and one more. It samples all
                 that it reaches anew. Where none was unlocked, it goes back to a single step.
    all          Every difficulty beyond the seed data, from round 0 on.

Only the filter's decisions enter, so that a label-free filter leaves the curriculum label-free. The
accelerated schedule of arXiv 2502.01612 unlocks difficulties that are 99% right by labels instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from karploop.config import Config


class Reach(NamedTuple):
    """What a round samples."""

    newest: int  # difficulty
    width: int  # how many difficulties up to it are new; 0: none, they have all been unlocked


def first(config: Config) -> Reach:
    """The reach of round 0."""
    seen, step = config.task.seed_difficulty, config.generate.difficulty_step
    if config.generate.curriculum == "all":
        return _capped(config, seen, config.generate.max_difficulty - seen)
    return _capped(config, seen, step)


def window(config: Config, reach: Reach) -> list[int]:
    """Difficulties that a round samples, in equal numbers."""
    learnt = config.task.seed_difficulty if config.generate.difficulty_step else 0
    spread = config.generate.spread
    if config.generate.curriculum != "step":
        spread += max(reach.width - 1, 0)
    lowest = max(reach.newest - spread + 1, learnt + 1)
    return list(range(min(lowest, reach.newest), reach.newest + 1))


def following(config: Config, reach: Reach, difficulty_S: np.ndarray, kept_S: np.ndarray) -> Reach:
    """The reach of the next round, from what this one kept."""
    step = config.generate.difficulty_step

    def passed(difficulty: int) -> bool:
        at_S = difficulty_S == difficulty
        return bool(at_S.any()) and kept_S[at_S].mean() >= config.generate.advance

    if config.generate.curriculum == "all":
        return reach
    if config.generate.curriculum == "step":
        return _capped(config, reach.newest, step) if passed(reach.newest) else reach
    known = reach.newest - reach.width
    unlocked = known
    while unlocked < reach.newest and passed(unlocked + 1):
        unlocked += 1
    return _capped(config, unlocked, step + unlocked - known)


def hardest(config: Config) -> int:
    """The largest difficulty that any stage of the run may touch."""
    generate = config.generate
    reach = generate.max_difficulty
    if generate.curriculum == "step":
        grown = config.task.seed_difficulty + config.rounds * generate.difficulty_step
        reach = min(grown, generate.max_difficulty or grown)
    return max(config.task.seed_difficulty, *config.evaluate.difficulties, reach)


def _capped(config: Config, known: int, more: int) -> Reach:
    """So many more difficulties than are known, up to the hardest that is wanted."""
    newest = min(known + more, config.generate.max_difficulty or known + more)
    return Reach(newest, max(newest - known, 0))
