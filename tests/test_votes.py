"""Votes in which one answer has many wordings, and votes and verifiers among other judges."""

from __future__ import annotations

import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from karploop.config import MODELS, TALLIES, JudgeConfig, JudgingConfig
from karploop.data.tasks import get_task
from karploop.errors import RunFailed, UserError
from karploop.judging import equivalence, math_process
from karploop.judging.ensemble import read_members
from karploop.judging.equivalence import Mathematics, classes, identity
from karploop.judging.model_judge import make_judge
from karploop.judging.ranking import Group
from karploop.judging.vote import vote
from karploop.machinery import prepare
from karploop.offline_judge import run_file
from karploop.records import Samples
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.schema import lay

pytest.importorskip("math_verify")

REVERSE = get_task("reverse")
# What no memory holds; what takes a parser, or algebra, longer than anybody waits.
HUGE = ["$9^{9^{9^9}}$", "9^{9^{99}}", "$1000000!$", "10^{-400}", r"\sum_{i=1}^{10^9} \frac{1}{i}"]
DEEP = "{" * 1000 + "1" + "}" * 1000
BROAD = ["$(x+y+z+w+u)^{60}$", "$(x+y+z+w+u)^{59}$"]


@pytest.fixture(scope="module")
def mathematics():
    with Mathematics() as made:
        yield made


# -- what is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "So the share is 1/2."),
        ("1,234", "1234.0"),
        ("0,5", "1/2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("3!", "6"),
        ("2**10", "1024"),
        ("-05", "-5"),
        ("x = 3", "3"),
        ("3", "x = 3"),
        (r"it is \boxed{7}", "**7**"),
        ("{1, 2}", r"\{2, 1\}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1&\frac{4}{2}\end{pmatrix}"),
    ],
)
def test_wordings_of_one_answer(one, other):
    assert math_process.answer([one, other]) and math_process.answer([other, one])


@pytest.mark.parametrize(
    "one, other",
    [
        ("1/2", "0.51"),
        ("2^{10}", "2"),  # and not what a search for a number finds in it
        ("3!", "3"),
        ("x + 1", "x + 2"),
        ("1/0", "2/0"),
        ("hello", "Hello"),
        ("", ""),
        ("2", "two"),
        *((huge, "1") for huge in HUGE),
        *((huge, huge + " ") for huge in HUGE),
    ],
)
def test_other_answers_and_what_is_none(one, other):
    assert not math_process.answer([one, other]) and not math_process.answer([other, one])


@pytest.mark.parametrize("text", ["", "hello", "\ud800", "1" * 5000, "$", "\\", *HUGE])
def test_what_cannot_be_computed_with_is_no_mathematics(mathematics, text):
    assert not mathematics.readable(text)


def test_what_takes_too_long_is_given_up_and_the_next_question_answered():
    with Mathematics(seconds=1.0) as mathematics:
        assert not mathematics.readable(DEEP) and mathematics.given_up == 1
        assert mathematics.readable(BROAD[0]) and not mathematics.same(*BROAD)
        assert mathematics.given_up == 2
        assert mathematics.same("1/2", "0.5") and mathematics.given_up == 2
        with ThreadPoolExecutor(1) as pool:  # where an alarm of this process would not ring
            assert pool.submit(mathematics.same, "0.25", "1/4").result()


def test_a_process_that_somebody_else_ends_is_no_verdict():
    with Mathematics() as mathematics:
        assert mathematics.readable("1")
        os.kill(mathematics._process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="ended with -9"):
            mathematics.readable("2")


def test_classes_do_not_depend_on_the_order_and_join_what_a_third_joins(mathematics):
    """0.3333334 and 1/3 are the same to six decimals, and so are 1/3 and 0.333333."""
    texts = ["1/3", "0.333333", "0.3333334", "1/2", "a third", ""]
    assert not mathematics.same("0.333333", "1/2")
    for order in itertools.permutations(texts):
        found = dict(zip(order, classes(order, [0] * 6, mathematics), strict=True))
        assert {found[text] for text in texts[:3]} == {"1/3"}
        assert all(found[text] == text for text in texts[3:])


def test_answers_to_different_prompts_are_not_compared(mathematics):
    assert classes(["1/2", "0.5", "0.50"], [0, 1, 1], mathematics) == ["1/2", "0.5", "0.5"]
    assert classes(["1/2", "0.5"], [0, 0], None) == ["1/2", "0.5"]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    assert "math-verify 0." in identity("math")["equivalence"]
    monkeypatch.setattr(equivalence, "_LIBRARIES", ("math-verify", "no-such-package"))
    assert identity("task") == {"equivalence": "task"}
    settings = {"filter": {"name": "vote"}, "judge": {"equivalence": "math"}}
    with pytest.raises(UserError, match="'no-such-package' is missing; install it with: pip"):
        prepare(resolve(settings))


# -- votes -----------------------------------------------------------------------------------------


def samples(rows) -> Samples:
    """Rows of (prompt id, member, completion, finished)."""
    count = len(rows)
    return Samples(
        prompt_id_S=np.array([row[0] for row in rows]),
        sample_S=np.arange(count),
        member_S=np.array([row[1] for row in rows]),
        difficulty_S=np.ones(count, np.int64),
        prompts=[f"{row[0]}=" for row in rows],
        completions=[row[2] for row in rows],
        finished_S=np.array([row[3] for row in rows]),
        tokens=[[3]] * count,
        logprobs=[[-1.0]] * count,
        entropy_S=np.zeros(count),
    )


def test_a_vote_counts_answers_and_not_wordings(mathematics):
    rows = [(0, 0, "1/2", True), (0, 0, "0.5", True), (0, 0, "I think it is 0.50.", True)]
    rows += [(0, 0, "1/3", True), (0, 0, "0.5", False), (0, 0, " ", True), (1, 0, "0.5", True)]
    found = vote(samples(rows), REVERSE, "samples", mathematics)
    assert found.scores == [3 / 6, 3 / 6, 3 / 6, 1 / 6, None, None, 1.0]
    assert found.answers == ["0.5", "0.5", "0.5", "1/3", "", "", "0.5"]
    assert found.reasons[3:6] == ["", "no answer", "no answer"]
    texts = vote(samples(rows), REVERSE, "samples")
    assert texts.scores[:3] == [1 / 6] * 3 and texts.answers[0] == "1/2"


# -- among other judges ----------------------------------------------------------------------------


def ensemble(members, task=REVERSE, **settings):
    return make_judge(JudgeConfig(name="ensemble", members=members, **settings), 0, task=task)


def test_who_reads_gold_says_so_by_its_name_also_among_others():
    assert ensemble("verifier, rubric").name == "ensemble+verifier"
    assert ensemble("vote, rubric").name == "ensemble"
    assert ensemble("vote, verifier").settings["verifier"] == {"task": "reverse"}
    with pytest.raises(UserError, match="'verifier' reads the gold answers of a task"):
        ensemble("rubric, verifier", task=None)


@pytest.mark.parametrize("voters", ["samples", "members"])
def test_members_see_what_they_would_see_alone(voters):
    """The vote counts all completions, also those that did not end, and those of each model."""
    rows = [(12, 0, "21", True), (12, 0, "21", True), (12, 1, "12", True), (12, 1, "21", True)]
    rows += [(12, 1, "", True), (12, 0, "2", False)]
    batch = samples(rows)
    group = Group(12, "12=", ("21", "21", "12", "21", ""), (0, 0, 1, 1, 1), (0,))
    (found,) = ensemble("verifier, vote*0.5", voters=voters).judge([group], {}, "", 0)
    alone = vote(batch, REVERSE, voters).scores
    gold = [1.0, 1.0, 0.0, 1.0, 0.0]
    for opinion, right, share in zip(found, gold, alone[:5], strict=True):
        assert opinion.criteria == {"verifier": right, "vote": share}
        if share is not None:
            assert opinion.score == pytest.approx((right + share / 2) / 1.5)
    assert found[4].score is None and found[4].reason == "vote: no answer"
    assert alone[:4] == (
        [2 / 3, 2 / 3, 1 / 3, 1 / 3] if voters == "samples" else [0.5, 0.5, 1 / 6, 0.5]
    )


def test_what_decides_is_kept_for_each_member_and_role():
    """Two of one judge that ask other roles are two; so are their settings and texts."""
    judge = ensemble("rubric, rubric@large, vote", levels=3, equivalence="math")
    assert judge.settings["rubric"] == judge.settings["rubric@large"] == {"levels": 3}
    assert {"rubric/criteria", "rubric@large/criteria"} <= judge.files.keys()
    assert judge.settings["vote"] == {"voters": "samples", "task": "reverse", **identity("math")}
    assert list(judge.seats) == ["judge", "large"]


def test_what_an_ensemble_is_worth_is_measured_without_gold_and_votes():
    left = ensemble("rubric, vote, verifier*2, rubric@large*0").by_itself
    assert [member.label for member, _ in left.members] == ["rubric", "rubric@large"]
    for members in ("vote, verifier", "verifier, rubric*0"):
        assert ensemble(members).by_itself is None
    assert make_judge(JudgeConfig(name="rubric"), 0).by_itself.name == "rubric"


@pytest.mark.parametrize(
    "member", ["verifier@large", "vote@large", "person@large", "simulated_annotators@large"]
)
def test_who_asks_nobody_has_no_role(member):
    with pytest.raises(UserError, match=f"'{member}': '{member[:-6]}' asks no role"):
        read_members(f"rubric, {member}", (*MODELS, *TALLIES))


def test_they_need_no_model_that_reads_questions():
    """A policy from scratch, which judges nobody, is judged by the two."""
    settings = {"filter": {"name": "threshold"}}
    settings |= {"judge": {"name": "ensemble", "members": "verifier, vote"}}
    machinery = prepare(resolve(settings))
    assert machinery.judge.name == "ensemble+verifier" and not machinery.judge.seats
    settings["judge"] |= {"voters": "members", "members": "vote*2, verifier"}
    with pytest.raises(UserError, match="set 'config.members' to 2 or more"):
        resolve(settings)


def judge_file(folder, rows, **settings) -> list[dict]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = lay(JudgingConfig(), {"judge": settings})
    run_file(config, str(source), str(target), Progress(quiet=True))
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_the_completions_of_a_files_row_vote(tmp_path):
    rows = [{"prompt": "p", "completions": ["1/3", " 0.5", "1/2", ""]}]
    rows.append({"prompt": "q", "completions": ["1", "2", "1"]})
    one, two = judge_file(tmp_path, rows, name="vote", equivalence="math")
    assert one["scores"] == [0.25, 0.5, 0.5, None] and one["best"] == 1
    assert one["reasons"] == ["", "", "", "no answer"] and one["judge"].startswith("vote-")
    assert two["scores"] == [2 / 3, 1 / 3, 2 / 3]
    folder = tmp_path / "text"
    folder.mkdir()
    plain, _ = judge_file(folder, rows, name="vote")
    assert plain["scores"] == [0.25, 0.25, 0.25, None] and plain["judge"] != one["judge"]


def test_a_vote_judges_beside_people_in_a_file(tmp_path):
    texts = ["1/2", "0.5", "2"]
    said = [{"prompt": "p", "completion": text, "score": int(text != "0.5")} for text in texts]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    settings = {"review": str(tmp_path / "said.jsonl"), "equivalence": "math"}
    rows = [{"prompt": "p", "completions": texts}]
    (row,) = judge_file(tmp_path, rows, name="ensemble", members="person, vote*2", **settings)
    assert row["scores"] == pytest.approx([(1 + 4 / 3) / 3, (4 / 3) / 3, (1 + 2 / 3) / 3])


@pytest.mark.parametrize(
    "settings, row, message",
    [
        ({"name": "verifier"}, {"completion": "a"}, "the rows of a file belong to none"),
        ({"name": "vote"}, {"completion": "a"}, "the judge 'vote' wants 'completions', a list"),
        ({"name": "vote", "voters": "members"}, {"completion": "a"}, "leave it at samples"),
        ({"name": ""}, {"completion": "a"}, "the judges of files are rubric, .*, vote"),
    ],
)
def test_what_a_file_has_no_votes_or_gold_for_is_said(tmp_path, settings, row, message):
    with pytest.raises(UserError, match=message):
        judge_file(tmp_path, [{"prompt": "p"} | row], **settings)
