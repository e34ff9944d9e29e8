"""Tasks: gold answers against independent arithmetic, verifiers, declared bounds."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.data.tasks import (
    ForwardAddition,
    Multiplication,
    ScratchpadAddition,
    get_task,
    task_names,
)
from karploop.errors import UserError

ALL_TASKS = [get_task(name) for name in task_names()]
ARITHMETIC = [task for task in ALL_TASKS if task.name not in ("copy", "reverse")]
by_name = pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.name)

numbers = st.integers(0, 10**30)
digit_strings = st.text(alphabet="0123456789", min_size=1, max_size=30)


@st.composite
def equally_long_numbers(draw):
    length = draw(st.integers(1, 30))
    number = st.integers(10 ** (length - 1) if length > 1 else 0, 10**length - 1)
    return draw(number), draw(number)


def backwards(number):
    return str(number)[::-1]


def value_of_backwards(text):
    return sum(int(digit) * 10**place for place, digit in enumerate(text))


# Gold answers


@given(digit_strings)
def test_copy_and_reverse(text):
    assert get_task("copy").answer(f"{text}=") == text
    assert get_task("reverse").answer(f"{text}=") == "".join(reversed(text))


@given(equally_long_numbers())
def test_forward_addition(pair):
    a, b = pair
    assert get_task("forward_addition").answer(f"{a}+{b}=") == str(a + b)


@given(equally_long_numbers())
def test_reverse_addition(pair):
    a, b = pair
    answer = get_task("reverse_addition").answer(f"{backwards(a)}+{backwards(b)}=")
    assert len(answer) == len(str(a)) + 1
    assert value_of_backwards(answer) == a + b


@given(equally_long_numbers())
def test_interleaving_changes_the_prompt_only(pair):
    a, b = map(backwards, pair)
    prompt = "".join(x + y for x, y in zip(a, b, strict=True)) + "="
    plain, interleaved = get_task("reverse_addition"), get_task("interleaved_addition")
    assert interleaved.answer(prompt) == plain.answer(f"{a}+{b}=")
    assert interleaved.operands(prompt) == plain.operands(f"{a}+{b}=")


@given(equally_long_numbers())
def test_scratchpad_adds_digit_by_digit(pair):
    a, b = map(backwards, pair)
    prompt = "".join(x + y for x, y in zip(a, b, strict=True)) + "="
    steps, total = get_task("scratchpad_addition").answer(prompt).split(":")
    assert total == get_task("interleaved_addition").answer(prompt)
    carry, digits = 0, ""
    for step, x, y in zip(steps.split(","), a, b, strict=True):
        asked, found = step.split("=")
        assert asked == x + y
        assert int(found) == int(x) + int(y) + carry and len(found) == 2
        carry, digits = int(found[0]), digits + found[1]
    assert total == digits + str(carry)


@given(numbers, numbers)
def test_multiplication_trace_is_true_line_by_line(a, b):
    trace = get_task("multiplication").answer(f"{backwards(a)}*{backwards(b)}=")
    steps, product = trace.split("=")
    assert value_of_backwards(product) == a * b
    assert len(product) == len(str(a)) + len(str(b))

    terms = re.findall(r"(\d+)(?:\((\d+)\))?", steps)
    assert len(terms) == len(str(b))
    total = 0
    for place, (partial, running_sum) in enumerate(terms):
        assert value_of_backwards(partial) == a * int(backwards(b)[place]) * 10**place
        assert len(partial) == len(str(a)) + 1 + place
        total += value_of_backwards(partial)
        if 0 < place < len(terms) - 1:
            assert value_of_backwards(running_sum) == total
        else:
            assert running_sum == ""
    assert total == a * b


@pytest.mark.parametrize(
    "name, prompt, answer",
    [
        ("copy", "0314=", "0314"),
        ("reverse", "0314=", "4130"),
        ("reverse_addition", "321+654=", "9750"),
        ("interleaved_addition", "362514=", "9750"),
        ("forward_addition", "999+001=", None),
        ("forward_addition", "999+100=", "1099"),
        ("scratchpad_addition", "785612=", "78=15,56=12,12=04:5240"),
        ("multiplication", "7*6=", "24=24"),
        (
            "multiplication",
            "9172*9431=",
            "17442+067801(132331)+0075180(1398490)+00091720=13976630",
        ),
    ],
)
def test_formats_by_example(name, prompt, answer):
    if answer is None:
        with pytest.raises(UserError, match="leading zeros"):
            get_task(name).answer(prompt)
    else:
        assert get_task(name).answer(prompt) == answer


# The verifier


@by_name
@pytest.mark.parametrize("difficulty", [1, 2, 5, 12])
def test_verify_accepts_gold_and_rejects_perturbed_answers(task, difficulty):
    rng = np.random.default_rng(0)
    for prompt in task.sample_many(rng, difficulty, 20):
        gold = task.answer(prompt)
        assert task.verify(prompt, gold)
        assert task.verify(prompt, f" {gold}\n")
        changed_digit = gold[:-1] + str((int(gold[-1]) + 1) % 10)
        for wrong in ("", changed_digit, gold[:-1], gold + "0", gold + "="):
            assert not task.verify(prompt, wrong)


def test_multiplication_verifies_the_final_answer_and_not_the_trace():
    task, prompt = get_task("multiplication"), "21*43="  # 12 · 34 = 408
    gold = task.answer(prompt)
    assert gold == "840+0630=8040"
    assert task.normalise(gold) == "8040"
    assert task.verify(prompt, "999+0000=8040")
    assert task.verify(prompt, "=8040")
    told = " ".join(Multiplication.__doc__.split())  # Python 3.13 takes indentation out of it
    assert "wrong trace with the right product counts as right" in told


def test_a_multiplication_without_equals_sign_gives_no_answer():
    task = get_task("multiplication")
    assert task.normalise("8040") == ""
    assert not task.verify("21*43=", "8040")


def test_a_scratchpad_is_not_verified_unless_asked():
    lenient, strict = (
        get_task("scratchpad_addition"),
        ScratchpadAddition("strict", check_steps=True),
    )
    prompt, gold = "785612=", "78=15,56=12,12=04:5240"
    for task in (lenient, strict):
        assert task.verify(prompt, f" {gold}\n")
        assert not task.verify(prompt, "78=15,56=12,12=04:5250")
        assert not task.verify(prompt, "5240")
    assert lenient.verify(prompt, "78=99:5240") and not strict.verify(prompt, "78=99:5240")
    with pytest.raises(UserError, match="name of its own"):
        ScratchpadAddition(check_steps=True)


def test_a_hint_is_the_answer_without_the_scratchpad():
    task = get_task("scratchpad_addition")
    assert task.hinted("785612=") == "785612(5240)="
    for difficulty in (1, 2, 7):
        prompts = task.sample_many(np.random.default_rng(0), difficulty, 50)
        hinted = [task.hinted(prompt) for prompt in prompts]
        assert {len(text) for text in hinted} == {task.max_hinted_length(difficulty)}
        assert set("".join(hinted)) <= set(task.alphabet)
    with pytest.raises(UserError, match="no problem of task scratchpad_addition"):
        task.hinted("785612(5240)=")


# What a task declares about itself


@by_name
@pytest.mark.parametrize("difficulty", [1, 2, 3, 7, 20])
def test_samples_keep_to_what_is_declared(task, difficulty):
    rng = np.random.default_rng(difficulty)
    prompts = task.sample_many(rng, difficulty, 200) + [task.sample(rng, difficulty)]
    answers = [task.answer(prompt) for prompt in prompts]
    assert {task.difficulty(prompt) for prompt in prompts} == {difficulty}
    assert max(map(len, prompts)) == task.max_prompt_length(difficulty)
    assert max(map(len, answers)) == task.max_completion_length(difficulty)
    assert set("".join(prompts + answers)) <= set(task.alphabet)


@by_name
@pytest.mark.parametrize("difficulty", [1, 2])
def test_space_counts_the_prompts(task, difficulty):
    prompts = list(task.prompts(difficulty))
    assert len(prompts) == len(set(prompts)) == task.space(difficulty)
    assert {task.difficulty(prompt) for prompt in prompts} == {difficulty}


@by_name
def test_samples_reach_the_whole_space(task):
    rng = np.random.default_rng(0)
    assert set(task.sample_many(rng, 1, 2000)) == set(task.prompts(1))


def test_samples_are_uniform():
    rng = np.random.default_rng(0)
    sums = [sum(map(int, p[:-1].split("+"))) for p in ForwardAddition().sample_many(rng, 3, 20_000)]
    # Two uniform draws from 100..999: mean 1099, deviation 367, so the mean's error is 2.6.
    assert abs(np.mean(sums) - 1099) < 10


def test_multiplication_samples_every_shape_equally():
    rng = np.random.default_rng(0)
    task = Multiplication()
    shapes = [tuple(map(len, task.operands(p))) for p in task.sample_many(rng, 3, 5000)]
    counts = [shapes.count(shape) for shape in [(1, 3), (2, 3), (3, 1), (3, 2), (3, 3)]]
    assert sum(counts) == 5000
    assert all(880 < count < 1120 for count in counts)
    assert len(set(shapes[:50])) == 5, "shapes come mixed, not in blocks"


@pytest.mark.parametrize("task", ARITHMETIC, ids=lambda task: task.name)
def test_commuted_operands_share_a_split_key(task):
    prompt, commuted = task.write("12", "34"), task.write("34", "12")
    assert prompt != commuted
    assert task.split_key(prompt) == task.split_key(commuted)
    assert task.split_key(prompt) != task.split_key(task.write("13", "24"))


@by_name
@pytest.mark.parametrize(
    "prompt", ["", "=", "12", "x=", "²=", "1+=", "12+3=", "00+10=", "01*2=", "1*20=", "123=\n"]
)
def test_text_that_is_no_problem_is_refused(task, prompt):
    if prompt == "01*2=" and task.name == "multiplication":
        assert task.operands(prompt) == ("10", "2")  # Least significant digit first.
        return
    with pytest.raises(UserError, match=f"no problem of task {task.name}"):
        task.answer(prompt)
