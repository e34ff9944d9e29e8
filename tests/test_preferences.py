"""Pairs of a better and a worse completion: which there are, and which there must never be."""

import numpy as np
import pytest
from hand_made import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from karploop.config import PreferenceConfig
from karploop.errors import UserError
from karploop.filtering.preferences import PAIRINGS, preferences
from karploop.judging.by_model import to_record
from karploop.judging.opinion import Opinion
from karploop.judging.ranking import Group, rank
from karploop.records import Pairs, Selection, Verdicts

laws = settings(max_examples=60, deadline=None, derandomize=True)


def opinions(scores, forward=None, backward=None):
    both = zip(scores, forward or scores, backward or scores, strict=True)
    return to_record("j", [Opinion(s, "" if s else "lost", {}, f, b) for s, f, b in both])


def pairs(rows, verdicts, name="best_worst", selection=None, **config) -> list[tuple[int, int]]:
    found = preferences(samples(rows), verdicts, PreferenceConfig(name, **config), selection)
    return list(zip(found.chosen_P.tolist(), found.rejected_P.tolist(), strict=True))


def rows_of(*texts, prompt=1):
    return [(prompt, 0, text, True) for text in texts]


def test_best_and_worst_of_each_prompt():
    rows = rows_of("a", "b", "c") + rows_of("d", "e", prompt=2) + rows_of("f", prompt=3)
    batch = opinions([0.5, 0.9, 0.1, 0.2, 0.7, 1.0])
    assert pairs(rows, batch) == [(1, 2), (4, 3)]
    assert pairs(rows, batch, margin=0.6) == [(1, 2)]
    found = preferences(samples(rows), batch, PreferenceConfig())
    assert found.prompt_id_P.tolist() == [1, 2] and found.prompts == ["12=", "22="]
    assert found.margin_P.tolist() == pytest.approx([0.8, 0.5])
    assert found.difficulty_P.tolist() == [2, 2] and found.member_P.tolist() == [0, 0]
    assert Pairs.from_table(found.to_table()).to_table() == found.to_table()


def test_all_pairs_by_falling_margin_and_no_more_than_wanted():
    rows = rows_of("a", "b", "c")
    assert pairs(rows, opinions([0.5, 0.9, 0.2]), "all_pairs") == [(1, 2), (1, 0), (0, 2)]
    assert pairs(rows, opinions([0.5, 0.9, 0.2]), "all_pairs", margin=0.4) == [(1, 2), (1, 0)]
    assert pairs(rows, opinions([0.5, 0.9, 0.2]), "all_pairs", per_prompt=1) == [(1, 2)]


def test_a_round_has_no_more_pairs_than_wanted_and_those_of_its_first_prompts():
    rows = rows_of("a", "b") + rows_of("c", "d", prompt=2) + rows_of("e", "f", prompt=3)
    scores = opinions([0.5, 0.5, 0.6, 0.5, 0.1, 0.9])
    assert pairs(rows, scores) == pairs(rows, scores, count=2) == [(2, 3), (5, 4)]
    assert pairs(rows, scores, count=1) == [(2, 3)]


def test_ties_missing_verdicts_and_equal_texts_make_no_pair():
    assert pairs(rows_of("a", "b"), opinions([0.3, 0.1 + 0.2]), "all_pairs") == []
    assert pairs(rows_of("a", "b"), opinions([0.9, None]), "all_pairs") == []
    assert pairs(rows_of("a", "a"), opinions([0.9, 0.1]), "all_pairs") == []
    # A text stands once: it is not both better and worse than another.
    assert pairs(rows_of("a", "b", "a"), opinions([0.9, 0.5, 0.1]), "all_pairs") == [(0, 1)]


def test_what_did_not_end_is_in_no_pair():
    rows = [(1, 0, "a", False), (1, 0, "b", True), (1, 0, "c", True), (1, 0, "d", False)]
    assert pairs(rows, opinions([1.0, 0.6, 0.4, 0.0]), "all_pairs") == [(1, 2)]


def test_of_a_selection_only_kept_rows_are_chosen_and_any_is_rejected():
    rows, batch = rows_of("a", "b", "c", "b"), opinions([0.9, 0.6, 0.2, 0.7])
    kept = Selection(np.array([False, False, True, True]), [""] * 4)
    assert pairs(rows, batch, selection=kept) == [(3, 2)]
    assert pairs(rows, batch, "all_pairs", selection=kept) == [(3, 2)]
    nothing = Selection(np.zeros(4, bool), [""] * 4)
    assert pairs(rows, batch, selection=nothing) == []


def compared(by_order) -> list[Opinion]:
    """The judging of three texts, by how probable it is that the first is better, either way."""

    def compare(pairs, places):
        found = [by_order[one, other] for _, one, other in pairs]
        return [Opinion((f + b) / 2, "", {}, f, b) for f, b in found]

    return rank([Group(0, "p", ("a", "b", "c"))], compare)[0]


def test_consistent_pairs_are_those_on_which_both_orders_agree():
    rows = rows_of("a", "b")
    # Of two: the second's scores are what the first's leave.
    agreed = opinions([0.8, 0.2], [0.9, 0.3], [0.7, 0.1])
    swayed = opinions([0.6, 0.4], [0.9, 0.7], [0.3, 0.1])  # whoever is shown first is better
    assert pairs(rows, agreed, "consistent") == [(0, 1)]
    assert pairs(rows, swayed, "consistent") == [] != pairs(rows, swayed, "all_pairs")
    # Of three, as a judge compares them: only a beats, and only c is beaten, in either place.
    judged = to_record(
        "j", compared({("a", "b"): (0.9, 0.6), ("a", "c"): (0.9, 0.8), ("b", "c"): (0.9, 0.3)})
    )
    rows = rows_of("a", "b", "c")
    assert pairs(rows, judged, "consistent") == [(0, 2)]
    assert len(pairs(rows, judged, "all_pairs")) == 3


def test_orders_that_nobody_asked_for_are_refused():
    rows = rows_of("a", "b")
    for verdicts in (
        Verdicts([1.0, 0.0], ["", ""]),
        to_record("j", [Opinion(1.0), Opinion(0.0)]),
    ):
        with pytest.raises(UserError, match="in both orders, and these have none"):
            pairs(rows, verdicts, "consistent")


scores = st.one_of(st.none(), st.sampled_from([0.0, 0.3, 0.1 + 0.2, 0.5, 0.8, 1.0]))


@laws
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(0, 1), st.text("12", max_size=2), st.booleans(),
            scores, scores, scores, st.booleans(),
        ),
        max_size=20,
    ),
    st.sampled_from(sorted(PAIRINGS)),
    st.sampled_from([0.0, 0.3, 0.7]),
    st.integers(0, 3),
)  # fmt: skip
def test_every_pair_is_of_one_prompt_and_clearly_better(made, name, margin, per_prompt):
    batch = samples([row[:4] for row in made])
    verdicts = opinions(*([row[i] for row in made] for i in (4, 5, 6))) if made else opinions([])
    kept = Selection(np.array([row[7] for row in made], bool), [""] * len(made))
    if name == "consistent" and all(row[5] is row[6] is None for row in made):
        return
    before = batch.to_table()
    found = preferences(batch, verdicts, PreferenceConfig(name, margin, per_prompt), kept)
    assert batch.to_table() == before
    score_S = verdicts.score_S
    texts = set()
    for k, (i, j) in enumerate(zip(found.chosen_P, found.rejected_P, strict=True)):
        assert batch.finished_S[i] and batch.finished_S[j] and kept.kept_S[i]
        assert batch.prompt_id_S[i] == batch.prompt_id_S[j] == found.prompt_id_P[k]
        assert batch.completions[i] != batch.completions[j]
        assert found.margin_P[k] == score_S[i] - score_S[j] > 1e-9  # no number where one is missing
        assert found.margin_P[k] >= margin - 1e-9
        assert found.member_P[k] == batch.member_S[i]
        pair = (int(batch.prompt_id_S[i]), batch.completions[i], batch.completions[j])
        assert pair not in texts and (pair[0], pair[2], pair[1]) not in texts
        texts.add(pair)
    if per_prompt:
        counts = np.unique(found.prompt_id_P, return_counts=True)[1]
        assert not (counts > (1 if name == "best_worst" else per_prompt)).any()


@laws
@given(st.lists(st.tuples(st.text("123", min_size=1, max_size=2), scores), min_size=1, max_size=8))
def test_the_best_and_the_worst_are_the_widest_of_all_pairs(made):
    rows = rows_of(*(text for text, _ in made))
    verdicts = opinions([score for _, score in made])
    widest = preferences(samples(rows), verdicts, PreferenceConfig("best_worst"))
    every = preferences(samples(rows), verdicts, PreferenceConfig("all_pairs"))
    assert widest.margin_P.tolist() == every.margin_P[:1].tolist()
    assert (np.diff(every.margin_P) <= 0).all()
