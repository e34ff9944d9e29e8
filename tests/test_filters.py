"""Filters and judges on hand-made samples: what is kept, why, and what they never see."""

import inspect
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hand_made import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from karploop.config import FilterConfig
from karploop.data.tasks import get_task
from karploop.errors import UserError
from karploop.filtering.filters import Filter, get_filter, register
from karploop.judging.judge import judged
from karploop.judging.verifier import verifier
from karploop.judging.vote import vote
from karploop.records import Samples, Verdicts, Votes

REVERSE = get_task("reverse")


def apply(name, rows, verdicts=None, seed=0, difficulty=None, **config):
    chosen = get_filter(name)
    return chosen.function(
        samples(rows, difficulty), verdicts, FilterConfig(name=name, **config), rng(seed)
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def test_verifier_knows_gold_and_counts_an_unfinished_answer_as_wrong():
    rows = [(1, 0, "21", True), (1, 0, "12", True), (1, 0, "21", False)]
    assert verifier(samples(rows), REVERSE).scores == [1.0, 0.0, 0.0]


def test_vote_counts_shares_by_prompt_and_abstains_on_the_unfinished():
    rows = [(1, 0, "21", True), (1, 0, "21", True), (1, 0, "12", True), (1, 0, "2", False)]
    rows += [(2, 0, "22", True)]
    verdicts = vote(samples(rows), REVERSE, "samples")
    assert verdicts.scores == [0.5, 0.5, 0.25, None, 1.0]
    assert verdicts.reasons == ["", "", "", "no answer", ""]


def test_vote_over_members_pools_their_samples_and_vote_over_samples_does_not():
    rows = [(1, member, answer, True) for member, answer in enumerate(["21", "21", "12"])]
    assert vote(samples(rows), REVERSE, "members").scores == [2 / 3, 2 / 3, 1 / 3]
    assert vote(samples(rows), REVERSE, "samples").scores == [1.0, 1.0, 1.0]


def test_judge_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="known are 'verifier' and 'vote'"):
        judged("oracle", samples([(1, 0, "21", True)]), REVERSE, "samples")


def test_no_filter_keeps_all_that_ended():
    selection = apply("none", [(1, 0, "21", True), (1, 0, "2", False)])
    assert selection.kept_S.tolist() == [True, False]
    assert selection.reasons == ["everything is kept", "did not end"]


def test_random_filter_keeps_its_rate_and_depends_on_the_key_alone():
    rows = [(i, 0, "21", i % 5 != 0) for i in range(200)]
    kept = apply("random", rows, rate=0.25).kept_S
    assert kept.sum() == 50
    assert not kept[::5].any()
    assert (kept == apply("random", rows, rate=0.25).kept_S).all()
    assert (kept != apply("random", rows, rate=0.25, seed=1).kept_S).any()


def test_length_filter_compares_with_the_longest_of_the_same_difficulty():
    rows = [(1, 0, "12345", True), (2, 0, "1234", True), (3, 0, "123", True), (4, 0, "12", True)]
    rows += [(5, 0, "123456789", False)]  # an endless one sets no standard
    selection = apply("length", rows, slack=1, difficulty=[5, 5, 5, 2, 5])
    assert selection.kept_S.tolist() == [True, True, False, True, False]
    assert selection.reasons[2] == "too short"
    assert selection.reasons[4] == "did not end"


def test_parses_filter_looks_at_the_form_alone():
    rows = [(1, 0, " 21", True), (2, 0, "-7 ", True), (3, 0, "21.", True), (4, 0, "21", False)]
    selection = apply("parses", rows)
    assert selection.kept_S.tolist() == [True, True, False, False]
    assert selection.reasons == ["parses", "parses", "does not parse", "did not end"]
    assert apply("parses", rows, pattern=r"\d+\.").kept_S.tolist() == [False, False, True, False]


def votes_for(rows):
    return vote(samples(rows), REVERSE, "samples")


def test_vote_filter_keeps_the_majority_answer_once():
    rows = [(1, 0, "21", True)] * 4 + [(1, 0, "12", True)]
    selection = apply("vote", rows, votes_for(rows), agreement=0.8)
    assert selection.kept_S.tolist() == [True, False, False, False, False]
    assert selection.reasons[4] == "too few agree"
    assert not apply("vote", rows, votes_for(rows), agreement=0.9).kept_S.any()


def test_vote_filter_drops_ties_and_missing_verdicts():
    rows = [(1, 0, "21", True), (1, 0, "12", True), (2, 0, "", True), (3, 0, "23", True)]
    selection = apply("vote", rows, votes_for(rows), agreement=0.5)
    assert selection.kept_S.tolist() == [False, False, False, True]
    assert selection.reasons == ["tie", "tie", "no verdict", "the majority agrees"]


def test_vote_filter_takes_answers_worded_differently_as_one():
    task = get_task("multiplication")
    rows = [(1, 0, "24=24", True), (1, 0, "=24", True), (1, 0, "=25", True)]
    selection = apply("vote", rows, vote(samples(rows), task, "samples"), agreement=0.6)
    assert selection.kept_S.tolist() == [True, False, False]
    # Half of the votes, in two wordings, are no tie; two answers of half each are one.
    rows = [(1, 0, "24=24", True), (1, 0, "=24", True), (1, 0, "=25", True), (1, 0, "=26", True)]
    for task_of_rows, kept in [(task, [True, False, False, False]), (REVERSE, [False] * 4)]:
        found = vote(samples(rows), task_of_rows, "samples")
        assert apply("vote", rows, found, agreement=0.25).kept_S.tolist() == kept


def test_verifier_filter_keeps_what_is_right_and_never_a_missing_verdict():
    verdicts = Verdicts(scores=[1.0, 0.0, None], reasons=["", "", "timed out"])
    rows = [(1, 0, "21", True)] * 3
    selection = apply("verifier", rows, verdicts)
    assert selection.kept_S.tolist() == [True, False, False]
    assert selection.reasons == ["right by the verifier", "wrong by the verifier", "no verdict"]


@pytest.mark.parametrize("name", ["vote", "verifier"])
def test_a_missing_verdict_is_missing_through_its_file_and_moves_no_row(name):
    """Not a 0, which is what a wrong answer has; the rows around it keep their own."""
    rows = [(i, 0, f"{i}2", True) for i in range(5)]
    columns = dict(scores=[1.0, None, 0.0, 1.0, None], reasons=["", "lost", "", "", "lost"])
    kind = Verdicts
    if name == "vote":
        kind, columns = Votes, columns | {"answers": ["02", "", "22", "32", ""]}
    verdicts = kind(**columns)
    stored = io.BytesIO()
    pq.write_table(verdicts.to_table(), stored)
    read = kind.from_table(pq.read_table(pa.BufferReader(stored.getvalue())))
    assert read == verdicts
    assert np.isnan(read.score_S).tolist() == [False, True, False, False, True]
    selection = apply(name, rows, read, agreement=0.0)
    assert [reason == "no verdict" for reason in selection.reasons] == [
        r == "lost" for r in read.reasons
    ]
    assert selection.kept_S[[0, 3]].all() and not selection.kept_S[[1, 4]].any()


def test_only_the_filter_named_verifier_asks_for_gold():
    for name in ("none", "random", "length", "vote"):
        assert get_filter(name).judge != "verifier"
    assert get_filter("verifier").judge == "verifier"
    parameters = inspect.signature(get_filter("length").function).parameters
    assert list(parameters) == ["samples", "verdicts", "config", "rng"]
    assert not any("answer" in f or "gold" in f for f in Samples.__dataclass_fields__)


def test_unknown_filter_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'length'"):
        get_filter("lenght")
    with pytest.raises(UserError, match="cannot be imported"):
        get_filter("no_such_module:thing")
    with pytest.raises(UserError, match="is not a filter"):
        get_filter("math:pi")


def test_a_filter_of_ones_own_is_found_by_its_import_path():
    @register("even_rows")
    def even_rows(samples, verdicts, config, rng):
        raise AssertionError

    assert isinstance(get_filter("even_rows"), Filter)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.text("12", max_size=4), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from(["none", "random", "length", "vote", "verifier"]),
    st.floats(0, 1),
)
def test_every_filter_gives_every_row_a_reason_and_keeps_only_what_ended(rows, name, level):
    batch = samples(rows)
    judge = get_filter(name).judge
    verdicts = judged(judge, batch, REVERSE, "samples") if judge else None
    before = batch.to_table()
    selection = apply(name, rows, verdicts, agreement=level, rate=level)
    assert len(selection) == len(batch)
    assert all(selection.reasons)
    assert not (selection.kept_S & ~batch.finished_S).any()
    kept = {r for k, r in zip(selection.kept_S, selection.reasons, strict=True) if k}
    dropped = {r for k, r in zip(selection.kept_S, selection.reasons, strict=True) if not k}
    assert not kept & dropped
    assert batch.to_table() == before
    if name == "vote":
        ids = batch.prompt_id_S[selection.kept_S].tolist()
        assert len(ids) == len(set(ids))
