"""Judges that write, argue and rank: what is read from texts, and what n scores come from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karploop.asking import Said, Scored, Spent
from karploop.chains.rendering import load_templates
from karploop.config import MODELS, RANKINGS, JudgeConfig, JudgingConfig
from karploop.errors import UserError
from karploop.judging.constitution import constitution
from karploop.judging.debate import debate
from karploop.judging.ensemble import calibrated, combine, read_members
from karploop.judging.model_judge import make_judge
from karploop.judging.opinion import TEMPLATES, Opinion
from karploop.judging.pairwise import pairwise
from karploop.judging.ranking import Group, bradley_terry, rank
from karploop.judging.reading import Reading, read
from karploop.judging.rubric import Criterion, rubric
from karploop.offline_judge import run_file
from karploop.reporting.progress import Progress
from karploop.schema import lay

TEMPLATE = load_templates([path.name for path in TEMPLATES.glob("*.jinja")], TEMPLATES)
WRITES = Reading(rationale=True)


class Writer:
    """A role that writes what a function makes of a prompt; None: the call failed."""

    def __init__(self, text):
        self.text, self.prompts = text, []

    def complete(self, prompts, ids, how):
        self.prompts += prompts
        found = [self.text(prompt) for prompt in prompts]
        return [Said(text, "" if text else "timed out", Spent(10, 5)) for text in found]

    def score(self, prompts, options):
        self.prompts += prompts
        rest = [math.log(0.25 / (len(options) - 1))] * (len(options) - 1)
        return [Scored((math.log(0.75), *rest), "", Spent(10)) for _ in prompts]


# -- what is read from a text ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["4", " 4", "**4**", "4.", "4/5", "4 / 5.", "_4_", "\n4\n\nThat is all.", "[[4]]"]
)
def test_a_number_is_read(line):
    assert read(f"Rating: 9 would be too much.\nRating:{line}", list("12345"), "Rating:") == "4"


@pytest.mark.parametrize(
    "text",
    ["", "4", "Rating: four", "Rating: 4.5", "Rating: 3 or 4", "Rating: 6", "Rating: 44"]
    + ["Rating: 4\nRating: unsure", "Rating: not 4", "Rating: -", "rating: 4", "Rating: 4/10"],
)
def test_what_is_no_number_of_the_scale_is_nothing(text):
    assert read(text, list("12345"), "Rating:") is None


@settings(max_examples=200)
@given(st.text())
def test_no_text_raises_and_only_options_come_out(text):
    assert read(f"Better: {text}", ["A", "B"], "Better:") in ("A", "B", None)


def test_a_rating_after_reasons_and_none_where_it_cannot_be_read():
    role = Writer(lambda p: None if "gone" in p else "So so. Rating: " + "?4"["Why?" in p])
    found = rubric(
        [("Why?", "So."), ("What?", "That."), ("Who?", "gone")],
        role, TEMPLATE["rubric.jinja"], [Criterion("a", "Is it true?", 1.0)], 5, WRITES,
    )  # fmt: skip
    assert [opinion.score for opinion in found] == [0.75, None, None]
    assert found[0].rationales == ("So so. Rating: 4",) and found[0].spent == Spent(10, 5)
    assert found[1].reason == "no answer behind 'Rating:'" and found[2].reason == "timed out"
    assert all(prompt.endswith("Reasons:") for prompt in role.prompts)


def test_one_in_ten_invalid_replies_become_no_label():
    """Of 400 written verdicts those that are nonsense are missing, and no other is touched."""
    rng = random.Random(0)
    words = ["", "Better: both", "Better: C", "I cannot tell.", "better: A", "Better: A or B"]

    def says(prompt):
        if rng.random() < 0.1:
            return rng.choice(words)
        first = "good" in prompt[prompt.index("Reply A:") : prompt.index("Reply B:")]
        return f"Because.\nBetter: {'A' if first else 'B'}"

    pairs = [(f"q{i}", *(("good", "bad")[:: 1 if i % 2 else -1])) for i in range(200)]
    found = pairwise(pairs, Writer(says), TEMPLATE["pairwise.jinja"], WRITES)
    missing = [opinion for opinion in found if opinion.score is None]
    assert 20 < len(missing) < 60 and all(opinion.reason for opinion in missing)
    assert all(
        opinion.winner == ("first" if i % 2 else "second")
        for i, opinion in enumerate(found)
        if opinion.score is not None
    )


def test_preferences_after_reasons_are_clamped():
    role = Writer(lambda p: "Better: " + ("A" if p.index("good") < p.index("bad") else "B"))
    (found,) = constitution(
        [("q", "good", "bad")], role, TEMPLATE["constitution.jinja"], ["Be."], 1, [(0,)], 0,
        WRITES, 0.4,
    )  # fmt: skip
    assert found.score == pytest.approx(0.6) and found.winner == "first"


def test_a_judge_behind_an_address_writes_its_verdicts(serve, tmp_path):
    """Both orders, what it took, and no label from what is not one."""
    rules = [["Reply A: right", "Hm. Better: A"], ["Reply B: right", "Hm. Better: B"]]
    server = serve(rules=rules)
    config = lay(
        JudgingConfig(),
        {"judge": {"name": "pairwise", "rationale": True}},
        {"roles.judge.base_url": server.endpoint.base_url, "roles.judge.model": "small"}
        | {"roles.judge.output_price": "1e6"},
    )
    rows = [["right", "wrong"], ["wrong", "right"], ["odd", "even"]]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": f"{tmp_path}", "completions": row}) for row in rows]
    source.write_text("\n".join(lines))
    run_file(config, str(source), str(target), Progress(quiet=True))
    one, two, three = map(json.loads, target.read_text().splitlines())
    assert (one["score"], one["winner"]) == (1.0, "first") and two["winner"] == "second"
    assert three["score"] is None and three["reason"] == "no answer behind 'Better:'"
    assert one["rationales"] == ["Hm. Better: A", "Hm. Better: B"]
    assert one["tokens_out"] > 0 and one["seconds"] > 0
    assert one["dollars"] == pytest.approx(one["tokens_out"])


# -- debate ----------------------------------------------------------------------------------------


def test_debaters_hear_each_other_and_the_judge_hears_both_in_both_orders():
    debater = Writer(lambda p: f"{'For' if p.endswith('right:') else 'Against'} {len(p)}")
    judge = Writer(None)
    replies = [("Why?", "So."), ("What?", "That.")]
    templates = TEMPLATE["debate_argument.jinja"], TEMPLATE["debate.jinja"]
    found = debate(replies, judge, debater, *templates, turns=2)
    assert len(debater.prompts) == 2 * 2 * 2 and len(judge.prompts) == 2 * 2
    assert "Argument that it is right: For" in debater.prompts[2]
    forward, backward = judge.prompts[:2]
    assert forward.index("For") < forward.index("Against")
    assert backward.index("Against") < backward.index("For")
    # A bias for A alone says nothing of the reply.
    assert [opinion.score for opinion in found] == [pytest.approx(0.5)] * 2
    assert found[0].forward == pytest.approx(0.75) and found[0].spent == Spent(60, 20)
    assert [text.split()[0] for text in found[0].rationales] == ["for:"] * 2 + ["against:"] * 2


def test_a_debater_that_is_not_heard_leaves_no_verdict():
    debater = Writer(lambda p: None if "That." in p and p.endswith("wrong:") else "Yes.")
    templates = TEMPLATE["debate_argument.jinja"], TEMPLATE["debate.jinja"]
    replies = [("Why?", "So."), ("What?", "That.")]
    heard, not_heard = debate(replies, Writer(None), debater, *templates, turns=1)
    assert heard.score == pytest.approx(0.5)
    assert not_heard.score is None and not_heard.reason == "the side against: timed out"


# -- ranking ---------------------------------------------------------------------------------------


def by_quality(quality, missing=(), tied=False):
    """Comparisons by known strengths; those of `missing` texts have no verdict."""

    def compare(pairs, places):
        compare.asked += list(pairs)
        assert len(set(places)) == len(places)
        found = []
        for _, one, two in pairs:
            if {one, two} & set(missing):
                found.append(Opinion(None, "unreadable"))
                continue
            score = 0.5 if tied else 1 / (1 + math.exp(quality[two] - quality[one]))
            found.append(Opinion(score, "", {}, score, score, spent=Spent(2)))
        return found

    compare.asked = []
    return compare


QUALITY = {"a": 0.3, "b": 2.0, "c": -1.0, "d": 1.0, "e": -3.0}


@pytest.mark.parametrize("method", RANKINGS)
def test_the_best_is_first_and_equal_texts_are_equal(method):
    compare = by_quality(QUALITY)
    groups = [Group(0, "q", tuple("abcdeb")), Group(7, "r", tuple("ec"))]
    one, two = rank(groups, compare, method)
    scores = [opinion.score for opinion in one]
    assert scores[1] == scores[5] == max(scores) and all(0 <= score <= 1 for score in scores)
    assert two[1].score > two[0].score
    if method != "tournament":
        assert np.argsort(scores[:5]).tolist() == [4, 2, 0, 3, 1]
        assert len(compare.asked) == 10 + 1
    else:
        assert len(compare.asked) == 4 + 1
    assert sum(opinion.spent.tokens_in for opinion in one[:5]) == 2 * (len(compare.asked) - 1)


def test_bradley_terry_finds_the_strengths_that_made_the_shares():
    """For shares that follow the model exactly, the mean probability to win is the true one."""
    strength_N = np.exp(np.array(list(QUALITY.values())))
    wins_NxN = strength_N[:, None] / (strength_N[:, None] + strength_N[None])
    true_N = (wins_NxN.sum(1) - 0.5) / 4
    np.fill_diagonal(wins_NxN, np.nan)
    np.testing.assert_allclose(bradley_terry(wins_NxN), true_N, atol=0.02)
    # What is missing is inferred from what is there: here, from a chain of neighbours.
    chain_NxN = np.where(abs(np.subtract.outer(range(5), range(5))) == 1, wins_NxN, np.nan)
    np.testing.assert_allclose(bradley_terry(chain_NxN), true_N, atol=0.06)


@pytest.mark.parametrize("method", RANKINGS)
def test_what_was_never_compared_has_no_score(method):
    groups = [Group(0, "q", tuple("abcd")), Group(1, "r", ("same", "same"))]
    first, second = rank(groups, by_quality(QUALITY, missing="b"), method)
    assert first[1].score is None and first[1].reason == "unreadable"
    known = [opinion.score for i, opinion in enumerate(first) if i != 1]
    assert sum(score is not None for score in known) >= 2
    assert [opinion.score for opinion in second] == [None, None]
    assert second[0].reason == "nothing to compare it with"


@pytest.mark.parametrize("method", RANKINGS)
def test_ties_are_ties_and_no_place_is_favoured(method):
    """Nobody is best and worst at once; who wins a tied tournament is drawn."""
    texts = tuple("abcd")
    groups = [Group(i, "q", texts) for i in range(400)]
    found = rank(groups, by_quality(QUALITY, tied=True), method, seed=3)
    if method != "tournament":
        assert all(o.score == pytest.approx(0.5) for group in found for o in group)
        return
    first = [np.argmax([opinion.score for opinion in group]) for group in found]
    assert all(60 < first.count(place) < 140 for place in range(4))


def test_a_ranking_does_not_depend_on_other_groups():
    groups = [Group(i, "q", tuple(p)) for i, p in enumerate(itertools.permutations("abc"))]
    together = rank(groups, by_quality(QUALITY), "tournament")
    for group, opinions in zip(groups, together, strict=True):
        alone = Group(group.number, group.prompt, group.completions)
        (again,) = rank([alone], by_quality(QUALITY), "tournament")
        assert [o.score for o in again] == [o.score for o in opinions]


# -- people, and several judges --------------------------------------------------------------------


def review(folder, rows):
    path = folder / "review.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_people_are_read_and_what_they_did_not_see_is_missing(tmp_path):
    said = [
        {"prompt": "p", "completion": "a", "verdict": "good"},
        {"prompt": "p", "completion": "a", "verdict": "bad"},
        {"prompt": "p", "completion": "b", "verdict": "unsure"},
        {"prompt": "p", "completion": "c", "score": 0.25},
    ]
    judge = make_judge(JudgeConfig(name="person", review=review(tmp_path, said)), 0)
    (found,) = judge.judge([Group(0, "p", tuple("abcd"))], {}, "", 0)
    assert [opinion.score for opinion in found] == [0.5, None, 0.25, None]
    assert found[1].reason == "reviewed: unsure" and found[3].reason == "not reviewed"


def test_chance_judges_a_text_alike_wherever_it_stands_and_by_nothing_in_it():
    judge = make_judge(JudgeConfig(name="random"), 0)
    texts = tuple(map(str, range(400)))
    found = [o.score for o in judge.judge([Group(0, "p", texts)], {}, "", 0)[0]]
    (again,) = judge.judge([Group(7, "p", ("5", "3", "5"))], {}, "", 0)
    assert [o.score for o in again] == [found[5], found[3], found[5]]
    assert np.histogram(found, 4, (0, 1))[0].min() > 70  # uniform: 100 each
    for prompt, seed in (("q", 0), ("p", 1)):
        other = make_judge(JudgeConfig(name="random"), seed)
        others = [o.score for o in other.judge([Group(0, prompt, texts)], {}, "", 0)[0]]
        assert abs(np.corrcoef(found, others)[0, 1]) < 0.15


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p"}, "line 1: a review's row is"),
        ({"prompt": "p", "completion": "c", "verdict": "fine"}, "'verdict' is 'fine'"),
        ({"prompt": "p", "completion": "c", "score": 2}, "'score' is 2"),
        ({"prompt": "p", "completion": "c", "score": True}, "'score' is True"),
    ],
)
def test_a_review_is_checked(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        make_judge(JudgeConfig(name="person", review=review(tmp_path, [row])), 0)


@pytest.mark.parametrize(
    "how, scores", [("mean", [0.7, 0.3, None]), ("min", [0.6, 0.1, None]), ("vote", [1, 0, None])]
)
def test_an_ensemble_weighs_its_members_and_wants_them_all(how, scores):
    members = read_members("person, rubric@large*0.5, debate*0", MODELS)
    assert [(m.name, m.seat, m.weight) for m in members] == [
        ("person", "judge", 1.0), ("rubric", "large", 0.5), ("debate", "judge", 0.0),
    ]  # fmt: skip
    one = [Opinion(0.75), Opinion(0.4), Opinion(0.9)]
    two = [Opinion(0.6), Opinion(0.1), Opinion(None, "timed out")]
    none = [Opinion(0.01)] * 3  # whose weight is 0
    found = [combine(members, three, how) for three in zip(one, two, none, strict=True)]
    for opinion, score in zip(found, scores, strict=True):
        assert opinion.score == (score if score is None else pytest.approx(score))
    assert found[2].reason == "rubric@large: timed out"
    assert found[0].criteria == {"person": 0.75, "rubric@large": 0.6, "debate": 0.01}


def measured(tmp_path, **accuracies) -> str:
    """A report with the accuracy of each judge on 98 samples."""
    found = {
        name: {"measures": {"accuracy": dict(mean=mean, low=0.0, high=1.0, n=98)}}
        for name, mean in accuracies.items()
    }
    (tmp_path / "calibration.json").write_text(json.dumps(found))
    return str(tmp_path / "calibration.json")


def test_members_weigh_by_the_log_odds_of_their_accuracy(tmp_path):
    members = read_members("person, rubric@large, debate", MODELS)
    path = measured(tmp_path, **{"person": 1.0, "rubric@large-0a1b": 0.7, "debate": 0.4})
    weights = [member.weight for member in calibrated(members, path)]
    odds = [99 / 1, (0.7 * 98 + 1) / (0.3 * 98 + 1)]
    assert weights == pytest.approx([*np.log(odds), 0.0])
    opinion = combine(calibrated(members, path), [Opinion(0.2), Opinion(0.9), Opinion(0.9)], "vote")
    assert opinion.score == pytest.approx(weights[1] / sum(weights))
    config = JudgeConfig(name="ensemble", members="rubric, debate", calibration="none.json")
    with pytest.raises(UserError, match="is no report of experiments.calibrate"):
        make_judge(config, 0)
    path = measured(tmp_path, rubric=0.9, debate=0.6)
    judge = make_judge(dataclasses.replace(config, calibration=path), 0)
    assert judge.settings["weights"] == pytest.approx(np.log([89.2 / 10.8, 59.8 / 40.2]))


@pytest.mark.parametrize(
    ("members", "accuracies", "message"),
    [
        ("rubric, debate", {"rubric": 0.9}, "has none with an accuracy"),
        ("rubric, debate", {"rubric-a": 0.9, "rubric-b": 0.8, "debate": 0.7}, "has several"),
        ("rubric, debate*0.5", {"rubric": 0.9, "debate": 0.7}, "leave out its weights"),
        ("rubric, debate", {"rubric": 0.4, "debate": 0.5}, "more often than a coin"),
    ],
)
def test_a_report_that_says_too_little_is_refused(tmp_path, members, accuracies, message):
    with pytest.raises(UserError, match=message):
        calibrated(read_members(members, MODELS), measured(tmp_path, **accuracies))


@pytest.mark.parametrize("text", ["", "rubrik", "rubric, rubric", "rubric*0", "rubric@", "a b"])
def test_members_are_checked(text):
    with pytest.raises(UserError, match="'config.judge.members'"):
        read_members(text, MODELS)


def test_an_ensemble_asks_each_of_its_roles():
    config = JudgeConfig(name="ensemble", members="rubric, rubric@large, pairwise@large")
    judge = make_judge(config, 0)
    assert list(judge.seats) == ["judge", "large"] and judge.compares
    roles = {"judge": Writer(None), "large": Writer(None)}
    (found,) = judge.judge([Group(0, "p", ("a", "b"))], roles, "round_robin", 0)
    assert list(found[0].criteria) == ["rubric", "rubric@large", "pairwise@large"]
    assert found[0].score == pytest.approx(np.mean(list(found[0].criteria.values())))
    assert len(roles["judge"].prompts) == 3 * 2 and len(roles["large"].prompts) == 3 * 2 + 2
