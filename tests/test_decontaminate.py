"""Overlaps between training and held-out prompts: against a slow reference, and case by case."""

import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.data.decontaminate import CLEAN, EXACT, NGRAM, QUOTED, find_overlaps, words
from karploop.errors import UserError

STORY = "Anna has seven red apples and gives three of them to Ben before lunch, on a rainy Monday."


def reasons(held_out, training, **settings):
    return find_overlaps(held_out, training, **settings).reasons


# Words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("What is 3*4?", ["what", "is", "3", "*", "4"]),
        ("It costs $3.50.", ["it", "costs", "$", "3.50"]),
        ("x = -1; 5! or 5", ["x", "=", "-", "1", "5", "!", "or", "5"]),
        ("Don't “quote” me:", ["don", "t", "quote", "me"]),
        ("你好，世界", ["你", "好", "世", "界"]),
        ("CAFE\u0301", ["caf\u00e9"]),
        ("?", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@given(st.text())
def test_words_do_not_depend_on_case_and_white_space(text):
    assert words("  ".join(text.split(" "))) == words(text)
    assert words(f"\n{text}\t") == words(text)
    assert words(text.casefold()) == words(text)


# Short prompts


def test_few_words_are_compared_as_a_whole():
    held_out = ["What is 3 * 4?"]
    cases = {
        "What is 3 * 4?": EXACT,
        "what is 3*4": EXACT,
        "What is 3 + 4?": CLEAN,
        "What is 3 * 4 * 5?": CLEAN,
        "What is 13 * 4?": CLEAN,
        "What is 4 * 3?": CLEAN,
        "Answer this: What is 3 * 4? Think first.": QUOTED,
        "Q: what is 3 * 4\nA: 12": QUOTED,
    }
    assert reasons(held_out, list(cases)) == list(cases.values())


def test_a_few_word_task_has_exact_overlaps_alone():
    held_out = [f"What is {a} * {b}?" for a in range(10) for b in range(10)]
    training = [f"What is {a} * {b}?" for a in range(5, 40) for b in range(40)]
    found = find_overlaps(held_out, training)
    assert found.summary["exact"] == 50
    assert found.summary["clean"] == len(training) - 50
    known = set(held_out)
    assert [r == EXACT for r in found.reasons] == [p in known for p in training]


def test_prompts_without_words_are_compared_as_text():
    assert reasons(["?", ""], ["?", "??", ""]) == [EXACT, CLEAN, EXACT]


# Long prompts


def test_a_long_overlap_is_found_within_other_text():
    thirteen = " ".join(STORY.split()[1:14])
    assert reasons([STORY], [f"Well: {thirteen} indeed", thirteen[:-8]]) == [NGRAM, CLEAN]
    assert reasons([STORY], [thirteen], n=14) == [CLEAN]


def test_the_first_held_out_row_is_told():
    found = find_overlaps(["other", STORY, STORY + " More."], ["x", "So. " + STORY, STORY, "Other"])
    assert found.held_out_S.tolist() == [-1, 1, 1, 0]
    assert found.clean_S.tolist() == [True, False, False, False]
    assert found.reasons == [CLEAN, NGRAM, EXACT, EXACT]


def test_a_copied_solution_counts_where_answers_are_given():
    long = " ".join(f"step{i}" for i in range(20))
    arguments = (["How many?"], ["How much?"])
    answers = {"held_out_answers": [f"First {long}"], "training_answers": [f"Then {long}"]}
    assert reasons(*arguments) == [CLEAN]
    assert reasons(*arguments, **answers) == [NGRAM]
    assert reasons(*arguments, held_out_answers=[None], training_answers=[long]) == [CLEAN]


def test_other_answers_to_an_exact_overlap_are_counted():
    found = find_overlaps(
        ["a", "b"], ["a", "b", "b"], held_out_answers=["1", "2"], training_answers=["1", "3", " 2"]
    )
    assert found.summary == {
        "rows": 3,
        "held_out": 2,
        "clean": 0,
        "exact": 3,
        "quoted": 0,
        "ngram": 0,
        "exact_other_answer": 1,
    }


# Templates

FRAME = (
    "You are a careful assistant who answers every question in one word and never explains. "
    "Suppose that {a} birds sit on the old fence behind the house and {b} of them fly away south. "
    "How many birds are left on the fence behind the house at the end of the day?"
)


def test_text_that_many_prompts_share_does_not_count():
    held_out = [FRAME.format(a=a, b=b) for a in range(50, 60) for b in range(40)]
    training = [FRAME.format(a=a, b=b) for a in range(60, 90) for b in range(40)]
    leak = FRAME.format(a=55, b=7)
    found = find_overlaps(held_out, [*training, leak, leak.upper()])
    assert set(found.reasons[:-2]) == {CLEAN}
    assert found.reasons[-2:] == [EXACT, EXACT]
    assert NGRAM in reasons(held_out, training[:5]), "what five share is no template"


def test_copies_of_one_prompt_make_no_template():
    training = [f"Listen. {STORY}"] * 50 + [f"w{i}" for i in range(50)]
    assert reasons([STORY], training) == [NGRAM] * 50 + [CLEAN] * 50


def test_common_quotations_are_template():
    held_out = ["Think step by step."]
    training = [f"Think step by step. Case {i}?" for i in range(30)]
    assert set(reasons(held_out, training)) == {CLEAN}
    assert set(reasons(held_out, training, common=1.0)) == {QUOTED}
    assert reasons(held_out, [*training, "Think step by step"])[-1] == EXACT


# Against a reference

vocabulary = st.sampled_from(["a", "b", "c", "1", "+"])
texts = st.lists(vocabulary, max_size=9).map(" ".join)


def slow(held_out, training, n):
    """The definition, without templates: at most ten training prompts."""
    expected = []
    for text in training:
        found = text.split()
        if any(found == known.split() for known in held_out):
            expected.append(EXACT)
            continue
        runs = {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}
        hit = any(
            tuple(k[i : i + n]) in runs
            for known in held_out
            for k in [known.split()]
            for i in range(len(k) - n + 1)
        )
        expected.append(NGRAM if hit else CLEAN)
    return expected


@given(st.lists(texts, max_size=6), st.lists(texts, max_size=10), st.integers(3, 5))
def test_same_as_the_definition(held_out, training, n):
    found = find_overlaps(held_out, training, n=n)
    assert found.reasons == slow(held_out, training, n)
    assert len(found.held_out_S) == len(training) == found.summary["rows"]
    counts = [found.summary[k] for k in ("clean", "exact", "quoted", "ngram")]
    assert counts == [found.reasons.count(r) for r in (CLEAN, EXACT, QUOTED, NGRAM)]


@given(st.lists(st.text(max_size=30), max_size=5), st.lists(st.text(max_size=30), max_size=5))
def test_repetition_is_always_found(held_out, training):
    found = find_overlaps(held_out, [*training, *held_out])
    assert found.reasons[len(training) :] == [EXACT] * len(held_out)
    assert np.array_equal(found.clean_S, [r == CLEAN for r in found.reasons])


@given(st.lists(texts, max_size=6), st.lists(texts, min_size=1, max_size=9), st.randoms())
def test_the_order_of_training_rows_does_not_matter(held_out, training, order):
    shuffled = list(range(len(training)))
    order.shuffle(shuffled)
    expected = reasons(held_out, training, n=3)
    assert reasons(held_out, [training[i] for i in shuffled], n=3) == [
        expected[i] for i in shuffled
    ]


def test_arguments_out_of_range():
    with pytest.raises(UserError, match="n is 2"):
        find_overlaps([], [], n=2)
    with pytest.raises(UserError, match="common is 2"):
        find_overlaps([], [], common=2)
    with pytest.raises(UserError, match="1 prompts and 2 answers"):
        find_overlaps(["a"], [], held_out_answers=["1", "2"])


def test_twenty_thousand_prompts_are_fast():
    rng = random.Random(0)
    training = [" ".join(f"w{rng.randrange(9999)}" for _ in range(30)) for _ in range(20_000)]
    start = time.process_time()
    found = find_overlaps([t + " x" for t in training[:500]], training)
    assert found.summary["ngram"] == 500
    assert time.process_time() - start < 6
