"""Annotators that gold labels play: how often they err, of what, and who is told of it."""

import json

import numpy as np
import pytest
from finished_runs import promotion

from karploop import launch
from karploop.config import JudgeConfig
from karploop.data.tasks import get_task
from karploop.data.tasks.manners import MANNERS
from karploop.errors import UserError
from karploop.judging.model_judge import make_judge
from karploop.judging.ranking import Group
from karploop.judging.simulated_annotators import Annotators
from karploop.machinery import prepare
from karploop.reporting.comparison import marked
from karploop.resolve import resolve

REQUEST = "not hot, big, old?"
CALM, LOUD, RUDE, USELESS = "icy, wee, new", "icy, wee, new!", "icy, wee, new oaf 7!", "icy"
SIMULATED = {"name": "simulated_annotators", "people": "compare"}


def many(count=2000):
    """Pairs of which the first is the better, each another text."""
    task = get_task("copy")
    prompts = [f"{number:011b}=" for number in range(count)]
    return task, [(prompt, task.answer(prompt), "x") for prompt in prompts]


def preferred(error, seed=0, count=1, pairs=None):
    task, known = many()
    return np.array([o.score for o in Annotators(task, count, error, seed).compare(pairs or known)])


@pytest.mark.parametrize("error", [0.0, 0.1, 0.5, 1.0])
def test_they_err_at_their_rate(error):
    found = preferred(error)
    assert set(found) <= {0.0, 1.0}
    assert np.mean(found == 0) == pytest.approx(error, abs=0.03 if 0 < error < 1 else 0)


def test_who_errs_is_drawn_by_texts_and_seed_and_not_by_place_or_company():
    task, known = many()
    found = preferred(0.3)
    assert (preferred(0.3) == found).all() and (preferred(0.3, seed=1) != found).any()
    swapped = [(prompt, two, one) for prompt, one, two in known]
    assert (preferred(0.3, pairs=swapped) == 1 - found).all()
    assert (preferred(0.3, pairs=known[::-1])[::-1] == found).all()
    # At a higher rate all err who err at a lower one.
    assert (preferred(0.4) <= found).all() and (preferred(0.4) != found).any()


def test_several_err_independently_and_the_share_of_them_is_the_score():
    found = preferred(0.2, count=3)
    assert set(np.round(found, 6)) == {0.0, 0.333333, 0.666667, 1.0}
    assert np.mean(found < 0.5) == pytest.approx(3 * 0.2**2 * 0.8 + 0.2**3, abs=0.03)
    (one,) = Annotators(*(many()[0], 3, 0.0, 0)).compare([("0=", "0", "1")])
    assert dict(one.criteria) == {"annotator 0": 1.0, "annotator 1": 1.0, "annotator 2": 1.0}


def test_the_one_of_more_worth_is_better_and_equals_are_a_tie():
    knowing = Annotators(MANNERS, 1, 0.0, 0)
    pairs = [(REQUEST, CALM, LOUD), (REQUEST, RUDE, LOUD), (REQUEST, USELESS, RUDE)]
    found = knowing.compare(pairs)
    assert [(o.score, o.winner) for o in found] == [(1.0, "first"), (0.0, "second"), (0.5, "tie")]
    wrong = Annotators(MANNERS, 1, 1.0, 0).compare(pairs)
    assert [o.score for o in wrong] == [0.0, 1.0, 0.5], "of equals nobody errs"
    assert [o.score for o in knowing.rate([(REQUEST, CALM), (REQUEST, LOUD)])] == [1.0, 0.0]


def test_what_nobody_can_tell_has_no_verdict(monkeypatch):
    monkeypatch.setattr(type(MANNERS), "worth", lambda self, prompt, text: None)
    annotators = Annotators(MANNERS, 1, 0.0, 0)
    (rated,), (compared,) = annotators.rate([("p", "a")]), annotators.compare([("p", "a", "b")])
    assert rated.score is compared.score is None and "nobody knows" in rated.reason


def test_as_a_judge_they_rank_the_samples_of_a_prompt():
    judge = make_judge(JudgeConfig(**SIMULATED), 0, task=MANNERS)
    (found,) = judge.judge([Group(0, REQUEST, (LOUD, CALM, RUDE))], {}, "round_robin", 0)
    assert [o.score for o in found] == [0.5, 1.0, 0.0]
    assert judge.compares and not judge.seats and judge.by_itself is None
    assert judge.settings == {"people": "compare", "annotators": 1, "error": 0.0, "task": "manners"}
    with pytest.raises(UserError, match="reads the gold answers of a task"):
        make_judge(JudgeConfig(**SIMULATED), 0)


def test_an_ensemble_with_them_says_so():
    members = {"name": "ensemble", "members": "verifier, simulated_annotators"}
    settings = {"filter": {"name": "threshold"}, "judge": members}
    machinery = prepare(resolve(settings))
    assert machinery.judge.name == "ensemble+verifier+simulated_annotators"
    assert machinery.simulates
    without = settings | {"judge": members | {"members": "verifier, vote"}}
    assert not prepare(resolve(without)).simulates


def test_a_run_that_they_judge_is_a_diagnostic(tmp_path):
    optimizer = dict(name="adamw", learning_rate=1e-2)
    stage = dict(steps=30, rows=8, row_length=32, optimizer=optimizer)
    settings = dict(
        rounds=1,
        mesh=dict(data=1),
        task=dict(name="copy", seed_difficulty=2, seed_problems=50),
        model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
        warmup=stage,
        train=stage | dict(steps=2),
        generate=dict(prompts=16, samples=4, batch=16),
        judge=SIMULATED | dict(error=0.25),
        filter=dict(name="none", on_empty="skip"),
        objective=dict(name="dpo"),
        evaluate=dict(problems=8, difficulties=(1, 2), batch=16),
    )
    with promotion():
        assert launch.launch(resolve(settings), str(tmp_path), "r") == 0
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert "'simulated_annotators' play people by gold labels" in summary["diagnostic"]
    assert summary["diagnostic"] in (tmp_path / "runs/r/accuracy.txt").read_text()
    assert marked("r", [summary]) == "r (selects by gold)"
    (path,) = (tmp_path / "store/judge").glob("*/manifest.json")
    said = json.loads(path.read_text())["config"]
    assert (said["judge"], said["error"], said["annotators"]) == ("simulated_annotators", 0.25, 1)
