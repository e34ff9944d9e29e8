"""A step whose rows are taken in parts is the step of all rows at once, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karploop.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.resolve import resolve
from karploop.training.accumulation import joined, split
from karploop.training.objectives import make_objective
from karploop.training.packing import Tokenized, pack, places
from karploop.training.trainer import Trainer, differentiate

VOCABULARY, ROWS, LENGTH, PARTS = 16, 8, 12, 4
OBJECTIVES = {
    "sft": ObjectiveConfig(),
    "sft by example": ObjectiveConfig(weighting="example"),
    "dpo": ObjectiveConfig("dpo", label_smoothing=0.1, sft=0.5),
    "ipo": ObjectiveConfig("ipo", by_token=True),
    "simpo": ObjectiveConfig("simpo"),
    "orpo": ObjectiveConfig("orpo"),
    "kto": ObjectiveConfig("kto", desirable_weight=1.5),
    "policy by token": ObjectiveConfig("policy_gradient", kl=0.1),
    "policy by sequence": ObjectiveConfig("policy_gradient", aggregate="sequence"),
    "policy by constant": ObjectiveConfig("policy_gradient", aggregate="constant"),
}


def bigram(table_VxV, batch):
    """A model of one matrix, which compiles at once: log-probabilities of targets, and the best."""
    found_BxLxV = jax.nn.log_softmax(table_VxV[batch.tokens_BxL])
    picked_BxLx1 = jnp.take_along_axis(found_BxLxV, batch.targets_BxL[..., None], -1)
    wanted_BxL = batch.weights_BxL > 0
    best_BxL = jnp.argmax(found_BxLxV, -1).astype(jnp.int32) == batch.targets_BxL
    return jnp.where(wanted_BxL, picked_BxLx1[..., 0], 0.0), best_BxL & wanted_BxL


def units_of(objective, rng, count=9):
    """Units of texts of very different lengths, with all that the objective asks of them."""
    texts = 2 if objective.lesson in ("pairs", "labels") else 1

    def text(place):
        length = int(rng.integers(2, LENGTH + 1))
        start = int(rng.integers(1, length))
        targets = length - start
        return Tokenized(
            rng.integers(0, VOCABULARY, length).astype(np.int32),
            start,
            1 / targets if objective.config.weighting == "example" else 1.0,
            {name: rng.normal(size=targets) - 2.0 for name in ("sampler", "reference")}
            | {"advantage": np.full(targets, rng.normal())},
            {
                "reference": float(rng.normal()),
                "present": 1.0,
                "desirable": float(place % 3 == 0),
            },
        )

    return [tuple(text(place) for _ in range(texts)) for place in range(count)]


def gradients(objective, parts):
    """The jitted loss with its gradient, of a batch in so many parts."""
    compute = jax.jit(functools.partial(differentiate, bigram, objective, parts=parts))
    return lambda table_VxV, batch: compute(table_VxV, split(batch, parts) if parts > 1 else batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_have_the_gradient_of_the_whole(name):
    """However unequal they are, one of them empty; and so have what is reported beside it."""
    objective = make_objective(OBJECTIVES[name], longest=LENGTH)
    rng = np.random.default_rng(0)
    units = units_of(objective, rng)
    count = 6 // len(units[0])
    batch, taken = next(pack(units, iter(range(count)), ROWS, LENGTH, PARTS))
    assert len(taken) == count
    tokens_A = (batch.weights_BxL > 0).reshape(PARTS, -1).sum(1)
    assert tokens_A[-1] == 0 and len(set(tokens_A)) > 2, "parts differ"
    table_VxV = jnp.asarray(rng.normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    at_once = gradients(objective, 1)
    (loss, more), whole = at_once(table_VxV, batch)
    (found_loss, found_more), found = gradients(objective, PARTS)(table_VxV, batch)
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found_more, more)
    # What a mean of the parts' means would be.
    each = split(batch, PARTS)
    each = [jax.tree.map(lambda x, i=i: x[i], each) for i in range(PARTS)]
    alone = [at_once(table_VxV, part)[1] for part in each]
    assert np.abs(np.mean(alone, axis=0) - whole).max() > 1e-3, "the difference would be seen"


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2)])
def test_a_step_in_parts_is_the_step(make_weights, make_params, sizes):
    weights = make_weights(**sizes, layers=1)
    units = units_of(make_objective(ObjectiveConfig(), LENGTH), np.random.default_rng(1), 20)
    units = [(dataclasses.replace(text, by_token={}, by_text={}),) for (text,) in units]
    batch, _ = next(pack(units, iter(range(20)), ROWS, LENGTH, 2))
    ends = []
    for parts in (1, 2):
        trainer = Trainer(weights, OptimizerConfig(), accumulation=parts)
        state, metrics = trainer.step(trainer.start(make_params(weights)), batch, 0.01)
        ends.append((state.params, metrics))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5)
    jax.tree.map(close, ends[1], ends[0])


def test_parts_take_less_memory(make_weights):
    weights = make_weights(layers=2)

    def needed(parts):
        trainer = Trainer(weights, OptimizerConfig(), accumulation=parts)
        text = Tokenized(np.ones(65, np.int32), 1)
        batch, _ = next(pack([(text,)], iter([0] * 32), 32, 64, parts))
        given = split(batch, parts) if parts > 1 else batch
        lowered = trainer._step.lower(trainer.abstract, (), (), given, jnp.float32(1))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert needed(8) < needed(1) / 4


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=20))
def test_no_unit_is_torn_and_a_part_is_a_batch(lengths):
    units = [
        tuple(Tokenized(np.full(n, 10 * i + k, np.int32), 1) for k, n in enumerate(pair))
        for i, pair in enumerate(lengths)
    ]
    seen = []
    for batch, taken in pack(units, iter(range(len(units))), 6, 8, parts=3):
        each = split(batch, 3)
        places_BxL = np.where(batch.segments_BxL > 0, joined(each).places_BxL, 0)
        np.testing.assert_array_equal(places_BxL, batch.places_BxL)
        for part in range(3):
            inside_BxL = each.segments_BxL[part] > 0
            here = each.tokens_BxL[part][inside_BxL]
            place = each.places_BxL[part][inside_BxL]
            assert place.max(initial=0) < places(2, 8)
            by_place = dict(zip(place.tolist(), here.tolist(), strict=True))
            assert sorted(by_place) == list(range(len(by_place))) and len(by_place) % 2 == 0
            for first in range(0, len(by_place), 2):  # a unit's texts, one behind the other
                unit, rest = divmod(by_place[first], 10)
                assert rest == 0 and by_place[first + 1] == 10 * unit + 1
                seen.append(unit)
        assert sorted(seen[-len(taken) :]) == taken
    assert sorted(seen) == list(range(len(units)))


def test_texts_by_themselves_are_packed_as_without_parts():
    rng = np.random.default_rng(2)
    units = units_of(make_objective(ObjectiveConfig(), LENGTH), rng, 40)
    whole, parts = (list(pack(units, iter(range(40)), ROWS, LENGTH, n)) for n in (1, PARTS))
    assert [taken for _, taken in whole] == [taken for _, taken in parts]
    for (one, _), (other, _) in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.tokens_BxL, other.tokens_BxL)


def test_parts_that_cannot_be_are_refused():
    pair = tuple(Tokenized(np.ones(9, np.int32), 1) for _ in range(2))
    assert next(pack([pair], iter([0]), 2, 8))
    with pytest.raises(UserError, match="batch of 1 rows.*raise 'rows'.*or lower 'accumulation'"):
        next(pack([pair], iter([0]), 2, 8, parts=2))
    settings = dict(mesh=dict(data=2), train=dict(rows=8, row_length=16))
    for parts, message in ((3, "'config.train.accumulation' of 3 does not divide"), (8, "data")):
        with pytest.raises(UserError, match=message):
            prepare(resolve(settings, {"train.accumulation": str(parts)}))
    assert TrainConfig().accumulation == 1
