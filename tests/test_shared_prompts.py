"""A prompt that its texts share is read once: the same losses and gradients of fewer tokens."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import promotion
from hypothesis import given
from hypothesis import strategies as st

from karploop import loop
from karploop.bindings.training import _deciding
from karploop.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.models.decoder import packed_mask
from karploop.records import EPISODES_FILE, Episodes
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Stages, Stopped
from karploop.store import Store
from karploop.training.accumulation import split
from karploop.training.centred import centred_head
from karploop.training.length import tokens_of
from karploop.training.lessons import lesson_of, origins, units, with_reference
from karploop.training.objectives import make_objective
from karploop.training.packing import Tokenized, pack
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Trainer, differentiate, look

VOCABULARY, ROWS, LENGTH = 16, 4, 32
OBJECTIVES = {
    "dpo": ObjectiveConfig("dpo", label_smoothing=0.1, sft=0.5),
    "simpo": ObjectiveConfig("simpo"),
    "policy by token": ObjectiveConfig("policy_gradient", kl=0.1),
    "policy by sequence": ObjectiveConfig("policy_gradient", aggregate="sequence"),
    "reward": ObjectiveConfig("reward"),
}
# Positions matter, a window is shorter than prompts, and query heads share keys and values.
MODEL = dict(positions="rope", kv_heads=2, window=3, pattern="sf")


# -- packing -----------------------------------------------------------------------------------


@st.composite
def units_to_pack(draw):
    """Units of 1 to 4 texts, of one prompt or of several; and a row that holds any of the texts."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    found, numbers = [], itertools.count(1.0)
    for texts in draw(st.lists(st.integers(1, 4), min_size=1, max_size=8)):
        prompt = rng.integers(0, 3, rng.integers(1, 6))
        unit = []
        for _ in range(texts):
            if rng.random() < 0.2:
                prompt = rng.integers(0, 3, rng.integers(1, 6))
            targets = int(rng.integers(1, 5))
            tokens = np.array([*prompt, *rng.integers(0, 3, targets)], np.int32)
            by_token = {"advantage": rng.normal(size=targets).astype(np.float32)}
            by_text = {"present": next(numbers)}
            weight = float(rng.integers(1, 9)) / 4
            unit.append(Tokenized(tokens, len(prompt), weight, by_token, by_text))
        found.append(tuple(unit))
    return found


@given(units_to_pack(), st.integers(9, 24), st.sampled_from([1, 2]))
def test_every_text_is_read_as_it_would_be_by_itself(given_units, row_length, parts):
    """What each target's token sees, in the order of positions, is its text up to there."""
    taken, size = [], 8 // parts
    for batch, here in pack(given_units, iter(range(len(given_units))), 8, row_length, parts, True):
        mask_BxLxL = np.asarray(packed_mask(batch.segments_BxL, batch.branches_BxL))
        texts = [text for unit in here for text in given_units[unit]]
        order = {text.by_text["present"]: number for number, text in enumerate(texts)}
        found: list[list[int]] = [[] for _ in range(parts)]
        for place in np.flatnonzero(batch.by_text["present"]):
            text = texts[number := order[batch.by_text["present"][place]]]
            rows, columns = np.nonzero((batch.places_BxL == place) & (batch.weights_BxL > 0))
            (row,) = set(rows.tolist())
            found[row // size].append(number)
            assert batch.targets_BxL[row, columns].tolist() == text.tokens[-text.targets :].tolist()
            assert set(batch.weights_BxL[row, columns].tolist()) == {text.weight}
            carried = batch.by_token["advantage"][row, columns]
            np.testing.assert_array_equal(carried, text.by_token["advantage"])
            for until, column in enumerate(columns, text.prompt_length):
                seen = np.flatnonzero(mask_BxLxL[row, column])
                assert batch.positions_BxL[row, seen].tolist() == list(range(until))
                assert batch.tokens_BxL[row, seen].tolist() == text.tokens[:until].tolist()
        assert sorted(itertools.chain(*found)) == list(range(len(texts)))
        assert all(part == sorted(part) for part in found), "in their order"
        unit_of = np.repeat(here, [len(given_units[unit]) for unit in here])
        units_of_parts = [set(unit_of[part].tolist()) for part in found]
        assert sum(map(len, units_of_parts)) == len(here), "no unit is torn"
        plain = sum(len(text.tokens) - 1 for text in texts)
        assert (tokens_of(batch) < plain) == batch.branches_BxL.any()
        taken += here
    assert taken == list(range(len(given_units)))


def text_of(prompt, completion):
    return Tokenized(np.array([*prompt, *completion], np.int32), len(prompt))


def test_a_row_of_two_texts_by_hand():
    """Completions that begin alike share their prompt and no more: each has targets of its own."""
    unit = (text_of([1, 5, 6], [7, 8]), text_of([1, 5, 6], [7, 9, 2]))
    (batch, _), *_ = pack([unit], iter([0]), 1, 10, share=True)
    wanted = {
        "tokens_BxL": [1, 5, 6, 7, 6, 7, 9, 0, 0, 0],
        "segments_BxL": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "branches_BxL": [0, 0, 1, 1, 2, 2, 2, 0, 0, 0],
        "positions_BxL": [0, 1, 2, 3, 2, 3, 4, 0, 0, 0],
        "places_BxL": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        "weights_BxL": [0, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    }
    for name, values in wanted.items():
        assert getattr(batch, name)[0].tolist() == values, name
    assert batch.targets_BxL[0, 2:7].tolist() == [7, 8, 7, 9, 2]


def test_what_no_row_holds_together_is_read_text_by_text():
    unit = (text_of([1, 5, 6, 7], [2] * 4), text_of([1, 5, 6, 7], [3] * 4))
    for length, shared in ((11, True), (10, False)):
        (batch, _), *_ = pack([unit], iter([0]), 2, length, share=True)
        assert batch.branches_BxL.any() == shared
        assert tokens_of(batch) == (11 if shared else 14)
    apart = (text_of([1, 5], [2]), text_of([4, 5], [3]))
    for unit in (apart, apart[:1], (text_of([1], [2]), text_of([1], [3]))):
        alike = (next(pack([unit], iter([0]), 2, 8, share=share))[0] for share in (False, True))
        jax.tree.map(np.testing.assert_array_equal, *alike)


# -- the model -----------------------------------------------------------------------------------


def made_units(objective, rng):
    """Units of long prompts, with all that the objective asks of them but for the reference."""
    rewards = objective.config.name == "reward"
    texts = 4 if objective.lesson == "episodes" else 2

    def text(prompt):
        targets = int(rng.integers(1, 5))
        tokens = np.array([*prompt, *rng.integers(0, VOCABULARY, targets)], np.int32)
        if rewards:  # read to its last token
            return Tokenized(np.append(tokens, tokens[-1]), len(tokens), by_text={"present": 1.0})
        by_token = {}
        if texts == 4:
            by_token = {
                "sampler": rng.normal(size=targets) - 2,
                "advantage": rng.normal(size=targets),
            }
        return Tokenized(tokens, len(prompt), 1.0, by_token, {"present": 1.0})

    found = []
    for _ in range(4):
        prompt = rng.integers(0, VOCABULARY, int(rng.integers(6, 10)))
        found.append(tuple(text(prompt) for _ in range(texts)))
    return found


@pytest.fixture(scope="module")
def model(make_weights, make_params):
    weights = make_weights(layers=2, **MODEL)
    return weights, make_params(weights)


@functools.cache
def trainer_of(weights, name, parts=1):
    objective = make_objective(OBJECTIVES[name], longest=4)
    return Trainer(weights, OptimizerConfig(), objective=objective, accumulation=parts)


def batches_of(trainer, params, share, parts):
    """Batches of all units, held to a reference that was read in the same manner."""
    objective = trainer.objective
    learnt = made_units(objective, np.random.default_rng(0))
    # By themselves the texts of these units want more than twice the rows.
    config = TrainConfig(rows=8, row_length=LENGTH, accumulation=parts, share_prompts=share)
    if objective.reference:
        found = logprobs_of(learnt, functools.partial(trainer.logprobs, params), config)
        learnt = with_reference(learnt, found, objective.reference)
    order = iter(range(len(learnt)))
    ((batch, taken),) = pack(learnt, order, config.rows, LENGTH, parts, share)
    assert len(taken) == 4 and batch.branches_BxL.any() == share
    return batch


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_texts_by_themselves(model, make_params, name):
    """With a reference that is another model, in one part and in two."""
    weights, params = model
    other = make_params(weights, seed=1)
    trainer = trainer_of(weights, name)
    parts_of = trainer.parts
    trained, frozen = parts_of.divide(params, jax.random.key(0))

    def looked(trained, rows):
        return look(weights.model, trainer.objective, parts_of.assemble(trained, frozen), rows)

    found = []
    for share, parts in ((False, 1), (True, 1), (True, 2)):
        batch = batches_of(trainer, other, share, parts)
        compute = functools.partial(differentiate, looked, trainer.objective, parts=parts)
        found.append(jax.jit(compute)(trained, split(batch, parts) if parts > 1 else batch))
    ((loss, (_, more)), gradient), *others = found
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    assert largest > 1e-2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6 * largest)
    for (other_loss, (_, other_more)), other_gradient in others:
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        jax.tree.map(close, other_gradient, gradient)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), other_more, more)


@pytest.mark.parametrize("name", ["dpo", "policy by token"])
def test_a_step_on_eight_devices_in_parts(make_weights, make_params, name):
    """Is the step of one device on texts by themselves."""
    one = make_weights(layers=2, **MODEL)
    eight = make_weights(data=2, fsdp=2, tensor=2, layers=2, **MODEL)
    ends = []
    for weights, share, parts in ((one, False, 1), (eight, True, 2)):
        trainer = trainer_of(weights, name, parts)
        batch = batches_of(trainer, make_params(weights, seed=1), share, parts)
        state, metrics = trainer.step(trainer.start(make_params(weights)), batch, 0.01)
        ends.append((metrics.loss, metrics.grad_norm, metrics.more, state.params))
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    jax.tree.map(close, ends[1][:3], ends[0][:3])
    jax.tree.map(functools.partial(close, atol=1e-5, rtol=2e-3), ends[1][3], ends[0][3])


def test_no_branch_sees_another(model):
    """By the gradient of what one branch says with respect to what stands everywhere in its row."""
    weights, params = model
    trainer = trainer_of(weights, "policy by token")
    batch = batches_of(trainer, params, True, 1)
    embedding_VxE = params["params"]["embedding"]
    # Every token with a row of its own in the embedding, so that one can be moved alone.
    ids_BxL = np.arange(batch.tokens_BxL.size, dtype=np.int32).reshape(batch.tokens_BxL.shape)
    mask_BxLxL = packed_mask(batch.segments_BxL, batch.branches_BxL)
    wide = weights.model.clone(vocabulary=ids_BxL.size)

    @jax.jit
    def influence(branch_BxL):
        """Of each column on the hidden states of a branch: the size of the gradient."""

        def said(moved_BxLxE):
            embedding = moved_BxLxE.reshape(ids_BxL.size, -1)
            given = {"params": params["params"] | {"embedding": embedding, "head": embedding.T}}
            hidden_BxLxE, _ = wide.apply(given, ids_BxL, mask_BxLxL, batch.positions_BxL)
            return jnp.sum(jnp.sin(hidden_BxLxE), where=branch_BxL[..., None])

        return jnp.abs(jax.grad(said)(embedding_VxE[batch.tokens_BxL])).sum(-1)

    segment_BxL = (batch.segments_BxL == 1) & (np.arange(len(ids_BxL)) == 0)[:, None]
    branches = set(batch.branches_BxL[segment_BxL].tolist()) - {0}
    assert len(branches) == 4
    for branch in branches:
        found_BxL = np.asarray(influence(segment_BxL & (batch.branches_BxL == branch)))
        seen_BxL = segment_BxL & np.isin(batch.branches_BxL, (0, branch))
        assert (found_BxL[seen_BxL] > 0).all() and not found_BxL[~seen_BxL].any()


def test_rewards_are_centred_alike(model):
    weights, params = model
    trainer = trainer_of(weights, "reward")
    learnt = made_units(trainer.objective, np.random.default_rng(0))
    trained, frozen = trainer.parts.divide(params, jax.random.key(0))
    heads = [
        centred_head(
            trainer, trained, frozen, learnt, np.arange(1.0, 5.0),
            TrainConfig(rows=8, row_length=LENGTH, share_prompts=share),
        )
        for share in (False, True)
    ]  # fmt: skip
    assert heads[0].offset == pytest.approx(heads[1].offset, rel=1e-4)


# -- groups of episodes --------------------------------------------------------------------------


def episodes_of(prompts, rng, longest=4):
    tokens = [rng.integers(3, 12, rng.integers(1, longest + 1)).tolist() for _ in prompts]
    values = [[float(i)] * len(t) for i, t in enumerate(tokens)]
    rows = np.arange(len(prompts)) + 100
    source = ["made"] * len(prompts)
    return Episodes(prompts, tokens, values, values, np.ones(len(prompts), int), source, rows)


def test_samples_of_a_prompt_are_a_unit_wherever_they_stand(tokenizer):
    prompts = ["1+2=", "34+5="] * 4 + ["1+2="]
    rows = episodes_of(prompts, np.random.default_rng(0))
    weights_N = np.array([1.0] * 8 + [2.0])
    given = PlainPrompting(tokenizer), ObjectiveConfig("policy_gradient")
    plain = lesson_of(rows, weights_N, *given, TrainConfig(row_length=LENGTH))
    assert plain.origins == origins(rows) and plain.weights_N is weights_N
    config = TrainConfig(row_length=LENGTH, share_prompts=True)
    found = lesson_of(rows, weights_N, *given, config)
    # Of another weight: drawn twice as often as the others.
    members = [[0, 2, 4, 6], [1, 3, 5, 7], [8]]
    assert found.weights_N.tolist() == [1.0, 1.0, 2.0]
    assert found.origins == [tuple(("made", 100 + i) for i in group) for group in members]
    texts = units(rows, *given, LENGTH)
    for unit, group in zip(found.units, members, strict=True):
        for text, i in zip(unit, group, strict=True):
            assert text.tokens.tolist() == texts[i][0].tokens.tolist()
            assert text.by_token["advantage"].tolist() == rows.advantages[i]


def test_a_group_that_no_row_holds_is_cut(tokenizer):
    rows = episodes_of(["1+2="] * 20, np.random.default_rng(0))
    config = TrainConfig(row_length=16, share_prompts=True)
    given = PlainPrompting(tokenizer), ObjectiveConfig("policy_gradient"), config
    found = lesson_of(rows, np.ones(20), *given)
    assert [origin for unit in found.origins for origin in unit] == [
        ("made", 100 + i) for i in range(20)
    ]
    assert 2 < len(found.units) < 12
    for batch, _ in pack(found.units, iter(range(len(found.units))), 1, 16, share=True):
        assert batch.segments_BxL.max() == 1  # a unit is one segment


# -- loops -------------------------------------------------------------------------------------

TINY = dict(
    name="tiny",
    rounds=1,
    mesh=dict(data=1),
    task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=60),
    model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
    # Until most completions end.
    warmup=dict(steps=100, rows=8, row_length=32, optimizer=dict(learning_rate=3e-3)),
    train=dict(epochs=1, checkpoint_every=2, rows=2, row_length=32, share_prompts=True),
    generate=dict(prompts=16, samples=6, batch=16, difficulty_step=0),
    judge=dict(name="random"),
    objective=dict(name="policy_gradient", kl=0.1),
    filter=dict(name="none", on_empty="skip"),
    evaluate=dict(problems=8, difficulties=(1,), batch=8),
)


@pytest.fixture(scope="module")
def machinery():
    with promotion():
        return prepare(resolve(TINY))


def run(machinery, workdir, stop_requested=lambda: False):
    """A loop in this workdir, or Stopped on the way."""
    machinery.weights._live.clear()  # as in a process of its own
    store = Store(str(workdir), print)
    store.open()
    with promotion():
        loop.run(machinery, Stages(store, Progress(quiet=True), stop_requested), lambda _: None)


def test_a_loop_goes_on_where_it_was_and_traces_every_episode(machinery, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(machinery, whole)
    with pytest.raises(Stopped):
        run(machinery, parts, lambda: any(parts.glob("partial/train/*/checkpoints/*")))
    run(machinery, parts)
    (one,), (other,) = (list(folder.glob("store/train/*")) for folder in (whole, parts))
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    (path,) = whole.glob(f"store/experience/*/{EPISODES_FILE}")
    episodes, used = Episodes.from_table(pq.read_table(path)), pq.read_table(one / "rows.parquet")
    assert set(used["times"].to_pylist()) == {1}, "one pass"
    assert sorted(used["row"].to_pylist()) == sorted(episodes.row.tolist())
    steps = pq.read_table(one / "steps.parquet")
    assert steps.num_rows > 2 and abs(steps["policy/ratio"][0].as_py() - 1) < 1e-3
    lengths = [
        len(prompt) + len(tokens)
        for prompt, tokens in zip(episodes.prompts, episodes.tokens, strict=True)
    ]
    assert sum(steps["tokens"].to_pylist()) < 0.8 * sum(lengths)


def test_where_nothing_is_shared_it_is_refused():
    for name in ("sft", "gkd", "kto"):
        with pytest.raises(UserError, match="'config.train.share_prompts'.*it is for dpo"):
            resolve(TINY, {"objective.name": name, "roles.teacher.weights": "base"})
    with pytest.raises(UserError, match="'config.warmup.share_prompts'.*leave it at False"):
        resolve(TINY, {"warmup.share_prompts": "true"})


def test_off_it_changes_no_stage():
    plain = TrainConfig()
    assert "share_prompts" not in _deciding(plain)
    assert _deciding(dataclasses.replace(plain, share_prompts=True))["share_prompts"] is True
