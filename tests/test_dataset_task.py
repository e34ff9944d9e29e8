"""Tasks made of data: the task's contract on a finite pool, its identity, and files as sources."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.data.problems import draw, draw_mixture, is_held_out
from karploop.data.tasks import DatasetTask, Problem, get_task, register
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.judging.verifier import verifier

SUMS = [
    Problem(f"What is {a} + {b}?", str(a + b), 1 + (a > 9), f"row {a}")
    for a in range(20)
    for b in range(5)
]
TASK = DatasetTask("sums", lambda: SUMS)


def rng(seed=0):
    return np.random.default_rng(seed)


def of(*problems, **settings):
    return DatasetTask("small", lambda: [Problem(*p) for p in problems], **settings)


# The contract


def test_it_keeps_to_what_it_declares():
    for difficulty, space in ((1, 50), (2, 50), (3, 0)):
        prompts = list(TASK.prompts(difficulty))
        assert len(prompts) == len(set(prompts)) == TASK.space(difficulty) == space
        assert all(TASK.difficulty(p) == difficulty for p in prompts)
        if prompts:
            assert set(TASK.sample_many(rng(), difficulty, 2000)) == set(prompts)
            assert TASK.sample(rng(), difficulty) in prompts
    assert TASK.min_difficulty == 1
    assert TASK.max_prompt_length(1) == len("What is 9 + 4?")
    assert TASK.max_prompt_length(2) == TASK.max_prompt_length(9) == len("What is 19 + 4?")
    assert TASK.max_completion_length(1) == 2
    with pytest.raises(UserError, match="no problem has difficulty 3"):
        TASK.sample(rng(), 3)


def test_samples_are_uniform_and_reproducible():
    drawn = TASK.sample_many(rng(), 1, 10_000)
    assert drawn == TASK.sample_many(rng(), 1, 10_000)
    assert all(120 < n < 280 for n in Counter(drawn).values())


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_sides_of_the_split_are_disjoint_and_cover_the_pool(fraction):
    sides = []
    for held_out in (False, True):
        try:
            drawn = draw(TASK, 1, 1000, held_out=held_out, fraction=fraction, rng=rng())
        except UserError:
            drawn = []
        assert all(is_held_out(TASK, p, fraction) == held_out for p in drawn)
        sides += drawn
    assert sorted(sides) == sorted(TASK.prompts(1))


def test_mixtures_fill_up_from_the_difficulties_that_exist():
    prompts = draw_mixture(TASK, range(1, 6), 70, held_out=False, fraction=0.1, rng=rng())
    assert len(set(prompts)) == 70
    counts = Counter(map(TASK.difficulty, prompts))
    assert counts.keys() == {1, 2} and abs(counts[1] - counts[2]) <= 1


@given(st.text(min_size=1).filter(str.strip), st.sampled_from([" ", "\n", " \t "]))
def test_trivial_rewrites_fall_on_one_side(prompt, blank):
    for rewrite in (f"{blank}{prompt}{blank}", blank.join(prompt.split(" "))):
        assert TASK.split_key(rewrite) == TASK.split_key(prompt)
    assert TASK.split_key("What  IS 1 + 2?") == TASK.split_key("what is 1 + 2?\n")
    assert TASK.split_key("What is 1 + 2?") != TASK.split_key("What is 1 + 3?")


def test_gold_is_compared_but_for_white_space():
    task = of(("q", " two  words\n"))
    assert task.answer("q") == " two  words\n"
    assert task.verify("q", "two words") and task.verify("q", "\ntwo\twords ")
    for wrong in ("", "Two words", "twowords", "two words."):
        assert not task.verify("q", wrong)
    with pytest.raises(UserError, match="'Q' is no problem of task small"):
        task.verify("Q", "two words")


def test_a_scorer_sees_the_problem_and_the_stripped_completion():
    seen = []

    def scorer(problem, completion):
        seen.append((problem.evidence, completion))
        return completion in problem.evidence

    task = DatasetTask("any", lambda: [Problem("q", None, 1, "", {"a", "b"})], scorer)
    assert task.verify("q", " a\n") and not task.verify("q", "c")
    assert not task.verify("q", " ")
    assert seen == [({"a", "b"}, "a"), ({"a", "b"}, "c")]
    assert task.verifiable and not task.answered


def test_the_judge_works_on_it():
    prompts = ["What is 1 + 2?"] * 3
    verdicts = verifier(_samples(prompts, ["3", "4", " 3\n"], finished=[True, True, False]), TASK)
    assert list(verdicts.scores) == [1.0, 0.0, 0.0]


def _samples(prompts, completions, finished):
    return SimpleNamespace(prompts=prompts, completions=completions, finished_S=finished)


# The pool


def test_the_pool_is_read_once_and_only_when_needed():
    calls = []
    task = DatasetTask("lazy", lambda: calls.append(1) or SUMS)
    assert repr(task) and task.name and register(task) is task and not calls
    assert task.space(1) == 50 and task.identity and task.answered
    assert calls == [1]


def test_repeated_prompts_are_collapsed():
    task = of(("a", "1"), ("b", None), ("a", " 1 "), ("b", "2", 5), ("a", None), ("b", "2"))
    assert task.space(1) == 1 and task.space(5) == 1
    assert task.answer("a") == "1" and task.answer("b") == "2"


def test_two_answers_to_a_prompt_are_refused_unless_asked_for():
    rows = (("a", "1", 1, "line 1"), ("a", "2", 1, "line 2"))
    with pytest.raises(UserError, match="two answers.*'1' at line 1 and '2' at line 2.*conflicts"):
        of(*rows).space(1)
    assert of(*rows, conflicts="first").answer("a") == "1"
    with pytest.raises(UserError, match="'refuse' or 'first'"):
        of(*rows, conflicts="last")


@pytest.mark.parametrize("answer", [None, "", "  \n"])
def test_without_gold_there_is_nothing_to_verify(answer):
    task = of(("a", "1"), ("b", answer))
    assert not task.answered and not task.verifiable
    assert sorted(draw(task, 1, 5, held_out=False, fraction=0.0, rng=rng())) == ["a", "b"]
    assert task.verify("a", "1")
    with pytest.raises(UserError, match="'b'.* no gold answer to verify with; name the field"):
        task.verify("b", "")
    with pytest.raises(UserError, match="no gold answer"):
        task.answer("b")


def test_bad_pools_are_refused():
    with pytest.raises(UserError, match="no problems"):
        of().space(1)
    with pytest.raises(UserError, match="line 3.*blank"):
        of((" ", "1", 1, "line 3")).space(1)


def test_identity_follows_the_content():
    base = of(("a", "1"), ("b", "2"))
    same = of(("a", "1"), ("b", "2"), ("a", "1"))
    assert base.identity == same.identity
    assert base.identity.startswith("small ") and len(base.identity) == len("small ") + 64
    others = [
        of(("a", "1"), ("b", "3")),
        of(("a", "1"), ("c", "2")),
        of(("a", "1"), ("b", "2", 2)),
        of(("b", "2"), ("a", "1")),  # The order decides what is drawn.
        of(("a", "1"), ("b", None)),
        of(("a", "1"), ("b", "2"), version="2"),
    ]
    assert len({task.identity for task in (base, *others)}) == 7


def test_free_text_needs_a_pretrained_model():
    with pytest.raises(UserError, match="'sums' has no alphabet.*published"):
        CharTokenizer.for_tasks(TASK)


# Files

ROWS = [
    {"question": "1 + 1", "gold": "2", "level": 1, "prompt": "not this"},
    {"question": "2 + 2", "gold": 4, "level": 3, "prompt": "nor this"},
]
QUERY = "?prompt=question&answer=gold&difficulty=level"


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([r | {"gold": str(r["gold"])} for r in rows]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_files_with_named_fields(tmp_path, suffix):
    task = get_task(f"file:{write(tmp_path / f'data.{suffix}', ROWS)}{QUERY}&name=two")
    assert task.name == "two"
    assert list(task.prompts(3)) == ["2 + 2"] and task.space(1) == 1
    assert task.answer("2 + 2") == "4" and task.verify("1 + 1", "2 ")


def test_files_of_known_shapes(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"prompt": "1 + 1", "answer": 2}, {"messages": chat}, {"prompt": "open"}]
    name = f"file:{write(tmp_path / 'data.jsonl', rows)}"
    task = get_task(name)
    assert task.name == name
    assert list(task.prompts(1)) == ["1 + 1", "hi", "open"]
    assert task.answer("1 + 1") == "2" and task.answer("hi") == "hello"
    assert not task.answered


def test_the_identity_of_a_file_is_its_content(tmp_path):
    path = tmp_path / "data.jsonl"
    name = f"file:{path}?name=mine{QUERY.replace('?', '&')}"
    first = get_task(f"file:{write(path, ROWS)}?name=mine{QUERY.replace('?', '&')}").identity
    write(path, [ROWS[0], ROWS[1] | {"gold": 5}])
    assert get_task(name).identity != first
    write(path, ROWS)
    assert get_task(name).identity == first


def test_a_missing_file_is_named_when_it_is_needed(tmp_path):
    task = get_task(f"file:{tmp_path}/none.jsonl")
    with pytest.raises(UserError, match="none.jsonl"):
        task.space(1)


@pytest.mark.parametrize(
    "query, message",
    [
        ("?prompt=qestion", "line 1 has no field 'qestion'; did you mean 'question'"),
        ("?prompt=question&answer=god", "there is no field 'god'; did you mean 'gold'"),
        ("?prompt=question&difficulty=gold", "difficulty must be a whole number.*'2'"),
        ("?promt=question", "unknown parameter 'promt'; did you mean 'prompt'"),
        ("?prompt", "write parameters as"),
        ("?prompt=a&prompt=b", "'prompt' occurs twice"),
        ("?prompt=level", "must be text or a chat"),
        ("?conflicts=maybe", "'refuse' or 'first'"),
    ],
)
def test_mistakes_in_a_files_address(tmp_path, query, message):
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(UserError, match=message):
        get_task(f"file:{path}{query}").space(1)


@pytest.mark.parametrize("path", ["", "-", "?prompt=q"])
def test_a_file_needs_a_path(path):
    with pytest.raises(UserError, match="write the path"):
        get_task(f"file:{path}")


def test_values_may_be_percent_encoded(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"a&b": "1 + 1", "c+d": "2"}])
    task = get_task(f"file:{path}?prompt=a%26b&answer=c+d")
    assert task.answer("1 + 1") == "2"


def test_long_chats_are_no_prompts_of_a_task(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path / "data.jsonl", [{"messages": chat}])
    with pytest.raises(UserError, match="line 1.*single message"):
        get_task(f"file:{path}").space(1)
