"""Which difficulties a round samples, and what unlocks the next."""

import numpy as np
import pytest

from karploop import curriculum
from karploop.config import resolve


def config(**generate):
    return resolve({"rounds": 6, "task": {"seed_difficulty": 5}, "generate": generate})


def test_a_round_samples_one_step_beyond_the_seed_data_and_goes_on():
    c = config()
    newest = curriculum.first(c)
    assert curriculum.window(c, newest) == [6]
    rows = np.array([6, 6, 6])
    assert curriculum.following(c, newest, rows, np.array([False, False, False])) == 7


def test_spread_goes_down_to_the_seed_data_and_no_further():
    c = config(spread=3)
    assert curriculum.window(c, 6) == [6]
    assert curriculum.window(c, 7) == [6, 7]
    assert curriculum.window(c, 9) == [7, 8, 9]


def test_no_step_keeps_the_seed_difficulty():
    c = config(difficulty_step=0)
    assert curriculum.first(c) == 5
    assert curriculum.window(c, 5) == [5]
    assert curriculum.window(config(difficulty_step=0, spread=3), 5) == [3, 4, 5]


@pytest.mark.parametrize(("kept", "after"), [(0, 7), (1, 7), (2, 8)])
def test_the_yield_at_the_newest_difficulty_unlocks_the_next(kept, after):
    c = config(spread=2, advance=0.5)
    difficulty = np.array([6] * 4 + [7] * 4)
    kept_S = np.array([True] * 4 + [True] * kept + [False] * (4 - kept))
    assert curriculum.following(c, 7, difficulty, kept_S) == after


def test_the_cap_holds_and_bounds_the_longest_sequence():
    c = config(max_difficulty=8)
    assert curriculum.following(c, 8, np.array([8]), np.array([True])) == 8
    assert curriculum.hardest(config(max_difficulty=30)) == 11
    assert curriculum.hardest(config(max_difficulty=8)) == 10  # evaluated up to 10 by default
