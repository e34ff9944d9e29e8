"""Tasks from Reasoning Gym: parameters, the data sets' own scorers, the same pool everywhere."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from karploop.data.problems import draw
from karploop.data.tasks import from_reasoning_gym, get_task
from karploop.data.tasks.from_reasoning_gym import _convert
from karploop.errors import UserError
from karploop.judging.verifier import verified

reasoning_gym = pytest.importorskip("reasoning_gym")

ARITHMETIC = "reasoning_gym/basic_arithmetic?min_terms=2&max_terms=2&max_digits=1&size=300"
SUMS = "reasoning_gym/chain_sum?max_terms=2&max_digits=1&size=50"


def test_a_pool_of_problems_with_gold_answers():
    task = get_task(ARITHMETIC)
    prompts = list(task.prompts(1))
    assert 100 < len(prompts) == len(set(prompts)) == task.space(1) <= 300
    for prompt in prompts[:30]:
        expression = prompt.removeprefix("Calculate ").removesuffix(".")
        gold = str(eval(expression.replace("/", "//")))
        assert task.answer(prompt) == gold
        assert task.verify(prompt, f" {gold}\n")
        assert not task.verify(prompt, str(int(gold) + 1))
        assert not task.verify(prompt, "")
    drawn = draw(task, 1, 20, held_out=True, fraction=0.3, rng=np.random.default_rng(0))
    assert len(set(drawn)) == 20


def test_the_data_sets_own_scorer_judges():
    prompt = next(get_task(SUMS).prompts(1))
    gold = get_task(SUMS).answer(prompt)
    for right in (gold, f"{gold}.0", f"{gold}."):
        assert get_task(SUMS).verify(prompt, right)
    assert not get_task(SUMS).verify(prompt, f"it is {gold}"), "part of the score is not right"
    assert get_task(f"{SUMS}&threshold=0.05").verify(prompt, f"it is {gold}")


def test_a_scorer_that_fails_is_no_verdict_and_measured_as_wrong():
    """It is not the 0 of a wrong answer: nobody has judged the text."""
    task = get_task("reasoning_gym/prime_factorization?size=5")
    prompt = next(task.prompts(1))
    texts = [task.answer(prompt), "2 × 2", "x"]
    assert [task.verify(prompt, text) for text in texts] == [True, False, False]
    one, two, three = verified([(prompt, text) for text in texts], task)
    assert (one.score, two.score, three.score) == (1.0, 0.0, None)
    assert two.reason == "" and three.reason == "the scorer failed (ValueError)"


def test_problems_with_many_solutions_have_no_gold_but_a_verifier():
    task = get_task("reasoning_gym/graph_color?size=3&min_num_vertices=4&max_num_vertices=4")
    prompt = next(task.prompts(1))
    assert task.verifiable and not task.answered
    assert not task.verify(prompt, "{}")
    with pytest.raises(UserError, match="no gold answer"):
        task.answer(prompt)


def test_it_is_made_once_a_process_and_only_when_needed(monkeypatch):
    made = []
    original = from_reasoning_gym._problems
    monkeypatch.setattr(from_reasoning_gym, "_problems", lambda *a: made.append(a) or original(*a))
    task = get_task("reasoning_gym/gcd?size=7")
    assert get_task("reasoning_gym/gcd?size=7") is task and not made
    assert task.space(1) == task.space(1) > 0 and len(made) == 1


def test_global_generators_are_left_alone():
    random.seed(5)
    np.random.seed(5)
    before = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    for name in ("list_functions", "pool_matrix"):
        assert get_task(f"reasoning_gym/{name}?size=4").space(1)
    assert (random.random(), np.random.random()) == before


def test_names_and_metrics():
    assert get_task(SUMS).name == SUMS
    named = get_task(f"{SUMS}&name=sums")
    assert named.name == "sums" and named.identity.startswith("sums ")
    assert named.identity != get_task(f"{SUMS}&name=sums&seed=1").identity
    assert named.identity != get_task(f"{SUMS}&name=sums&threshold=0.5").identity


@pytest.mark.parametrize(
    "name, message",
    [
        ("basic_aritmetic", "did you mean 'basic_arithmetic'.*It has: ab, acre"),
        ("", "has no ''.*It has: "),
        ("gcd?max_number=9", "unknown parameter 'max_number'; did you mean 'max_numbers'"),
        ("gcd?min_numbers=two", "'min_numbers' must be of type int, and is 'two'"),
        ("gcd?min_numbers=5&max_numbers=2", "gcd refuses these parameters: max_numbers"),
        ("gcd?size=0", "'size' at least 1"),
        ("gcd?seed=none", "'seed' must be a number"),
        ("gcd?threshold=0", r"'threshold' must lie in \(0, 1\]"),
        ("basic_arithmetic?whitespace=many", "one of no_space, single, random"),
        ("basic_arithmetic?allow_negation=maybe", "must be of type bool"),
        ("arc_agi?board_format_opts=x", "cannot be given in a name"),
        ("composite", "composite refuses these parameters"),
        ("n_queens", "evaluating them as Python code.*allow_eval=true"),
        ("codeio", "other problems in every process"),
    ],
)
def test_mistakes_in_an_address(name, message):
    with pytest.raises(UserError, match=message):
        get_task(f"reasoning_gym/{name}")


def test_evaluating_scorers_on_request():
    task = get_task("reasoning_gym/spiral_matrix?allow_eval=true&size=3")
    prompt = next(task.prompts(1))
    assert task.verify(prompt, task.answer(prompt))


def test_a_scorer_that_takes_anything_is_found_out():
    with pytest.raises(UserError, match="calls any text right"):
        get_task("reasoning_gym/game_of_life_halting?size=3").space(1)


def test_data_sets_that_depend_on_the_hash_seed_ask_for_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match="Set PYTHONHASHSEED=0"):
        get_task("reasoning_gym/ransom_note?size=3")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert get_task("reasoning_gym/ransom_note?size=3").space(1)


def test_values_are_typed_by_their_annotations():
    import datetime
    import enum
    from collections.abc import Sequence
    from typing import Literal

    kind = enum.Enum("Kind", {"A": "a", "B": "b"})
    for text, annotation, value in [
        ("3", int, 3),
        ("0.5", float, 0.5),
        ("True", bool, True),
        ("a+b", str, "a+b"),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("single", Literal["single", "random"], "single"),
        ("+,-", list[str], ["+", "-"]),
        ('["a,b", "c"]', tuple[str, ...], ("a,b", "c")),
        ("[0.5, 1]", list[float], [0.5, 1.0]),
        ("1,2", Sequence[int], [1, 2]),
        ("x,y", tuple, ("x", "y")),
        ("a", kind, kind.A),
        ("a,b", list[kind], [kind.A, kind.B]),
        ("2020-02-29", datetime.date, datetime.date(2020, 2, 29)),
    ]:
        assert _convert("it", text, annotation) == value
    with pytest.raises(UserError, match="is one of a, b, not 'c'"):
        _convert("it", "c", kind)
    with pytest.raises(UserError, match="no JSON list"):
        _convert("it", "[1", list[int])


IDENTITIES = """
import sys
from karploop.data.tasks import get_task
for name in sys.argv[1:]:
    print(get_task(name).identity)
"""


def identities(hash_seed, names):
    """The identities of the tasks as a process of its own finds them."""
    done = subprocess.run(
        [sys.executable, "-c", IDENTITIES, *names],
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_every_process_makes_the_same_pool():
    names = [ARITHMETIC, SUMS, *(f"reasoning_gym/{n}?size=20" for n in ("list_functions", "gcd"))]
    assert [get_task(n).identity for n in names] == identities(1, names)


@pytest.mark.slow
def test_which_data_sets_depend_on_the_hash_seed():
    """For a new release: what this finds belongs into the lists of from_reasoning_gym.py."""
    from reasoning_gym.factory import DATASETS

    hash_ordered = from_reasoning_gym._HASH_ORDERED
    names = sorted(set(DATASETS) - from_reasoning_gym._UNREPEATABLE - {"composite"})
    names.remove("game_of_life_halting")
    addresses = [f"reasoning_gym/{n}?size=6&allow_eval=true" for n in names]
    first, second = identities(1, addresses), identities(2, addresses)
    differ = {n for n, a, b in zip(names, first, second, strict=True) if a != b}
    assert differ == hash_ordered
    repeated = [f"reasoning_gym/{n}?size=6&allow_eval=true" for n in sorted(hash_ordered)]
    assert identities(0, repeated) == identities(0, repeated)
