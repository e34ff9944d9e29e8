"""Which difficulties a round samples, and what unlocks the next."""

import numpy as np
import pytest

from karploop import curriculum
from karploop.curriculum import Reach
from karploop.errors import UserError
from karploop.resolve import resolve


def config(**generate):
    return resolve({"rounds": 6, "task": {"seed_difficulty": 5}, "generate": generate})


def test_a_round_samples_one_step_beyond_the_seed_data_and_goes_on():
    c = config()
    reach = curriculum.first(c)
    assert curriculum.window(c, reach) == [6]
    rows = np.array([6, 6, 6])
    assert curriculum.following(c, reach, rows, np.array([False, False, False])).newest == 7


def test_spread_goes_down_to_the_seed_data_and_no_further():
    c = config(spread=3)
    assert curriculum.window(c, Reach(6, 1)) == [6]
    assert curriculum.window(c, Reach(7, 1)) == [6, 7]
    assert curriculum.window(c, Reach(9, 1)) == [7, 8, 9]


def test_no_step_keeps_the_seed_difficulty():
    c = config(difficulty_step=0)
    assert curriculum.first(c).newest == 5
    assert curriculum.window(c, Reach(5, 0)) == [5]
    assert curriculum.window(config(difficulty_step=0, spread=3), Reach(5, 0)) == [3, 4, 5]


@pytest.mark.parametrize(("kept", "after"), [(0, 7), (1, 7), (2, 8)])
def test_the_yield_at_the_newest_difficulty_unlocks_the_next(kept, after):
    c = config(spread=2, advance=0.5)
    difficulty = np.array([6] * 4 + [7] * 4)
    kept_S = np.array([True] * 4 + [True] * kept + [False] * (4 - kept))
    assert curriculum.following(c, Reach(7, 1), difficulty, kept_S).newest == after


def test_the_cap_holds_and_bounds_the_longest_sequence():
    c = config(max_difficulty=8)
    assert curriculum.following(c, Reach(8, 1), np.array([8]), np.array([True])).newest == 8
    assert curriculum.hardest(config(max_difficulty=30)) == 11
    assert curriculum.hardest(config(max_difficulty=8)) == 10  # evaluated up to 10 by default


def rounds_of(c, able):
    """The windows of six rounds, of which rows are kept up to difficulty able[round]."""
    reach, seen = curriculum.first(c), []
    for limit in able:
        seen.append(curriculum.window(c, reach))
        difficulty_S = np.repeat(seen[-1], 4)
        reach = curriculum.following(c, reach, difficulty_S, difficulty_S <= limit)
    return seen


def test_an_accelerated_curriculum_reaches_further_the_better_it_goes():
    c = config(curriculum="accelerated", max_difficulty=20, advance=0.9)
    assert rounds_of(c, [6, 8, 10, 10, 30, 30]) == [
        [6],
        [7, 8],  # one was unlocked
        [9, 10, 11],  # two were
        [11, 12, 13],  # 9 and 10, all below the first that failed
        [11],  # none was: a single step
        [12, 13],
    ]
    assert rounds_of(c, [30] * 6)[-2:] == [[16, 17, 18, 19, 20], [20]], "up to the hardest wanted"
    assert curriculum.hardest(c) == 20


def test_a_gap_is_not_jumped():
    c = config(curriculum="accelerated", max_difficulty=20, advance=0.5)
    difficulty_S, kept_S = np.array([9, 10, 11]), np.array([True, False, True])
    assert curriculum.following(c, Reach(11, 3), difficulty_S, kept_S) == Reach(11, 2)


def test_all_difficulties_from_the_first_round_on():
    c = config(curriculum="all", max_difficulty=8)
    assert rounds_of(c, [5, 30, 5, 5]) == [[6, 7, 8]] * 4
    assert curriculum.hardest(c) == 10


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (dict(curriculum="all"), "'config.generate.max_difficulty' above .* of 5"),
        (dict(curriculum="all", max_difficulty=8, difficulty_step=0), "'difficulty_step' to 1"),
        (dict(curriculum="accelerated", max_difficulty=8), "'config.generate.advance' to"),
    ],
)
def test_curricula_that_cannot_be_are_refused(generate, message):
    with pytest.raises(UserError, match=message):
        config(**generate)
