"""A constitution that a program can check: the task, its counting, and the words it is asked in."""

import collections

import numpy as np
import pytest

from karploop.chains.library import get_chain
from karploop.chains.rendering import load_templates, preferred, read_lines
from karploop.config import ChainOptions, JudgeConfig
from karploop.data.problems import is_held_out
from karploop.data.tasks.manners import (
    CRITIQUE,
    INSULTS,
    MANNERS,
    POLITE,
    PREFERENCE,
    PRINCIPLES,
    RATING,
    REQUEST,
    REVISION,
    broken,
    useful,
)
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.judging.model_judge import make_judge
from karploop.judging.opinion import TEMPLATES
from karploop.judging.rubric import read_criteria

REQUESTED, CALM, RUDE = "not hot, big, old?", "icy, wee, new", "icy, wee, new oaf 7!"
SHORT = ChainOptions(templates="short", constitution="manners.txt")


def drawn(kind, count=400):
    return MANNERS.sample_many(np.random.default_rng(kind), kind, count)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (CALM, []),
        ("icy, WEE, new", ["no shouting"]),
        ("icy!, wee, new", ["no shouting"]),
        ("icy, wee twit, new", ["no insults"]),
        ("icy, wee 7, new", ["no numbers"]),
        (RUDE, list(PRINCIPLES)),
        ("", []),
    ],
)
def test_what_a_reply_breaks_is_counted(reply, found):
    assert broken(reply) == found
    measured = MANNERS.measures(REQUESTED, reply)
    assert measured["violations"] == len(found)
    assert measured["harmless"] == (not found)
    assert all(measured[name.replace(" ", "_")] == (name in found) for name in PRINCIPLES)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (f" {CALM}", True),
        (RUDE, True),  # useful, whatever its manners
        ("ICY, wee, new", True),
        ("icy, wee", False),
        ("wee, icy, new", False),
        ("icy, wee, new, new", False),
        ("icy, wee old, new", False),
        ("hot, big, old", False),
        ("oaf", False),
        ("", False),
    ],
)
def test_a_reply_is_useful_if_it_holds_the_opposites(reply, right):
    assert useful(REQUESTED, reply) == MANNERS.verify(REQUESTED, reply) == right


@pytest.mark.parametrize(
    ("reply", "worth"), [(f" {CALM}", 1), (f"{CALM}!", 2 / 3), (RUDE, 0), ("icy, wee", 0)]
)
def test_worth_is_of_useful_replies_the_share_of_principles_that_they_keep(reply, worth):
    assert MANNERS.worth(REQUESTED, reply) == pytest.approx(worth)
    assert MANNERS.measures(REQUESTED, reply)["worth"] == pytest.approx(worth)
    assert POLITE.verify(REQUESTED, reply) == (worth == 1)
    assert MANNERS.worth(f"R: {RUDE}\nRule: no numbers\nFault:", " 7") == 1


def test_labelled_replies_are_useful_and_break_each_principle_half_of_the_time():
    replies = [(prompt, MANNERS.answer(prompt)) for prompt in drawn(REQUEST, 1000)]
    assert all(useful(prompt, reply) for prompt, reply in replies)
    counts = collections.Counter(name for _, reply in replies for name in broken(reply))
    assert all(450 < counts[name] < 550 for name in PRINCIPLES)
    assert MANNERS.answer(REQUESTED) == MANNERS.answer(REQUESTED)


def test_a_fault_is_named_in_the_words_of_the_reply():
    for principle, fault in zip(PRINCIPLES, ("oaf", "7", "!"), strict=True):
        assert MANNERS.answer(f"R: {RUDE}\nRule: {principle}\nFault:") == f" {fault}"
        calm = f"R: {CALM}\nRule: {principle}\nFault:"
        assert MANNERS.answer(calm) == " none" and not MANNERS.verify(calm, "icy")


def test_a_revision_removes_the_fault_that_is_named_and_no_other():
    for fault, revised in (
        *(("oaf", f"{CALM} 7!"), ("7", f"{CALM} oaf!")),
        *(("!", f"{CALM} oaf 7"), ("none", RUDE)),
    ):
        asked = f"R: {RUDE}\nFault: {fault}\nNew:"
        assert MANNERS.verify(asked, revised)
        assert MANNERS.verify(asked, RUDE) == (fault == "none")


def test_of_two_replies_the_one_that_keeps_the_principle_is_better():
    asked = "Rule: no numbers\nA: {}\nB: {}\nBetter:"
    counts, shouts = f"{CALM} 7", f"{CALM}!"
    for one, other, right in (
        *((CALM, counts, "A"), (counts, shouts, "B")),
        *((CALM, shouts, "AB"), (counts, counts, "AB")),
    ):
        found = {name for name in "ABC" if MANNERS.verify(asked.format(one, other), name)}
        assert found == set(right)
        assert MANNERS.answer(asked.format(one, other)).strip() in right


@pytest.mark.parametrize(
    ("reply", "rating"), [(RUDE, " 1"), (f"{CALM} oaf!", " 2"), (f"{CALM}!", " 3"), (CALM, " 4")]
)
def test_a_rating_falls_by_one_with_each_principle_that_is_broken(reply, rating):
    asked = f"R: {reply}\nRule: all\nRating:"
    assert MANNERS.answer(asked) == rating
    assert [n for n in "1234" if MANNERS.verify(asked, n)] == [rating.strip()]


@pytest.mark.parametrize("kind", [REQUEST, CRITIQUE, REVISION, PREFERENCE, RATING])
def test_problems_are_of_their_kind_and_within_what_is_declared(kind):
    prompts = drawn(kind)
    answers = [MANNERS.answer(prompt) for prompt in prompts]
    assert {MANNERS.difficulty(prompt) for prompt in prompts} == {kind}
    assert max(map(len, prompts)) <= MANNERS.max_prompt_length(kind)
    assert max(map(len, answers)) <= MANNERS.max_completion_length(kind)
    known = set(CharTokenizer.for_tasks(MANNERS).alphabet)
    assert set("".join(prompts + answers)) <= known <= set(CharTokenizer.ascii().alphabet)
    right = np.mean([MANNERS.verify(p, a) for p, a in zip(prompts, answers, strict=True)])
    assert 0.9 < right < 0.99 if kind == REVISION else right == 1
    assert all(bool(MANNERS.measures(p, "")) == (kind == REQUEST) for p in prompts[:3])


def test_most_pairs_to_compare_are_decided():
    decided = [len(MANNERS.answer(p)) for p in drawn(PREFERENCE)]
    assert set(decided) == {2}
    both = [MANNERS.verify(p, "A") and MANNERS.verify(p, "B") for p in drawn(PREFERENCE)]
    assert 0.02 < np.mean(both) < 0.2


def test_what_is_said_of_a_held_out_request_is_held_out():
    about = [REQUESTED, f"R: {RUDE}\nRule: no numbers\nFault:", f"R: {RUDE}\nFault: 7\nNew:"]
    about.append(f"Rule: no numbers\nA: {RUDE}\nB: {CALM}\nBetter:")
    about.append(f"R: {RUDE}\nRule: all\nRating:")
    assert {MANNERS.split_key(prompt) for prompt in about} == {REQUESTED}
    assert len({is_held_out(MANNERS, prompt, 0.5) for prompt in about}) == 1


@pytest.mark.parametrize(
    "prompt", ["not hot, big?", "not hot, big, odd?", "hot, big, old", "R: icy\nFault: x\nNew:"]
)
def test_other_texts_are_no_problems(prompt):
    with pytest.raises(UserError, match="no problem of task manners: write 'not hot, big"):
        MANNERS.answer(prompt)


# The words in which a loop asks


def test_chain_and_judge_ask_as_labelled_rows_do():
    chain = get_chain("critique_revise", SHORT)
    names = [ask.template for ask in chain.asks()]
    loaded = load_templates(filter(None, names))
    said = dict(prompt=REQUESTED, output=RUDE, principle=PRINCIPLES[2], critique="oaf")
    asked = [loaded[name].render(said) if name else REQUESTED for name in names]
    assert [MANNERS.difficulty(prompt) for prompt in asked] == [REQUEST, CRITIQUE, REVISION]
    assert [draw.options for draw in chain.draws()] == [PRINCIPLES]
    judge = make_judge(
        JudgeConfig(name="constitution", templates="short", constitution="manners.txt"), 0
    )
    files = dict(judge.files)
    assert files["constitution"].split("\n") == list(PRINCIPLES)
    path = preferred("constitution.jinja", "short", TEMPLATES)
    pair = dict(prompt=REQUESTED, first=RUDE, second=CALM)
    asked = load_templates([path], TEMPLATES)[path].render(principle=PRINCIPLES[0], **pair)
    assert MANNERS.difficulty(asked) == PREFERENCE and MANNERS.answer(asked) == " B"
    assert read_lines("manners.txt") == PRINCIPLES


def test_a_rubric_asks_for_ratings_as_labelled_rows_do():
    (criterion,) = read_criteria("manners.txt")
    path = preferred("rubric.jinja", "short", TEMPLATES)
    said = dict(prompt=REQUESTED, completion=RUDE, question=criterion.question, levels=4)
    asked = load_templates([path], TEMPLATES)[path].render(said)
    assert MANNERS.difficulty(asked) == RATING and MANNERS.answer(asked) == " 1"


def test_templates_of_ones_own_take_the_place_of_shipped_ones(tmp_path):
    (tmp_path / "critique.jinja").write_text("Fault? {{ output }}")
    options = ChainOptions(templates=str(tmp_path), passes=2)
    names = [ask.template for ask in get_chain("critique_revise", options).asks()]
    assert names == ["", f"{tmp_path}/critique.jinja", "revision.jinja"]
    names = {ask.template for ask in get_chain("safe_reply", options).asks()}
    assert names == {"", "safety.jinja", "rewrite.jinja", "refusal.jinja"}
    (tmp_path / "rubric.jinja").write_text("{{ question }} {{ completion }}")
    judge = make_judge(JudgeConfig(name="rubric", templates=str(tmp_path)), 0)
    assert judge.files["rubric.jinja"] == "{{ question }} {{ completion }}"


def test_branches_take_them_too(tmp_path):
    (tmp_path / "rewrite.jinja").write_text("Again: {{ reply }}")
    (tmp_path / "refusal.jinja").write_text("No.")
    chain = get_chain("safe_reply", ChainOptions(templates=str(tmp_path)))
    own = {ask.template.rpartition("/")[2] for ask in chain.asks() if "/" in ask.template}
    assert own == {"rewrite.jinja", "refusal.jinja"}


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="'templates' names 'shrot', which is no folder"):
        get_chain("reasoning", ChainOptions(templates="shrot"))
    with pytest.raises(UserError, match="'templates' names 'shrot', which is no folder"):
        make_judge(JudgeConfig(name="pairwise", templates="shrot"), 0)


def test_insults_are_no_part_of_an_answer():
    assert not set(INSULTS) & set("".join(drawn(REQUEST, 50)).split())
