"""The study of judges on tasks with gold: what is compared with what, and what is left behind."""

import json

import numpy as np
import pytest
from small_models import save_llama

from karploop.data.rows import located_rows
from karploop.data.tasks import get_task
from karploop.errors import UserError
from karploop.judge_study import SUBJECTS, Settings, study

pytest.importorskip("reasoning_gym")


def read(path):
    return [row for _, row in located_rows(path)]


@pytest.mark.parametrize("name", SUBJECTS)
def test_wrong_answers_are_wrong_and_in_the_right_form(name):
    subject, rng = SUBJECTS[name], np.random.default_rng(0)
    task = get_task(subject.address)
    for prompt in task.sample_many(rng, 1, 40):
        gold = task.answer(prompt).strip()
        wrong = subject.wrong(gold, rng)
        assert task.verify(prompt, gold) and not task.verify(prompt, wrong)
        assert wrong.count(",") == gold.count(",") and wrong.isdigit() == gold.isdigit()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    model = save_llama(folder / "model", max_length=2048)
    settings = Settings(model, (3, 6), seeds=2, problems=4, samples=2)
    text = study("letters", settings, folder / "work", folder / "out")
    (work,) = (folder / "work/letters").iterdir()
    return folder, work, settings, text


def test_reports_have_every_judge(done):
    folder, _, _, text = done
    for kind, judges in {
        "replies": ["rubric", "reward 3", "reward 6"],
        "comparisons": ["pairwise", "constitution", "reward 3", "reward 6"],
    }.items():
        found = json.loads((folder / f"out/letters/{kind}/calibration.json").read_text())
        assert list(found) == judges
        seeds = found["reward 3"]["verdicts"] / found[judges[0]]["verdicts"]
        assert seeds == 2 and "accuracy" in found["reward 3"]["measures"]
        assert (folder / f"out/letters/{kind}/table.md").read_text() in text


def test_gold_is_what_the_scorer_says_and_no_judge_is_shown_it(done):
    _, work, _, _ = done
    task = get_task(SUBJECTS["letters"].address)
    replies = read(work / "replies.jsonl")
    assert replies
    for row in replies:
        assert row["gold"] == task.verify(row["prompt"], row["completion"])
    pairs = read(work / "comparisons.jsonl")
    for row in pairs:
        better = row["completions"][0 if row["gold"] else 1]
        assert better == task.answer(row["prompt"]).strip()
    assert {row["gold"] for row in pairs} == {0, 1}  # the better one is not always first


def test_what_is_there_is_not_made_again(done):
    folder, work, settings, text = done
    before = {p: p.stat().st_mtime_ns for p in work.glob("*comparisons.jsonl")}
    before = {p: t for p, t in before.items() if p.name.startswith(("pairwise", "constitution"))}
    assert len(before) == 2
    assert study("letters", settings, folder / "work", folder / "out") == text
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_mistakes_are_said(tmp_path):
    with pytest.raises(UserError, match="'letterz'.*letters"):
        study("letterz", Settings("nowhere"), tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="--sizes=1"):
        Settings("nowhere", (1,))
    with pytest.raises(UserError, match="too few|lower --sizes"):
        study("letters", Settings("nowhere", (90_000,)), tmp_path / "a", tmp_path / "b")
