"""The held-out split and drawing from it: disjoint, distinct, reproducible, exhaustive."""

import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.data import problems
from karploop.data.problems import draw, draw_mixture, is_held_out
from karploop.data.tasks import Copy, get_task, task_names
from karploop.errors import UserError

COPY = get_task("copy")
ADDITION = get_task("reverse_addition")
by_name = pytest.mark.parametrize("name", task_names())


def rng(seed=0):
    return np.random.default_rng(seed)


def both_sides(task, difficulty, count, fraction):
    return [
        draw(task, difficulty, count, held_out=side, fraction=fraction, rng=rng())
        for side in (False, True)
    ]


# The split


def test_the_split_never_changes():
    """Golden sides: they must hold in every process and Python version."""
    digits = [p for p in COPY.prompts(1) if is_held_out(COPY, p, 0.5)]
    sums = [p for p in islice(ADDITION.prompts(1), 20) if is_held_out(ADDITION, p, 0.5)]
    moved = (
        "the split moved: problems held out in earlier runs can now be trained on. "
        "Restore the hash or the split key."
    )
    assert digits == ["1=", "2=", "3=", "6=", "7=", "8="], moved
    assert sums == [
        "0+1=",
        "0+3=",
        "0+5=",
        "0+7=",
        "0+9=",
        "1+0=",
        "1+1=",
        "1+2=",
        "1+3=",
        "1+5=",
        "1+7=",
    ], moved


@by_name
def test_sides_are_disjoint_and_cover_the_space(name):
    task = get_task(name)
    train, held_out = both_sides(task, 2, 10**5, 0.3)
    assert set(train).isdisjoint(held_out)
    assert sorted(train + held_out) == sorted(task.prompts(2))


@given(st.integers(10, 99), st.integers(10, 99), st.floats(0, 1))
def test_commuted_operands_fall_on_one_side(a, b, fraction):
    for name in ("forward_addition", "reverse_addition", "interleaved_addition", "multiplication"):
        task = get_task(name)
        prompt, commuted = task.write(str(a), str(b)), task.write(str(b), str(a))
        assert is_held_out(task, prompt, fraction) == is_held_out(task, commuted, fraction)


def test_fraction_is_the_held_out_share_and_nests():
    prompts = list(COPY.prompts(4))
    small, large = ({p for p in prompts if is_held_out(COPY, p, f)} for f in (0.05, 0.2))
    assert small < large
    assert abs(len(large) / len(prompts) - 0.2) < 0.02
    assert not any(is_held_out(COPY, p, 0.0) for p in prompts)
    assert all(is_held_out(COPY, p, 1.0) for p in prompts)


def test_each_task_has_its_own_split():
    other = Copy(name="another_copy")
    sides = [(is_held_out(COPY, p, 0.5), is_held_out(other, p, 0.5)) for p in COPY.prompts(2)]
    assert len(set(sides)) == 4


# draw


@by_name
@pytest.mark.parametrize("held_out", [False, True])
def test_draws_are_distinct_and_on_the_asked_side(name, held_out):
    task = get_task(name)
    prompts = draw(task, 6, 300, held_out=held_out, fraction=0.2, rng=rng())
    assert len(prompts) == len(set(prompts)) == 300
    assert {task.difficulty(p) for p in prompts} == {6}
    assert {is_held_out(task, p, 0.2) for p in prompts} == {held_out}


@pytest.mark.parametrize("count", [5, 900, 2000])
def test_same_seed_same_draw(count):
    draws = [
        draw(COPY, 3, count, held_out=False, fraction=0.1, rng=rng(seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_small_space_gives_all_it_has_in_random_order():
    train, held_out = both_sides(COPY, 1, 50, 0.5)
    assert sorted(train + held_out) == [f"{digit}=" for digit in range(10)]
    orders = {tuple(draw(COPY, 1, 50, held_out=False, fraction=0.0, rng=rng(s))) for s in range(5)}
    assert len(orders) == 5


def test_excluded_prompts_do_not_return():
    first = draw(COPY, 3, 600, held_out=False, fraction=0.1, rng=rng(0))
    rest = draw(COPY, 3, 600, held_out=False, fraction=0.1, rng=rng(0), exclude=set(first))
    assert set(first).isdisjoint(rest)
    available = [p for p in COPY.prompts(3) if not is_held_out(COPY, p, 0.1)]
    assert sorted(first + rest) == available


@pytest.mark.parametrize("count", [1, 3, 8])
def test_draws_are_uniform_over_the_side(count):
    counts = Counter(
        prompt
        for seed in range(2000)
        for prompt in draw(COPY, 1, count, held_out=False, fraction=0.0, rng=rng(seed))
    )
    expected = 2000 * count / 10
    assert len(counts) == 10
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


def test_fifty_thousand_prompts_are_fast():
    start = time.perf_counter()
    prompts = draw(ADDITION, 16, 50_000, held_out=False, fraction=0.01, rng=rng())
    assert len(set(prompts)) == 50_000
    assert time.perf_counter() - start < 3


def test_no_prompt_left_is_the_users_error():
    everything = set(COPY.prompts(1))
    with pytest.raises(UserError, match="no training prompts are left at difficulty 1"):
        draw(COPY, 1, 5, held_out=False, fraction=0.1, rng=rng(), exclude=everything)
    with pytest.raises(UserError, match="no held-out prompts"):
        draw(COPY, 9, 5, held_out=True, fraction=0.0, rng=rng())
    with pytest.raises(UserError, match="no training prompts"):
        draw_mixture(COPY, [8, 9], 5, held_out=False, fraction=1.0, rng=rng())


def test_rejection_gives_up_on_a_space_that_is_all_but_excluded(monkeypatch):
    monkeypatch.setattr(problems, "_ENUMERABLE_SPACE", 1000)
    monkeypatch.setattr(problems, "_MIN_DRAWS", 100)
    excluded = set(COPY.prompts(4))
    with pytest.raises(UserError, match="gave 0 of the 1 prompts wanted"):
        draw(COPY, 4, 1, held_out=False, fraction=0.0, rng=rng(), exclude=excluded)


@pytest.mark.parametrize(
    "difficulty, count, fraction, message",
    [
        (0, 5, 0.1, "difficulty 0 does not exist"),
        (3, 0, 0.1, "cannot draw 0"),
        (3, 5, 1.5, "must lie in"),
        (3, 5, float("nan"), "must lie in"),
    ],
)
def test_arguments_out_of_range(difficulty, count, fraction, message):
    with pytest.raises(UserError, match=message):
        draw(COPY, difficulty, count, held_out=False, fraction=fraction, rng=rng())


# draw_mixture


def difficulty_counts(prompts):
    assert len(prompts) == len(set(prompts))
    return Counter(map(COPY.difficulty, prompts))


def test_mixture_is_even_where_spaces_allow():
    prompts = draw_mixture(COPY, range(4, 8), 402, held_out=True, fraction=0.2, rng=rng())
    assert sorted(difficulty_counts(prompts).values()) == [100, 100, 101, 101]
    assert all(is_held_out(COPY, p, 0.2) for p in prompts)
    assert len(difficulty_counts(prompts[:40])) == 4, "difficulties come mixed, not in blocks"


def test_mixture_fills_up_from_the_larger_spaces():
    prompts = draw_mixture(COPY, [1, 2, 5, 6], 1000, held_out=False, fraction=0.0, rng=rng())
    assert difficulty_counts(prompts) == {1: 10, 2: 100, 5: 445, 6: 445}


def test_mixture_of_small_spaces_gives_all_they_have():
    prompts = draw_mixture(COPY, [1, 2], 1000, held_out=False, fraction=0.0, rng=rng())
    assert difficulty_counts(prompts) == {1: 10, 2: 100}


def test_mixture_smaller_than_its_difficulties_favours_none():
    counts = Counter()
    for seed in range(300):
        prompts = draw_mixture(COPY, [3, 4, 5], 1, held_out=False, fraction=0.1, rng=rng(seed))
        counts += difficulty_counts(prompts)
    assert all(70 < counts[difficulty] < 130 for difficulty in (3, 4, 5))


def test_mixture_is_reproducible_and_respects_exclude():
    arguments = {"held_out": False, "fraction": 0.1}
    first = draw_mixture(COPY, [1, 3, 5], 500, rng=rng(3), **arguments)
    assert first == draw_mixture(COPY, [1, 3, 5], 500, rng=rng(3), **arguments)
    second = draw_mixture(COPY, [1, 3, 5], 500, rng=rng(3), exclude=frozenset(first), **arguments)
    assert set(first).isdisjoint(second)
    assert difficulty_counts(second)[1] == 0


def test_mixture_ignores_repeated_difficulties_and_needs_one():
    prompts = draw_mixture(COPY, [4, 4, 5], 100, held_out=False, fraction=0.1, rng=rng())
    assert difficulty_counts(prompts) == {4: 50, 5: 50}
    with pytest.raises(UserError, match="name at least one"):
        draw_mixture(COPY, [], 100, held_out=False, fraction=0.1, rng=rng())
