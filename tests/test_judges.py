"""Judges that are models: what they make of probabilities, and that these are the model's."""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from small_models import save_llama
from small_tokenizers import CHATML

from karploop.asking import Scored
from karploop.chains.rendering import load_templates
from karploop.config import MODELS, JudgeConfig, JudgingConfig, MeshConfig, RoleConfig
from karploop.errors import UserError
from karploop.judging.constitution import constitution
from karploop.judging.model_judge import make_judge
from karploop.judging.opinion import TEMPLATES, Opinion
from karploop.judging.pairwise import pairwise
from karploop.judging.rubric import Criterion, read_criteria, rubric
from karploop.mesh import make_mesh
from karploop.offline_judge import run_file
from karploop.oversight.calibration import read_verdicts
from karploop.reporting.progress import Progress
from karploop.roles.bind import Bound
from karploop.schema import lay

ROOT = pathlib.Path(__file__).parent.parent
QUIET = Progress(quiet=True)
TEMPLATE = load_templates([path.name for path in TEMPLATES.glob("*.jinja")], TEMPLATES)


class Reader:
    """A role with given probabilities: a function from a prompt to options' shares, or None."""

    def __init__(self, shares):
        self.shares, self.prompts = shares, []

    def score(self, prompts, options):
        self.prompts += prompts
        found = [self.shares(prompt, options) for prompt in prompts]
        return [
            Scored(None, "unreadable")
            if shares is None
            else Scored(tuple(math.log(share) - 7.0 for share in shares))
            for shares in found
        ]


# -- rubric ----------------------------------------------------------------------------------------


def test_a_rating_is_an_expectation_and_criteria_are_weighted():
    def shares(prompt, options):
        assert options == ["1", "2", "3", "4", "5"]
        return (
            [0.1, 0.1, 0.1, 0.1, 0.6] if "true?" in prompt else [0.5, 0.0001, 0.0001, 0.0001, 0.5]
        )

    criteria = (Criterion("a", "Is it true?", 3.0), Criterion("b", "Is it kind?", 1.0))
    role = Reader(shares)
    (opinion,) = rubric([("Why?", "So.")], role, TEMPLATE["rubric.jinja"], criteria, 5)
    assert opinion.criteria["a"] == pytest.approx(0.1 * 0.25 + 0.1 * 0.5 + 0.1 * 0.75 + 0.6)
    assert opinion.criteria["b"] == pytest.approx(0.5)
    assert opinion.score == pytest.approx((3 * opinion.criteria["a"] + 0.5) / 4)
    assert all("Request: Why?" in p and "Reply: So." in p for p in role.prompts)


def test_one_criterion_without_a_rating_leaves_no_score():
    role = Reader(
        lambda prompt, options: None if "kind" in prompt and "bad" in prompt else [0.2] * 5
    )
    criteria = (Criterion("a", "Is it true?", 1.0), Criterion("b", "Is it kind?", 1.0))
    good, bad = rubric([("q", "good"), ("q", "bad")], role, TEMPLATE["rubric.jinja"], criteria, 5)
    assert good.score == pytest.approx(0.5) and good.reason == ""
    assert bad.score is None and bad.reason == "unreadable" and bad.criteria["b"] is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("accuracy: true?", "is written '2 accuracy"),
        ("1 a: x?\n2 a: y?", "names of their own"),
        ("0 a: x?", "weight above 0"),
        ("# nothing\n", "no lines"),
    ],
)
def test_criteria_are_checked(tmp_path, text, message):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_criteria(str(tmp_path / "c.txt"))


def test_the_shipped_criteria():
    assert [c.name for c in read_criteria("")] == ["accuracy", "helpfulness", "safety"]


# -- pairs -----------------------------------------------------------------------------------------


def better(prompt: str, bias: float, quality: dict[str, float]) -> list[float]:
    """Shares of A and B by a judge that sees quality and adds a bias to A, in logits."""
    shown = {line[6]: line[9:] for line in prompt.splitlines() if line.startswith("Reply ")}
    logit = quality[shown["A"]] - quality[shown["B"]] + bias
    a = 1 / (1 + math.exp(-logit))
    return [a, 1 - a]


@pytest.mark.parametrize("bias", [0.0, 2.0, -2.0])
def test_both_orders_remove_position_bias(bias):
    quality = {"good": 1.0, "bad": 0.0, "fine": 1.0}
    role = Reader(lambda prompt, options: better(prompt, bias, quality))
    pairs = [("q", "good", "bad"), ("q", "bad", "good"), ("q", "good", "fine")]
    first, second, equal = pairwise(pairs, role, TEMPLATE["pairwise.jinja"])
    assert first.score > 0.5 > second.score
    assert first.score == pytest.approx(1 - second.score)
    assert equal.score == pytest.approx(0.5)
    if bias:
        assert (first.winner, second.winner, equal.winner) == ("tie", "tie", "tie")
    else:
        assert (first.winner, second.winner) == ("first", "second")
    assert len(role.prompts) == 2 * len(pairs), "always both orders"


@pytest.mark.parametrize(
    "lost, found", [("Reply A: one", (None, 0.1)), ("Reply A: two", (0.9, None))]
)
def test_a_pair_read_in_one_order_alone_has_no_verdict(lost, found):
    """Neither a guess nor half of an opinion; and what was read is not turned into another."""
    role = Reader(lambda prompt, options: None if lost in prompt else [0.9, 0.1])
    (opinion,) = pairwise([("q", "one", "two")], role, TEMPLATE["pairwise.jinja"])
    assert opinion.score is None and opinion.winner is None and opinion.reason == "unreadable"
    assert (opinion.forward, opinion.backward) == pytest.approx(found)


@pytest.mark.parametrize("bias", [0.0, 3.0, -3.0])
def test_who_cannot_choose_labels_no_pair(bias):
    """Also where the judge names one reply the better in one order and the worse in the other."""
    role = Reader(lambda prompt, options: better(prompt, bias, {"this": 0.0, "that": 0.0}))
    pairs = [("q", "this", "that"), ("q", "that", "this"), ("q", "this", "this")]
    for opinion in pairwise(pairs, role, TEMPLATE["pairwise.jinja"]):
        assert opinion.winner == "tie" and opinion.score == pytest.approx(0.5)


def ask(judge: str, role, rows: list[str]) -> list[Opinion]:
    """What a judge says of replies, each in a pair with the text "plain" where it judges pairs."""
    template, pairs = TEMPLATE[f"{judge}.jinja"], [("q", row, "plain") for row in rows]
    if judge == "rubric":
        criteria = (Criterion("a", "Is it true?", 3.0), Criterion("b", "Is it kind?", 1.0))
        return rubric([("q", row) for row in rows], role, template, criteria, 5)
    if judge == "pairwise":
        return pairwise(pairs, role, template)
    places = [(i, 0, 1) for i in range(len(rows))]
    return constitution(pairs, role, template, ["Be true.", "Be kind."], 2, places, 0)


JUDGES = ("rubric", "pairwise", "constitution")


@pytest.mark.parametrize("judge", JUDGES)
def test_a_call_that_fails_takes_its_own_verdict_and_moves_no_other(judge):
    """One reply in six, and in the middle: each of the others keeps the score that it had alone."""
    quality = {f"reply {i}": i / 2 for i in range(6)} | {"plain": 1.2}

    def shares(prompt, options):
        if "reply 2" in prompt and ("kind" in prompt or judge == "pairwise"):
            return None
        if judge != "rubric":
            return better(prompt, 0.5, quality)
        grade = next(value for reply, value in quality.items() if f"Reply: {reply}" in prompt)
        return [math.exp(grade * level) for level in range(5)]

    replies = [f"reply {i}" for i in range(6)]
    found = ask(judge, Reader(shares), replies)
    assert found[2].score is None and found[2].winner is None and found[2].reason == "unreadable"
    kept = [opinion.score for opinion in found if opinion.score is not None]
    assert len(kept) == 5 and kept == sorted(kept) and len(set(kept)) == 5
    for reply, opinion in zip(replies, found, strict=True):
        assert ask(judge, Reader(shares), [reply]) == [opinion]


@pytest.mark.parametrize("judge, calls", [("rubric", 2), ("pairwise", 1), ("constitution", 1)])
def test_a_judge_asks_for_all_its_rows_at_once(judge, calls):
    """A call a criterion at most, however many rows there are: the role batches what it gets."""
    sizes = []

    class Counting(Reader):
        def score(self, prompts, options):
            sizes.append(len(prompts))
            return super().score(prompts, options)

    role = Counting(lambda prompt, options: [1 / len(options)] * len(options))
    ask(judge, role, [f"reply {i}" for i in range(50)])
    assert len(sizes) == calls and min(sizes) >= 50


def test_principles_are_drawn_for_each_pair_and_averaged():
    principles = [f"Principle {i}." for i in range(6)]
    role = Reader(lambda prompt, options: [0.8, 0.2] if "Principle 0." in prompt else [0.5, 0.5])
    pairs = [("q", f"one {i}", f"two {i}") for i in range(40)]
    template = TEMPLATE["constitution.jinja"]
    places = [(i, 0, 1) for i in range(40)]
    found = constitution(pairs, role, template, principles, 3, places, seed=0)
    seen = [tuple(opinion.criteria) for opinion in found]
    assert all(len(set(own)) == 3 for own in seen) and len(set(seen)) > 10
    for opinion in found:
        # A bias for A alone: both orders cancel it, whatever the principle.
        assert opinion.score == pytest.approx(0.5)
        forward = 0.6 if "Principle 0." in opinion.criteria else 0.5
        assert opinion.forward == pytest.approx(forward)
    part = constitution(pairs[10:20], role, template, principles, 3, places[10:20], seed=0)
    assert part == found[10:20], "a pair's principles do not depend on its neighbours"


def test_a_principle_without_a_verdict_leaves_none():
    role = Reader(lambda prompt, options: None if "Principle 1." in prompt else [0.5, 0.5])
    (found,) = constitution(
        [("q", "a", "b")], role, TEMPLATE["constitution.jinja"], ["Principle 0.", "Principle 1."],
        2, [(0,)], 0,
    )  # fmt: skip
    assert found.score is None and found.criteria["Principle 0."] == pytest.approx(0.5)


def test_a_model_that_gives_no_numbers_has_no_verdict():
    """NaN is neither a tie nor a rating, and is not written to a file."""
    role = Reader(lambda prompt, options: [math.nan] * len(options))
    (pair,) = pairwise([("q", "a", "b")], role, TEMPLATE["pairwise.jinja"])
    criteria = (Criterion("a", "Is it true?", 1.0),)
    (rating,) = rubric([("q", "a")], role, TEMPLATE["rubric.jinja"], criteria, 5)
    for opinion in (pair, rating):
        assert opinion.score is None and opinion.winner is None
        assert opinion.reason == "the model gives no probabilities"


def test_the_winner_needs_both_orders_to_agree():
    assert Opinion(0.8, "", {}, 0.9, 0.7).winner == "first"
    assert Opinion(0.65, "", {}, 0.9, 0.4).winner == "tie"
    assert Opinion(0.2, "", {}, 0.3, 0.1).winner == "second"


# -- on the mesh -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "m", CHATML, max_length=1024)


def bind(model, tmp_path, chat="auto", batch=8, mesh=MeshConfig()):  # noqa: B008, frozen
    bound = Bound(["judge"], {"judge": RoleConfig(path=str(model), chat=chat)}, tmp_path / "r", "j")
    return bound.load(make_mesh(mesh), batch)["judge"]


@pytest.mark.parametrize("chat", ["yes", "no"])
def test_scores_are_the_models_however_prompts_are_batched(model, tmp_path, chat):
    """With a shared beginning, without one, and against the scorer of given texts."""
    role = bind(model, tmp_path, chat)
    options = ["1", "2", "3"]
    shared = [f"{'read this first ' * 5}{i * 'x'} end" for i in range(11)]
    together = role.score(shared, options)
    apart = [bind(model, tmp_path, chat).score([f"{i}"], options)[0] for i in range(2)]
    both = role.score(["0", "1"], options)
    for one, other in zip(apart, both, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    begin, last = role._options(options)
    sampler = role._sampler(1)
    for prompt, found in list(zip(shared, together, strict=True))[::5]:
        start = [*role._tokens(prompt), *begin]
        rows = sampler.score(role.params, [start] * 3, [[token] for token in last], 8, stop=False)
        expected = [float(row[0]) for row in rows]
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
    assert any(len(prefix) >= 32 for _, prefix in role._samplers), "the beginning was shared"


def test_what_cannot_be_told_apart_or_has_no_room_is_said(model, tmp_path):
    role = bind(model, tmp_path)
    with pytest.raises(UserError, match="does not tell yes, no apart"):
        role.score(["a"], ["yes", "no"])
    short, long = role.score(["a", "a" * 2000], ["1", "2"])
    assert short.logprobs and long.logprobs is None and "context has room" in long.error


def test_each_prompt_keeps_its_place_behind_one_without_room(model, tmp_path):
    """Prompts are read in the order of their lengths, and those without room are left out."""
    role = bind(model, tmp_path, "no")
    prompts = ["12345678", "1", "too long " * 200, "1234", "12", "123456789012", "123"]
    found = role.score(prompts, ["1", "2"])
    assert [one.logprobs is None for one in found] == [i == 2 for i in range(7)]
    fitting = [(prompt, one) for prompt, one in zip(prompts, found, strict=True) if one.logprobs]
    for prompt, together in fitting:
        (alone,) = role.score([prompt], ["1", "2"])
        np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=1e-5)
    assert len({round(one.logprobs[0], 3) for _, one in fitting}) == 6, "each has its own"


def test_a_shared_beginning_is_read_once_and_pays(model, tmp_path):
    """At least three times the rate of whole prompts one by one: 512 tokens shared, 64 own."""
    beginning, own = "rate this " * 50, 64  # a token a byte, and the template's
    prompts = [beginning + f"{i:>{own}}" for i in range(32)]
    one = MeshConfig(data=1)  # device
    together, alone = (bind(model, tmp_path, batch=batch, mesh=one) for batch in (32, 1))

    def rates(count: int) -> tuple[float, float]:
        started = time.perf_counter()
        together.score(prompts, ["1", "2"])
        shared = len(prompts) / (time.perf_counter() - started)
        started = time.perf_counter()
        for prompt in prompts[:count]:
            sampler = alone._sampler(1)
            sampler.score_next(alone.params, [alone._tokens(prompt)], [49, 50], 1)
        return shared, count / (time.perf_counter() - started)

    rates(2)
    ratios = [shared / single for shared, single in (rates(8) for _ in range(3))]
    assert statistics.median(ratios) > 3


ROWS = [
    {
        "id": i,
        "prompt": f"p{i}",
        "completion": f"c{i}",
        "completions": [f"a{i}", f"b{i}"],
        "gold": i % 2,
    }
    for i in range(6)
]


def write(folder, rows) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_files_winners_follow_quality_and_not_place(model, tmp_path, monkeypatch):
    """By a judge that favours what is shown first, and cannot read one row of the file."""
    quality = {"good": 3.0, "fair": 1.5, "bad": 0.0}
    pairs = [("good", "bad"), ("bad", "good"), ("good", "?"), ("fair", "fair"), ("bad", "fair")]
    pairs += [("fair", "good"), ("good", "fair")]
    role = Reader(lambda p, _: None if ": ?" in p else better(p, 0.7, quality))
    monkeypatch.setattr(Bound, "load", lambda self, mesh, batch: {"judge": role})
    rows = [{"id": i, "prompt": "q", "completions": list(pair)} for i, pair in enumerate(pairs)]
    given = {"roles.judge.path": str(model), "judge.name": "pairwise", "rows": "2"}
    target = tmp_path / "out.jsonl"
    run_file(lay(JudgingConfig(), {}, given), write(tmp_path, rows), str(target), QUIET)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(7))
    winners = ["first", "second", None, "tie", "second", "second", "first"]
    assert [row["winner"] for row in found] == winners
    assert found[2]["score"] is None and found[2]["reason"] == "unreadable"
    assert found[5]["score"] == pytest.approx(1 - found[6]["score"])


def test_an_interrupted_file_goes_on_with_the_verdicts_that_it_would_have_had(
    model, tmp_path, monkeypatch
):
    """No row is judged twice or passed over, and each by the principles drawn for its place."""
    rows = [{"id": i, "prompt": "q", "completions": [f"a{i}", "b"]} for i in range(7)]
    source, left = write(tmp_path, rows), [math.inf]

    class Dying(Reader):
        def score(self, prompts, options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return super().score(prompts, options)

    role = Dying(lambda prompt, options: [0.1 + len(prompt) % 7 / 10, 0.2])
    monkeypatch.setattr(Bound, "load", lambda self, mesh, batch: {"judge": role})
    given = {"roles.judge.path": str(model), "judge.name": "constitution"}
    given |= {"judge.principles": "2"}
    config = lay(JudgingConfig(), {"rows": 2}, given)
    run_file(lay(JudgingConfig(), {}, given), source, str(tmp_path / "whole.jsonl"), QUIET)
    asked = len(role.prompts)
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        run_file(config, source, str(tmp_path / "parts.jsonl"), QUIET)
    assert not (tmp_path / "parts.jsonl").exists()
    left[0] = math.inf
    run_file(config, source, str(tmp_path / "parts.jsonl"), QUIET)
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert len(role.prompts) == 2 * asked


@pytest.mark.parametrize("judge", ["rubric", "pairwise", "constitution"])
def test_verdicts_of_the_command_can_be_calibrated(model, tmp_path, judge):
    source, target = write(tmp_path, ROWS), tmp_path / "out.jsonl"
    given = {"roles.policy.path": str(model), "judge.name": judge, "judge.principles": "2"}
    run_file(lay(JudgingConfig(), {}, given), source, str(target), QUIET)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(6))
    assert all(0 < row["score"] < 1 and row["reason"] == "" for row in rows)
    assert all(row["judge"].startswith(f"{judge}-") and row["sample"] == row["id"] for row in rows)
    ((_, judged),) = read_verdicts(str(target)).items()
    assert not np.isnan(judged.score_N).any() and not np.isnan(judged.length_N).any()
    if judge == "rubric":
        assert list(rows[0]["criteria"]) == ["accuracy", "helpfulness", "safety"]
    else:
        assert all(r["score"] == pytest.approx((r["forward"] + r["backward"]) / 2) for r in rows)
        assert not np.isnan(judged.backward_N).any()
    again = tmp_path / "again.jsonl"
    run_file(lay(JudgingConfig(), {"rows": 2}, given), source, str(again), QUIET)
    for one, other in zip(rows, map(json.loads, again.read_text().splitlines()), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_the_judge_is_known_by_all_that_decides_a_verdict(model, tmp_path):
    source, names = write(tmp_path, ROWS[:1]), set()
    (tmp_path / "c.txt").write_text("1 mine: Is it mine?\n")
    (tmp_path / "d.txt").write_text("1 yours: Is it yours?\n")
    mine, yours = ({"judge.criteria": str(tmp_path / name)} for name in ("c.txt", "d.txt"))
    given = {"roles.judge.path": str(model)}
    for more in (mine, yours, mine | {"judge.levels": "3"}, mine | {"roles.judge.chat": "no"}):
        target = tmp_path / f"{len(names)}.jsonl"
        run_file(lay(JudgingConfig(), {}, given | more), source, str(target), QUIET)
        names.add(json.loads(target.read_text())["judge"])
    assert len(names) == 4


@pytest.mark.parametrize(
    "overrides, row, message",
    [
        ({}, {"prompt": "a"}, "line 1: the judge 'rubric' wants a 'completion'"),
        ({"judge.name": "pairwise"}, {"prompt": "a", "completions": ["x"]}, "a list of two texts"),
        ({"judge.name": "pairwise"}, {"prompt": "a", "completions": ["x", 1]}, "a list of two"),
        ({"judge.name": "verifier"}, {"prompt": "a", "completion": "x"}, "belong to none"),
        ({}, {"tokens": [1], "completion": "x"}, "and not 'tokens'"),
        ({"judge.name": "rubrik"}, {}, "did you mean 'rubric'?"),
        ({"judge.name": "constitution", "judge.principles": "99"}, {}, "the constitution has 10"),
        ({"judge.criteria": "nowhere.txt"}, {}, "no file 'nowhere.txt'"),
    ],
)
def test_mistakes_are_named(model, tmp_path, overrides, row, message):
    with pytest.raises(UserError) as caught:
        config = lay(JudgingConfig(), {}, {"roles.judge.path": str(model)} | overrides)
        run_file(config, write(tmp_path, [row]), str(tmp_path / "o.jsonl"), QUIET)
    assert message in str(caught.value)


def test_the_command_refuses_with_code_2(model, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.judge", "--config=configs/judge.py:pairwise",
            f"--config.roles.judge.path={model}", f"--input={write(tmp_path, [{'prompt': 'a'}])}",
            f"--output={tmp_path / 'o.jsonl'}",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "'completions'" in done.stderr and "Trace" not in done.stderr


def test_every_shipped_template_is_a_judges():
    asking = set(MODELS) - {"person", "simulated_annotators", "random", "ensemble", "reward"}
    used = {name for judge in asking for name in make_judge(JudgeConfig(name=judge), 0).files}
    assert {path.name for path in TEMPLATES.glob("*.jinja")} == used - {"criteria", "constitution"}
