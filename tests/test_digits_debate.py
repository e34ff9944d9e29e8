"""Debates about images: the rules, exact search, the judge, and the command on a few images."""

import itertools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.digits_debate import study
from karploop.errors import UserError
from karploop.oversight import debate_game, debate_study
from karploop.oversight.debate_game import levels, make_tables, play, solve, subsets
from karploop.oversight.sparse_judge import SparseJudge, random_mask, train

TURNS = 4
# Nine pixels each, of which eight and six are not 0.
IMAGES = np.array(
    [[0.5, 0.1, 1, 0, 0.3, 0.9, 0.2, 0.7, 0.4], [0, 1, 0.6, 0.2, 0, 0.8, 0, 0.3, 0.9]], np.float32
)
LABELS = np.array([2, 0], np.int32)


class Fixed(nn.Module):
    """The same logits, its parameters, whatever it sees."""

    @nn.compact
    def decide(self, sum_SxH):
        logits_C = self.param("logits", nn.initializers.zeros, (3,))
        return jnp.broadcast_to(logits_C[None], (len(sum_SxH), 3))

    def parts(self, values_P):
        return values_P[:, None]


class Waiting(nn.Module):
    """Says 1 if the first pixel of the image is among those revealed, else 0."""

    def parts(self, values_P):
        return jnp.eye(len(values_P))

    def decide(self, sum_SxH):
        return jnp.stack([jnp.full(len(sum_SxH), 0.5), sum_SxH[:, 0]], axis=1)


class Capricious(nn.Module):
    """An opinion of its own, its parameters, on every set of nine pixels."""

    @nn.compact
    def decide(self, sum_SxH):
        table_TxC = self.param("table", nn.initializers.normal(1.0), (512, 3))
        return table_TxC[sum_SxH[:, 0].astype(jnp.int32)]

    def parts(self, values_P):
        return 2.0 ** jnp.arange(len(values_P), dtype=jnp.float32)[:, None]

    def __call__(self, values_BxP, mask_BxP):
        return self.decide(mask_BxP @ self.parts(values_BxP[0]))


def solved_for(*logits, labels):
    """Outcomes with a judge that always says the same."""
    params = {"params": {"logits": jnp.array(logits)}}
    return solved(Fixed(), params, labels=np.array(labels, np.int32))


def solved(judge, params, images=IMAGES, labels=LABELS, turns=TURNS):
    return jax.device_get(solve(judge, params, make_tables(9, turns), images, labels))


@pytest.fixture(scope="module")
def judge():
    judge = Capricious()
    return judge, judge.init(jax.random.key(0), IMAGES[:1], IMAGES[:1])


def minimax(won, legal, players, revealed=()):
    """Whether honesty wins a game, by trying everything; `won` is asked about sets of pixels."""
    if not players:
        return won[frozenset(revealed)]
    results = [
        minimax(won, legal, players[1:], (*revealed, pixel))
        for pixel in legal
        if pixel not in revealed
    ]
    return any(results) if players[0] == "honest" else all(results)


def ends(judge, params, image, label):
    """Set of pixels → bits of the games, by showing the judge masked images."""
    legal = np.flatnonzero(image)
    sets = [frozenset(s) for s in itertools.combinations(legal.tolist(), TURNS)]
    masks = np.array([[p in s for p in range(9)] for s in sets], np.float32)
    logits = np.asarray(judge.apply(params, np.repeat(image[None], len(sets), 0), masks))
    won = logits[:, label : label + 1] > logits
    won[:, label] = True
    return legal, dict(zip(sets, np.column_stack([won, won.all(axis=1)]), strict=True))


def test_search_agrees_with_trying_everything(judge):
    found = solved(*judge)
    alternating = [("honest", "liar") * 2, ("liar", "honest") * 2]
    for b, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        legal, by_set = ends(*judge, image, label)
        for game in range(4):
            won = {pixels: bits[game] for pixels, bits in by_set.items()}
            first, last = (minimax(won, legal, players) for players in alternating)
            assert found.honest_first_BxA[b, game] == first
            assert found.liar_first_BxA[b, game] == last
            assert found.honest_alone_BxA[b, game] == any(won.values())
            assert found.liar_alone_BxA[b, game] == all(won.values())
            share = np.mean(list(won.values()))
            np.testing.assert_allclose(found.random_BxA[b, game], share, rtol=1e-6)
    # Were games alike whoever begins, or won by one player alone, the test would say little.
    assert (found.honest_first_BxA != found.liar_first_BxA).any()
    assert 0 < found.honest_first_BxA.mean() < 1


def test_chunks_make_no_difference(judge, monkeypatch):
    whole = solved(*judge)
    monkeypatch.setattr(debate_game, "_CHUNK", 16)  # of 126 sets
    for one, other in zip(whole, solved(*judge), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("honest_first", [True, False])
def test_players_take_turns_with_pixels_that_are_new_and_not_zero(judge, honest_first):
    tables = make_tables(9, TURNS)
    found = solved(*judge)
    roots = found.honest_first_BxA if honest_first else found.liar_first_BxA
    rng = np.random.default_rng(0)
    for b, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        words, _, count = levels(*judge, tables, image, label)
        legal, by_set = ends(*judge, image, label)
        assert count == len(by_set)
        for game in range(4):
            moves = play(jax.device_get(words), tables, len(legal), game, honest_first, rng)
            assert len(moves) == len(set(moves)) == TURNS
            # What the game is worth is what comes out: at every turn the right player moved.
            assert by_set[frozenset(legal[moves].tolist())][game] == roots[b, game]


def test_tables_of_many_pixels_begin_with_those_of_few():
    few, many = subsets(6, 3), subsets(9, 3)
    np.testing.assert_array_equal(few, many[: len(few)])
    assert len({tuple(row) for row in many}) == len(many) == 84


def test_a_judge_that_knows_is_never_deceived():
    found = solved_for(0.0, 0.0, 1.0, labels=[2, 2])
    for protocol, by_claim in debate_study.accuracies(found, np.array([2, 2])).items():
        assert by_claim == dict.fromkeys(debate_study.CLAIMS, 1.0), protocol


def test_a_liar_is_held_to_the_lie_named_beforehand():
    """The judge always prefers 2 to the truth, 1, and the truth to 0."""
    found = solved_for(0.0, 1.0, 2.0, labels=[1, 1])
    for won_BxA in (found.honest_first_BxA, found.liar_first_BxA):
        assert won_BxA[:, 0].all() and not won_BxA[:, 2].any() and not won_BxA[:, 3].any()
    debate = debate_study.accuracies(found, np.array([1, 1]))[debate_study.DEBATE]
    assert debate == {"random": 0.5, "first": 0.0, "last": 0.0}


def test_equal_logits_are_won_by_the_liar():
    found = solved_for(1.0, 1.0, 1.0, labels=[2, 0])
    assert not found.honest_alone_BxA[:, 3].any() and not found.random_BxA[:, 3].any()


def test_a_consultant_who_lies_leaves_out_what_gives_the_lie_away():
    images = np.array([[1, 1, 0, 1, 1, 0, 0, 0, 0]], np.float32)
    labels = np.array([1], np.int32)
    found = solved(Waiting(), {}, images, labels, turns=2)
    by_protocol = debate_study.accuracies(found, labels)
    assert by_protocol[debate_study.HONEST]["last"] == 1.0
    assert by_protocol[debate_study.LYING]["last"] == 0.0
    assert by_protocol[debate_study.CONSULTANCY]["last"] == 0.5
    assert by_protocol[debate_study.DEBATE]["last"] == 1.0
    assert by_protocol[debate_study.RANDOM]["last"] == 0.5  # three of six pairs have the pixel


def test_a_judge_learns_from_random_pixels_that_are_not_zero():
    data = debate_study.split(0, 6)
    mask = np.asarray(random_mask(jax.random.key(0), jnp.asarray(data.train_NxP), 4))
    assert (mask.sum(axis=1) == 4).all() and not mask[data.train_NxP == 0].any()
    _, losses = train(
        SparseJudge(64, 10, 64), jax.random.key(0), jnp.asarray(data.train_NxP),
        jnp.asarray(data.train_labels_N), revealed=2, steps=100, batch=128, learning_rate=0.05,
        weight_decay=0.01,
    )  # fmt: skip
    assert losses[-20:].mean() < 2.15 < losses[:20].mean()  # ln 10 is 2.3


def test_a_judge_decides_by_the_sum_of_what_is_revealed():
    judge = SparseJudge(9, 3, 8)
    params = judge.init(jax.random.key(0), IMAGES[:1], IMAGES[:1])
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0], np.float32)
    parts = judge.apply(params, IMAGES[0], method="parts")[mask > 0]
    summed = judge.apply(params, parts.sum(axis=0)[None], method="decide")
    seen = judge.apply(params, IMAGES[:1], mask[None])
    np.testing.assert_allclose(summed, seen, rtol=1e-5, atol=1e-6)
    hidden = np.where(mask > 0, IMAGES[:1], 0.7)  # what is not revealed makes no difference
    np.testing.assert_array_equal(seen, judge.apply(params, hidden, mask[None]))


def test_no_image_is_both_learnt_from_and_debated():
    one, other = debate_study.split(0, 300), debate_study.split(1, 300)
    assert len(one.held_out_BxP) == 300 and len(one.train_NxP) == 1497
    rows = np.concatenate([one.train_NxP, one.held_out_BxP])
    assert len(np.unique(rows, axis=0)) == 1797
    assert not np.array_equal(one.held_out_labels_B, other.held_out_labels_B)


def test_the_command_writes_its_files_and_measures_once(tmp_path, monkeypatch):
    arguments = dict(seeds=2, pixels=["2"], images=6, steps=100)  # compiled above
    text = study(str(tmp_path / "w"), str(tmp_path / "out"), **arguments)
    assert "2 pixels: debate, honest first" in text
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"table.md", "table.csv", "table.png", "debates.png"}
    kept = json.loads((tmp_path / "w/pixels-2-seed-1.json").read_text())
    assert kept["made_of"]["seed"] == 1
    accuracy = kept["result"]["accuracy"]
    assert accuracy["debate"]["first"] <= accuracy["debate"]["random"]
    assert accuracy["debate"]["last"] <= accuracy["debate"]["first"]
    for example in kept["result"]["examples"]:
        assert all(example["image"][pixel] > 0 for pixel in example["moves"])

    monkeypatch.setattr(debate_study, "measure", lambda arm, seed: pytest.fail("measured again"))
    assert study(str(tmp_path / "w"), str(tmp_path / "out"), **arguments) == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"pixels": ["0"]},
        {"pixels": ["3"]},
        {"pixels": ["8"]},
        {"pixels": ["four"]},
        {"pixels": ["2", "2"]},
        {"seeds": 0},
        {"images": 1790},
        {"steps": 0},
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, wrong):
    arguments = dict(seeds=1, pixels=["2"], images=6, steps=3) | wrong
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        study(str(tmp_path / "w"), str(tmp_path / "w"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_command_ends_with_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.digits_debate", "--pixels=3", f"--workdir={tmp_path}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --pixels=3: ")
