"""What constant and random answers score."""

import numpy as np
import pytest

from karploop.data.baselines import majority_answer, random_answer_accuracy
from karploop.errors import UserError

GOLD = {f"q{i}": str(i % 3) for i in range(30)} | {f"r{i}": "1" for i in range(10)}
PROMPTS, ANSWERS = list(GOLD), list(GOLD.values())


def verify(prompt, completion):
    return GOLD[prompt] == completion


def rng():
    return np.random.default_rng(0)


def test_the_most_frequent_answer_wins():
    found = majority_answer(PROMPTS, ANSWERS, ["q1", "q2", "q3", "r1"], verify)
    assert found.answer == "1"
    assert found.accuracy == 0.5


def test_it_is_chosen_on_training_problems():
    found = majority_answer(["q0", "q3", "q1"], ["0", "0", "1"], ["r0", "r1"], verify)
    assert (found.answer, found.accuracy) == ("0", 0.0)


def test_a_lenient_verifier_may_prefer_a_rarer_answer():
    def lenient(prompt, completion):
        return completion == "any" or verify(prompt, completion)

    found = majority_answer([*PROMPTS, "q0"], [*ANSWERS, "any"], ["q0", "q1"], lenient)
    assert (found.answer, found.accuracy) == ("any", 1.0)
    few = majority_answer([*PROMPTS, "q0"], [*ANSWERS, "any"], ["q0"], lenient, candidates=1)
    assert few.answer == "1"


def test_random_answers_follow_their_frequencies():
    # Of 40 training answers 20 are "1" and 10 each "0" and "2".
    assert random_answer_accuracy(ANSWERS, ["q1"], verify, rng(), draws=4000) == pytest.approx(
        0.5, abs=0.04
    )
    expected = (20 / 40 * 20 + 10 / 40 * 20) / 40
    found = random_answer_accuracy(ANSWERS, PROMPTS, verify, rng(), draws=200)
    assert found == pytest.approx(expected, abs=0.03)


def test_they_need_problems():
    with pytest.raises(UserError, match="at least one"):
        majority_answer([], [], PROMPTS, verify)
    with pytest.raises(UserError, match="at least one"):
        random_answer_accuracy(ANSWERS, [], verify, rng())
