"""What people say of samples, by file: written for them, waited for, read, and never lost."""

import dataclasses
import json
import re
from unittest import mock

import pytest
from finished_runs import promotion
from processes import ROOT

from experiments import review as command
from karploop import cli, launch
from karploop.config import JudgeConfig
from karploop.data.problems import is_held_out
from karploop.data.tasks import get_task
from karploop.data.tasks.manners import MANNERS
from karploop.errors import RunFailed, UserError
from karploop.judging.model_judge import make_judge
from karploop.judging.person import Review, complete, to_review
from karploop.judging.ranking import Group
from karploop.machinery import prepare
from karploop.resolve import resolve
from karploop.reviewing import annotate, find_run, texts_of_round
from karploop.store import Store

PAIRS = [("p", text, f"{text}+") for text in "abcdefghijklmnop"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the file --------------------------------------------------------------------------------------


def test_comparisons_are_read_in_whichever_order_they_are_shown(tmp_path):
    rows = [
        {"prompt": "p", "a": "x", "b": "y", "better": "a"},
        {"prompt": "p", "a": "z", "b": "x", "better": "a"},
        {"prompt": "p", "a": "y", "b": "z", "better": "unsure"},
        {"prompt": "q", "a": "x", "b": "y", "better": "tie"},
        {"prompt": "q", "a": "x", "b": "z", "better": ""},
        {"prompt": "p", "completion": "x", "verdict": "bad"},  # of another kind
    ]
    found = Review.read(write(tmp_path / "r.jsonl", rows), "compare")
    asked = [("p", "x", "y"), ("p", "y", "x"), ("p", "x", "z"), ("p", "z", "y"), ("q", "y", "x")]
    opinions = found.compare([*asked, ("q", "x", "z")])
    assert [o.score for o in opinions] == [1.0, 0.0, 0.0, None, 0.5, None]
    assert [o.winner for o in opinions[:3]] == ["first", "second", "second"]
    assert opinions[3].reason == "reviewed: unsure" and opinions[5].reason == "not reviewed"


def test_several_people_are_averaged_and_a_ranking_follows(tmp_path):
    rows = [{"prompt": "p", "a": "x", "b": "y", "better": better} for better in ("a", "a", "b")]
    rows += [{"prompt": "p", "a": "w", "b": one, "better": "b"} for one in "xy"]
    settings = {"name": "person", "people": "compare", "review": write(tmp_path / "r.jsonl", rows)}
    judge = make_judge(JudgeConfig(**settings), 0)
    (found,) = judge.judge([Group(0, "p", ("w", "x", "y"))], {}, "round_robin", 0)
    assert [o.score for o in found] == pytest.approx([0.0, (2 / 3 + 1) / 2, (1 / 3 + 1) / 2])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "a": "x", "better": "a"}, "line 1: a review's row is"),
        ({"prompt": "p", "a": "x", "b": "y", "better": "x"}, "'better' is 'x': a review's row is"),
    ],
)
def test_a_comparison_of_another_form_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        Review.read(write(tmp_path / "r.jsonl", [row]), "compare")


def test_rows_that_are_there_stay_and_new_ones_come_behind(tmp_path):
    path = tmp_path / "r.jsonl"
    given = [{"prompt": "p", "a": "a+", "b": "a", "better": "b", "who": "me"}]
    write(path, given)
    assert complete(str(path), PAIRS) == len(PAIRS) - 1
    rows = read(path)
    assert rows[:1] == given and len(rows) == len(PAIRS)
    assert all(row["better"] == "" for row in rows[1:])
    before = path.read_bytes()
    assert complete(str(path), PAIRS[::-1]) == 0 and path.read_bytes() == before
    with pytest.raises(UserError, match="name it .jsonl"):
        complete(str(tmp_path / "r.csv"), PAIRS)


def test_places_tell_nothing_and_are_the_same_each_time():
    rows = to_review(PAIRS)
    assert to_review(PAIRS[::-1]) == rows
    assert [row["a"][0] for row in rows] != sorted(row["a"][0] for row in rows)
    assert 3 <= sum(row["a"].endswith("+") for row in rows) <= 13
    assert {(row["prompt"], *sorted((row["a"], row["b"]))) for row in rows} == set(PAIRS)
    assert set(to_review([("p", "x")])[0]) == {"prompt", "completion", "verdict"}


# -- a run -----------------------------------------------------------------------------------------


def settings(path, people, **more):
    optimizer = dict(name="adamw", learning_rate=1e-2)
    stage = dict(steps=30, rows=8, row_length=32, optimizer=optimizer)
    return dict(
        rounds=2,
        mesh=dict(data=1),
        task=dict(name="copy", seed_difficulty=2, seed_problems=50),
        model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
        warmup=stage,
        train=stage | dict(steps=2),
        generate=dict(prompts=8, samples=3, batch=8),
        judge=dict(name="person", people=people, review=str(path)),
        evaluate=dict(problems=8, difficulties=(1, 2), batch=8),
        **more,
    )


_compiled = {}  # by objective: runs share what they compile


def prepared(config):
    own = prepare(config)
    shared = _compiled.setdefault(config.objective.name, own)
    shared.weights._live.clear()  # a process of its own would have nothing on its devices
    same = {name: getattr(shared, name) for name in ("weights", "sampler", "trainers")}
    return dataclasses.replace(own, **same)


def start(workdir, config):
    with promotion(), mock.patch.object(launch, "prepare", prepared):
        return launch.launch(resolve(config), str(workdir), "r")


def say(path, key, word):
    """Fills in what waits for a verdict."""
    rows = read(path)
    write(path, [row | {key: row[key] or word(row)} for row in rows])
    return rows


def judged(workdir):
    found = [json.loads(p.read_text()) for p in (workdir / "store/judge").glob("*/manifest.json")]
    return sorted(found, key=lambda manifest: manifest["key"])


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """A run that people compared samples for: workdir, its review, and what it said on the way."""
    workdir = tmp_path_factory.mktemp("reviewed")
    path, said = workdir / "review.jsonl", []
    objective = dict(objective=dict(name="dpo"), filter=dict(name="none", on_empty="skip"))
    config = settings(path, "compare", **objective)
    for _ in range(2):
        with pytest.raises(RunFailed) as stopped:
            start(workdir, config)
        said.append(str(stopped.value))
        say(path, "better", lambda row: "a" if row["a"] < row["b"] else "b")
    assert start(workdir, config) == 0
    return workdir, path, said, config


def test_a_run_waits_for_people_and_goes_on_with_what_they_said(reviewed):
    workdir, path, said, _ = reviewed
    rows = read(path)
    counts = [re.match(r"(\d+) of (\d+) pairs of replies wait .*, (\d+) of them", s) for s in said]
    assert all(len(set(found.groups())) == 1 for found in counts), "none was there before"
    assert sum(int(found[1]) for found in counts) == len(rows) > 8
    assert f"'{path}'" in said[0] and '"better" to "a"' in said[0] and "same command" in said[0]
    summary = json.loads((workdir / "runs/r/summary.json").read_text())
    assert summary["complete"] and "diagnostic" not in summary
    assert all("train" in done["stages"] for done in summary["rounds"][1:])
    assert {manifest["config"]["judge"] for manifest in judged(workdir)} == {"person"}


def test_nothing_but_texts_of_the_rounds_problems_is_shown(reviewed):
    _, path, _, _ = reviewed
    task = get_task("copy")
    for row in read(path):
        assert set(row) == {"prompt", "a", "b", "better"}
        assert not is_held_out(task, row["prompt"], 0.1)


def test_a_changed_verdict_is_a_new_judgement_and_an_equal_file_is_not(reviewed):
    workdir, path, _, config = reviewed
    before, rows = judged(workdir), read(path)
    write(path, rows[::-1])
    assert start(workdir, config) == 0 and judged(workdir) == before
    write(path, [rows[0] | {"better": "tie"}, *rows[1:]])
    assert start(workdir, config) == 0 and len(judged(workdir)) > len(before)
    write(path, rows)


def test_a_round_is_written_to_be_reviewed_whoever_judged_it(reviewed, tmp_path):
    workdir, path, _, _ = reviewed
    store = Store(str(workdir))
    run = find_run(store, "r")
    known = {(row["prompt"], *sorted((row["a"], row["b"]))) for row in read(path)}
    rounds = [set(texts_of_round(store, run, index, "")) for index in (0, 1)]
    assert rounds[0] | rounds[1] == known and rounds[0] != rounds[1]
    assert set(texts_of_round(store, run, None, "compare")) == rounds[1]
    replies = texts_of_round(store, run, 1, "rate")
    assert {text for _, *two in rounds[1] for text in two} <= {text for _, text in replies}
    with pytest.raises(UserError, match="no complete round 7 with samples .it has: 0, 1."):
        texts_of_round(store, run, 7, "")
    with pytest.raises(UserError, match="no run 's' in"):
        find_run(store, "s")


def test_ratings_are_waited_for_too_and_unsure_is_a_verdict(tmp_path, capsys):
    path = tmp_path / "review.jsonl"
    more = dict(filter=dict(name="threshold", on_empty="skip"))
    config = settings(path, "rate", **more) | {"rounds": 1}
    with pytest.raises(RunFailed, match='replies wait for .*"verdict" to "good", "bad" or'):
        start(tmp_path, config)
    rows = say(path, "verdict", lambda row: "unsure" if "0" in row["prompt"] else "good")
    write(path, [*read(path)[:-1], rows[-1]])  # one is still empty
    with pytest.raises(RunFailed, match=f"1 of {len(rows)} replies wait"):
        start(tmp_path, config)
    say(path, "verdict", lambda row: "good")
    assert start(tmp_path, config) == 0
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    unsure = sum(row["verdict"] == "unsure" for row in read(path))
    assert unsure and summary["rounds"][1]["metrics"]["no_verdict"] >= unsure


# -- annotators for want of people -----------------------------------------------------------------

REQUEST = "not hot, big, old?"
GIVEN = [
    {"prompt": REQUEST, "a": "icy, wee, new!", "b": "icy, wee, new", "better": ""},
    {"prompt": REQUEST, "a": "icy, wee, new", "b": "icy", "better": "b"},
    {"prompt": REQUEST, "completion": "icy, wee, new", "verdict": ""},
]


@pytest.fixture
def annotated(tmp_path):
    """The review of a run of manners that annotators have filled in."""
    folder = tmp_path / "runs/r"
    folder.mkdir(parents=True)
    (tmp_path / "store").mkdir()
    task = {"name": "karploop.data.tasks.manners:MANNERS"}
    (folder / "config.json").write_text(json.dumps({"task": task, "seed": 0}))
    path = tmp_path / "review.jsonl"
    write(path, GIVEN)
    return tmp_path, path, find_run(Store(str(tmp_path)), "r")


def test_annotators_fill_in_what_is_empty_and_say_so(annotated):
    _, path, run = annotated
    assert annotate(str(path), run, 0.0) == 2
    one, two, three = read(path)
    assert (one["better"], three["verdict"]) == ("b", "good") and two == GIVEN[1]
    assert one["annotator"] == "simulated_annotators, wrong in 0%"
    assert annotate(str(path), run, 1.0) == 0
    write(path, GIVEN)
    annotate(str(path), run, 1.0)
    assert (read(path)[0]["better"], read(path)[2]["verdict"]) == ("a", "bad")
    with pytest.raises(UserError, match="--annotate=2: write how often annotators err"):
        annotate(str(path), run, 2.0)


def test_a_judge_that_reads_them_is_not_called_a_person(annotated):
    _, path, run = annotated
    config = JudgeConfig(name="person", people="compare", review=str(path))
    assert make_judge(config, 0, task=MANNERS).name == "person"
    recipe = cli.load_config(f"{ROOT}/configs/rlhf.py", {"judge.review": str(path)})
    assert not prepare(recipe).simulates
    annotate(str(path), run, 0.0)
    assert make_judge(config, 0, task=MANNERS).name == "person+simulated_annotators"
    assert prepare(recipe).simulates


def test_the_command_writes_fills_and_refuses(reviewed, capsys):
    workdir, path, _, _ = reviewed

    def run(*more):
        command.FLAGS.unparse_flags()
        command.FLAGS(["review", f"--workdir={workdir}", "--run_name=r", *more])
        return command.main(["review"])

    try:
        assert run("--output=-") == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert shown and all(row["better"] == "" for row in shown)
        assert run(f"--output={path}") == 0 and "0 rows added" in capsys.readouterr().out
        assert run(f"--output={path}", "--annotate=0.1") == 0
        assert "0 rows filled in by simulated annotators" in capsys.readouterr().out
        with pytest.raises(UserError, match="--annotate fills in the rows of a file"):
            run("--output=-", "--annotate=0.1")
    finally:
        command.FLAGS.unparse_flags()
