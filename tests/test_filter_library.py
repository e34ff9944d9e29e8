"""What each filter of the library keeps, and laws that hold of any of them and of combinations."""

import dataclasses
import itertools

import numpy as np
import pytest
from hand_made import samples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from karploop.config import FilterConfig
from karploop.errors import UserError
from karploop.filtering import by_text, registry
from karploop.filtering.filters import SCORES, Said, get_filter, register
from karploop.records import Samples, Votes

LIBRARY = sorted(name for name, f in registry._FILTERS.items() if "karploop" in f.modules[0])
COMBINED = [
    "chain(threshold, near_duplicates, cap)",
    "all_of(threshold, length, random)",
    "chain(all_of(length, none), quantile, all_of(duplicates, perplexity))",
]
# What these keep depends on nothing but the rows themselves, whatever their order.
ORDERLESS = ["none", "discard", "length", "parses", "perplexity", "threshold", "verifier"]
laws = settings(max_examples=40, deadline=None, derandomize=True)


def verdicts(scores, batch: Samples) -> Votes:
    """Of any judge; for votes each wording is an answer of its own."""
    reasons = ["" if s is not None else "lost" for s in scores]
    return Votes(list(scores), reasons, batch.completions)


def select(name, batch: Samples, scores=None, gold=None, seed=0, **config):
    said = Said(*(given and verdicts(given, batch) for given in (scores, gold)))
    return get_filter(name).select(batch, said, FilterConfig(**config), np.random.default_rng(seed))


def kept(name, rows, scores=None, **config) -> list[int]:
    batch = samples([(prompt, 0, text, True) for prompt, text in rows])
    return np.flatnonzero(select(name, batch, scores, **config).kept_S).tolist()


@st.composite
def batches(draw, least=1):
    """Samples of a few prompts with scores, of which some are equal, lost, or of unended rows."""
    row = st.tuples(st.integers(0, 3), st.just(0), st.text("12", max_size=4), st.booleans())
    rows = sorted(draw(st.lists(row, min_size=least, max_size=16)), key=lambda r: r[0])
    batch = samples(rows, [1 + r[0] % 2 for r in rows])
    nll = draw(st.lists(st.floats(0, 3), min_size=len(rows), max_size=len(rows)))
    logprobs = [[-x] * (i % 4) for i, x in enumerate(nll)]
    score = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
    scores = draw(st.lists(score, min_size=len(rows), max_size=len(rows)))
    return dataclasses.replace(batch, logprobs=logprobs), scores


configs = st.builds(
    dict,
    rate=st.floats(0, 1),
    count=st.integers(-1, 8),
    threshold=st.sampled_from([0.0, 0.5, 1.0]),
    cap=st.integers(1, 3),
    margin=st.sampled_from([0.0, 0.3]),
    among=st.sampled_from(["prompt", "all"]),
    shingle=st.sampled_from(["characters", "words"]),
    shingle_size=st.integers(1, 3),
    similarity=st.sampled_from([0.1, 0.6, 1.0]),
)


@laws
@given(batches(), configs, st.sampled_from(LIBRARY + COMBINED))
def test_every_row_has_a_reason_and_what_is_kept_has_ended_and_been_judged(made, config, name):
    batch, scores = made
    before = batch.to_table()
    selection = select(name, batch, scores, scores, **config)
    assert len(selection) == len(batch) and batch.to_table() == before
    pairs = list(zip(selection.kept_S.tolist(), selection.reasons, strict=True))
    assert not {r for k, r in pairs if k} & {r for k, r in pairs if not k}
    assert all(reason for _, reason in pairs)
    assert not (selection.kept_S & ~batch.finished_S).any()
    if get_filter(name).judges or get_filter(name).reads_gold:
        missing_S = np.array([score is None for score in scores])
        assert not (selection.kept_S & missing_S).any()
    again = select(name, batch, scores, scores, **config)
    assert again.reasons == selection.reasons


@laws
@given(batches(), configs, st.sampled_from(ORDERLESS), st.randoms())
def test_the_order_of_rows_decides_nothing_where_nothing_is_drawn(made, config, name, random):
    batch, scores = made
    order = np.array(random.sample(range(len(batch)), len(batch)))
    moved = select(name, batch.take(order), [scores[i] for i in order], **config)
    here = select(name, batch, scores, **config)
    assert moved.kept_S.tolist() == here.kept_S[order].tolist()
    assert moved.reasons == [here.reasons[i] for i in order]


@laws
@given(batches(), configs)
def test_no_prompt_has_more_rows_than_the_cap(made, config):
    batch, scores = made
    for name in ("cap", "top_k"):
        there_S = batch.finished_S.copy()
        if name == "top_k":
            there_S &= np.array([score is not None for score in scores])
        found = select(name, batch, scores, **config)
        for prompt in set(batch.prompt_id_S.tolist()):
            own_S = batch.prompt_id_S == prompt
            assert (found.kept_S & own_S).sum() == min(config["cap"], (there_S & own_S).sum())


@laws
@given(batches(), configs, st.sampled_from(LIBRARY))
def test_a_chain_of_one_is_that_one(made, config, name):
    batch, scores = made
    one, alone = (select(n, batch, scores, scores, **config) for n in (f"chain({name})", name))
    assert one.kept_S.tolist() == alone.kept_S.tolist() and one.reasons == alone.reasons


@laws
@given(batches(), configs, st.lists(st.sampled_from(LIBRARY), min_size=3, max_size=3))
@example((samples([(0, 0, "1", True)]), [1.0]), {"cap": 1}, ["cap", "cap", "duplicates"])
def test_chains_nest_and_only_ever_narrow(made, config, names):
    batch, scores = made
    a, b, c = names
    flat = select(f"chain({a}, {b}, {c})", batch, scores, scores, **config)
    nested = select(f"chain({a}, chain({b}, {c}))", batch, scores, scores, **config)
    assert flat.reasons == nested.reasons and (flat.kept_S == nested.kept_S).all()
    first = select(a, batch, scores, scores, **config)
    assert not (flat.kept_S & ~first.kept_S).any()
    assert all(
        reason == first.reasons[i] for i, reason in enumerate(flat.reasons) if not first.kept_S[i]
    )


@laws
@given(batches(), configs, st.lists(st.sampled_from(LIBRARY), min_size=1, max_size=4, unique=True))
def test_all_of_keeps_the_same_rows_in_any_order_of_its_members(made, config, names):
    batch, scores = made
    orders = (names, names[::-1], sorted(names))
    found = [
        select(f"all_of({', '.join(order)})", batch, scores, scores, **config) for order in orders
    ]
    assert len({tuple(one.kept_S.tolist()) for one in found}) == 1
    fixed = [n for n in names if n in ORDERLESS]
    for name in fixed:
        assert not (found[0].kept_S & ~select(name, batch, scores, **config).kept_S).any()
    if fixed == names:
        each = [select(n, batch, scores, **config).kept_S for n in names]
        assert (found[0].kept_S == np.logical_and.reduce(each)).all()


def test_filters_read_exactly_the_keys_that_they_declare(monkeypatch):
    """Else a key could change a selection without making another stage, or make one in vain."""
    reads: set[str] = set()

    def watched(self, name):
        reads.add(name)
        return object.__getattribute__(self, name)

    batch = samples([(i % 3, 0, "12" * (i % 4), i != 5) for i in range(12)])
    scores = verdicts([0.1 * (i % 5) for i in range(12)], batch)
    for name in LIBRARY:
        chosen = get_filter(name)
        seen = set()
        for config in (FilterConfig(), FilterConfig(count=2)):
            with monkeypatch.context() as patch:
                patch.setattr(FilterConfig, "__getattribute__", watched)
                chosen.function(batch, scores, config, np.random.default_rng(0))
            seen |= {name for name in reads if not name.startswith("__")}
            reads.clear()
        assert seen == set(chosen.keys), name


def test_a_filter_sees_no_key_that_it_does_not_declare():
    seen = []

    @register("narrow", keys=("slack",))
    def narrow(samples, verdicts, config, rng):
        seen.append((config.slack, config.rate, verdicts))
        return registry.decide(samples, kept="kept")

    select("narrow", samples([(1, 0, "1", True)]), [1.0], slack=4, rate=0.125)
    assert seen == [(4, FilterConfig().rate, None)]
    with pytest.raises(UserError, match="reads 'config.filter.slak': did you mean 'slack'"):
        register("wrong", keys=("slak",))(narrow.function)


def test_a_selection_that_leaves_rows_out_is_refused():
    @register("short")
    def short(samples, verdicts, config, rng):
        return registry.decide(samples.take(np.array([0])), kept="kept")

    with pytest.raises(UserError, match="'short' gave a selection of 1 rows for 2 samples"):
        select("short", samples([(1, 0, "1", True)] * 2))


def test_top_k_takes_the_best_of_each_prompt_and_some_of_equals():
    rows = [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "b"), (2, "c")]
    scores = [0.2, 0.9, 0.5, 0.5, 0.5, 0.5]
    found = kept("top_k", rows, scores, cap=2)
    assert found[:2] == [1, 2] and len(found) == 4
    assert kept("top_k", rows, scores, cap=9) == list(range(6))
    assert len({tuple(kept("top_k", rows, scores, cap=1, seed=s)) for s in range(9)}) > 1


def test_margin_keeps_the_best_where_it_leads_clearly_by_another_text():
    rows = [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"), (3, "a"), (4, "a"), (4, "b")]
    scores = [0.9, 0.8, 0.9, 0.85, 0.9, 0.2, 0.5, 0.5]
    assert kept("margin", rows, scores, margin=0.1) == [0]
    assert kept("margin", rows, scores, margin=0.0) == [0, 2]
    batch = samples([(prompt, 0, text, True) for prompt, text in rows])
    reasons = select("margin", batch, scores, margin=0.1).reasons
    assert reasons[2] == "the best is too close to the next"
    assert reasons[4] == "no other text to compare it with"
    assert reasons[1] == "not the best of its prompt"


def test_a_number_of_rows_goes_before_the_share():
    rows = [(i, "a") for i in range(10)]
    scores = [i / 10 for i in range(10)]
    assert kept("quantile", rows, scores, rate=0.3) == [7, 8, 9]
    assert kept("quantile", rows, scores, rate=0.3, count=1) == [9]
    assert kept("quantile", rows, scores, rate=0.3, count=0) == []
    assert len(kept("random", rows, count=4)) == 4


def test_perplexity_is_bounded_in_nats_or_by_quantile():
    batch = samples([(i, 0, "12", i != 5) for i in range(7)])
    logprobs = [[-0.1, -0.3], [-1.0], [-2.0, -2.0], [-3.0], [], [-9.0], [-1.0, -3.0]]
    batch = dataclasses.replace(batch, logprobs=logprobs)
    found = select("perplexity", batch, nll_by="nats", nll_low=0.5, nll_high=2.0)
    assert found.kept_S.tolist() == [False, True, True, False, False, False, True]
    assert found.reasons[0] == "too likely" and found.reasons[3] == "too unlikely"
    assert found.reasons[4] == "no log-probabilities" and found.reasons[5] == "did not end"
    # Of 0.2, 1, 2, 2, 3: the one that did not end sets no quantile.
    middle = select("perplexity", batch, nll_low=0.25, nll_high=0.75)
    assert middle.kept_S.tolist() == [False, True, True, False, False, False, True]


def test_duplicates_are_copies_within_a_prompt_or_in_all():
    rows = [(1, "a"), (1, "a"), (1, "b"), (2, "a")]
    assert kept("duplicates", rows) == [0, 2, 3]
    assert kept("duplicates", rows, among="all") == [0, 2]
    batch = samples([(1, 0, "a", False), (1, 0, "a", True), (1, 0, "a", True)])
    assert select("duplicates", batch).reasons == ["did not end", "no copy", "a copy"]


def test_near_duplicates_are_alike_in_characters_or_words():
    text = "the model answers problems that it could not answer before"
    rows = [(1, text), (1, f"{text}!"), (1, "something else altogether, in other words"), (2, text)]
    assert kept("near_duplicates", rows) == [0, 2, 3]
    assert kept("near_duplicates", rows, among="all") == [0, 2]
    assert kept("near_duplicates", rows, similarity=1.0) == [0, 1, 2, 3]
    words = [(1, "a b c d e f"), (1, "a b c d e g"), (1, "f e d c b a")]
    both = dict(shingle="words", shingle_size=2)
    assert kept("near_duplicates", words, **both, similarity=0.6) == [0, 2]
    assert kept("near_duplicates", words, **both, similarity=0.7) == [0, 1, 2]


@laws
@given(batches(), configs)
def test_what_is_dropped_as_a_near_duplicate_is_like_one_that_is_kept(made, config):
    batch, _ = made
    settings = FilterConfig(**config)
    near = select("near_duplicates", batch, **config)
    copies = select("duplicates", batch, **config)
    assert not (near.kept_S & ~copies.kept_S).any()
    groups = batch.prompts if settings.among == "prompt" else [""] * len(batch)
    cut = [by_text.shingled(t, settings, g) for t, g in zip(batch.completions, groups, strict=True)]
    for row in np.flatnonzero(batch.finished_S & ~near.kept_S):
        before = np.flatnonzero(near.kept_S[:row])
        assert max(by_text.jaccard(cut[row], cut[k]) for k in before) >= settings.similarity


def test_diverse_keeps_what_is_farthest_from_what_it_has():
    texts = ["aaaa", "aaab", "bbbb", "cccc", "cccb"]
    rows = [(1, text) for text in texts]
    for seed in range(5):
        found = kept("diverse", rows, count=3, seed=seed)
        assert {texts[i][0] for i in found} == {"a", "b", "c"}
    two = [(1, "aaaa"), (1, "aaaa"), (2, "aaaa"), (2, "aaaa"), (2, "bbbb")]
    first = kept("diverse", two, count=2)
    assert {two[i][0] for i in first} == {1, 2}, "every prompt has one before any has two"
    assert len(kept("diverse", two, count=2, among="all")) == 2
    assert {two[i][1] for i in kept("diverse", two, count=2, among="all")} == {"aaaa", "bbbb"}


def test_a_chains_members_see_what_is_left():
    """Half of what the first keeps, and the vote's majority of it; earlier reasons stay."""
    batch = samples([(i // 2, 0, "12" if i < 4 else "123", True) for i in range(8)], [2] * 8)
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    found = select("chain(length, quantile)", batch, scores, slack=0, rate=0.5)
    assert np.flatnonzero(found.kept_S).tolist() == [4, 5]
    assert found.reasons[0] == "too short" and found.reasons[6] == "not among the best"
    assert found.reasons[4] == "long enough; among the best"


def test_gold_and_a_judges_verdicts_stand_side_by_side():
    batch = samples([(i // 2, 0, str(i), True) for i in range(8)])
    scores, gold = [0.9, 0.8, 0.1, 0.9, 0.9, 0.1, 0.2, 0.3], [0.0, 1.0] * 4
    found = select("all_of(threshold, oracle)", batch, scores, gold)
    assert np.flatnonzero(found.kept_S).tolist() == [1, 3]
    assert found.reasons[0] == "wrong by gold" and found.reasons[5] == "below the threshold"


def test_the_oracle_goes_through_the_prompts_in_turns():
    batch = samples([(i // 4, 0, str(i), i != 3) for i in range(12)])
    gold = [1.0, 1.0, 0.0, 1.0] + [1.0, 0.0, 0.0, 0.0] + [0.0] * 4
    alone = select("oracle", batch, gold=gold)
    assert sorted(batch.prompt_id_S[alone.kept_S]) == [0, 1]
    more = select("oracle", batch, gold=gold, count=3)
    assert np.flatnonzero(more.kept_S).tolist() == [0, 1, 4]
    assert select("oracle", batch, gold=gold, count=1).kept_S.sum() == 1
    assert select("oracle", batch, gold=gold, count=9).kept_S.sum() == 3
    assert more.reasons[3] == "did not end" and more.reasons[5] == "wrong by gold"


def test_names_are_read_whatever_their_spaces():
    found = get_filter(" chain( verifier,all_of(length , none) ,cap ) ")
    assert found.name == "chain(verifier, all_of(length, none), cap)"
    assert [part.name for part in found.parts] == ["verifier", "length", "none", "cap"]
    assert found.judges == {"verifier"} and not found.reads_gold
    assert found.reads == ("slack", "cap", "missing")
    assert get_filter("chain(threshold, oracle)").judges == {SCORES}


@pytest.mark.parametrize(
    "name, message",
    [
        ("chain", "combines filters: name them, as in chain"),
        ("chain()", "names in brackets"),
        ("chain(verifier,)", "names in brackets"),
        ("chain(verifier", "names in brackets"),
        ("chain(verifier))", "names in brackets"),
        ("chain(a)(b)", "names in brackets"),
        ("verifier, cap", "names in brackets"),
        ("chian(verifier, cap)", "did you mean 'chain'"),
        ("chain(verifer, cap)", "did you mean 'verifier'"),
        ("all_off", "did you mean 'all_of'"),
        ("all_of(cap, length, cap)", "names a filter twice"),
        ("chain(cap, no_such_module:thing)", "cannot be imported"),
    ],
)
def test_combinations_that_cannot_be_read_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        get_filter(name)


def test_shingles_of_short_texts_are_the_texts():
    config = FilterConfig(shingle_size=3)
    assert by_text.shingled("ab", config) == {"\0ab"}
    assert by_text.shingled("abcd", config, "g") == {"g\0abc", "g\0bcd"}
    words = dataclasses.replace(config, shingle="words", shingle_size=2)
    assert by_text.shingled("a  b c", words) == {"\0a b", "\0b c"}
    for one, other in itertools.permutations([{"a", "b"}, {"b", "c", "d"}]):
        assert by_text.jaccard(one, other) == 0.25
