"""Reward models that learn with more than a head: the objective, its gradients, packing, files."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import save_llama

from karploop.config import (
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    TrainConfig,
)
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.mesh import make_mesh, put
from karploop.models.decoder import packed_mask
from karploop.models.reward_head import HEAD, RewardHead
from karploop.offline_reward import run_file
from karploop.records import Contrasts
from karploop.reporting.progress import Progress
from karploop.roles.local import LocalModel
from karploop.roles.reward import ADAPTER, CARD, MODEL, TrainedReward, load_reward
from karploop.schema import lay
from karploop.training.centred import centred_head
from karploop.training.lessons import units
from karploop.training.objectives import make_objective, settings
from karploop.training.optimizer import make_optimizer
from karploop.training.packing import pack
from karploop.training.trainer import Trainer, measure

QUIET = Progress(quiet=True)
PROMPTS = ["1+2=", "34+5=", "6+7=", "8+9="]
GOOD, BAD = ["3", "39", "13", "17"], ["4", "38", "1", "1777"]
BATCH = TrainConfig(rows=4, row_length=32)
CONFIG = ObjectiveConfig("reward", centring=0.1)
REWARDED = make_objective(CONFIG, longest=6)


@pytest.fixture(scope="module")
def learnt(tokenizer):
    """Pairs of right and wrong answers, to be packed."""
    ones, row = np.ones(4, np.int64), np.arange(4)
    source = ["made"] * 4
    rows = Contrasts(PROMPTS, GOOD, BAD, ones, np.ones(4), source, row, source, row + 10)
    return units(rows, PlainPrompting(tokenizer), CONFIG, 32)


@pytest.fixture(scope="module")
def model(make_weights, make_params):
    """An architecture, its trainer, and parameters with a head that says something."""
    weights = make_weights(layers=1, positions="rope")
    trainer = Trainer(weights, OptimizerConfig(), objective=REWARDED)
    return weights, trainer, with_head(weights, make_params(weights))


def with_head(weights, params, size=0.1):
    head_E = size * np.random.default_rng(3).normal(size=16).astype(np.float32)
    whole = put(head_E, jax.sharding.NamedSharding(weights.mesh, jax.sharding.PartitionSpec()))
    return {**params, "reward": {"weights": whole}}


def packed(learnt, order=range(4), rows=4, row_length=32):
    (found,) = pack(learnt, iter(order), rows, row_length)
    return found


# -- the objective ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(model, learnt):
    """rewards_4x2 of the pairs' texts, each in a row of its own, the head's product in float64."""
    weights, _, params = model
    texts = [text.tokens[:-1] for unit in learnt for text in unit]
    lengths_T, longest = np.array([len(x) for x in texts]), max(map(len, texts))
    tokens_TxL = np.array([np.pad(x, (0, longest - len(x))) for x in texts], np.int32)
    real_TxL = np.arange(longest)[None] < lengths_T[:, None]
    hidden_TxLxE, _ = jax.jit(weights.model.apply)(
        {"params": params["params"]},
        tokens_TxL,
        packed_mask(jnp.asarray(real_TxL, jnp.int32)),
        np.broadcast_to(np.arange(longest, dtype=np.int32), tokens_TxL.shape),
    )
    last_TxE = np.asarray(hidden_TxLxE)[np.arange(len(texts)), lengths_T - 1]
    head = RewardHead(np.asarray(params["reward"]["weights"]), 0.0)
    return head.rewards(last_TxE).reshape(-1, 2)


def test_a_texts_reward_is_read_at_its_stop_token_however_it_is_packed(
    model, learnt, alone, tokenizer
):
    _, trainer, params = model
    for text, answer in zip(learnt[1], (GOOD[1], BAD[1]), strict=True):
        read = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[1] + answer), tokenizer.eos_id]
        assert text.tokens[:-1].tolist() == read and text.targets == 1
    assert np.std(alone) > 0.1
    for order, shape in (([0, 1, 2, 3], (4, 32)), ([3, 1, 0, 2], (4, 32)), ([2, 0, 1, 3], (1, 80))):
        batch, taken = packed(learnt, order, *shape)
        rewards_T = trainer.rewards(params, batch)
        np.testing.assert_allclose(rewards_T[:8].reshape(4, 2), alone[taken], rtol=1e-4, atol=1e-5)
        assert not rewards_T[8:].any(), "where there is no text there is no reward"


def test_the_loss_by_hand_and_what_is_reported(model, learnt, alone):
    """In float64 from arXiv 2203.02155 eq. 1 and the centring of 2312.09244."""
    weights, _, params = model
    batch, _ = packed(learnt)
    batch.by_text["present"][:8] *= np.repeat([1.0, 0.5, 1.0, 2.0], 2).astype(np.float32)
    margins, share = alone[:, 0] - alone[:, 1], np.array([1.0, 0.5, 1.0, 2.0]) / 4.5
    expected = share @ (np.log1p(np.exp(-margins)) + 0.1 * alone.sum(1) ** 2)
    loss, (accuracy, more) = jax.jit(functools.partial(measure, weights.model, REWARDED))(
        params, batch
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert tuple(more) == REWARDED.measures
    assert float(more["reward/margin"]) == pytest.approx(share @ margins, rel=1e-4)
    assert float(more["reward/mean"]) == pytest.approx(share @ alone.mean(1), rel=1e-4)
    assert float(accuracy) == float(more["reward/accuracy"]) == pytest.approx(share @ (margins > 0))


def test_the_gradient_by_finite_differences(model, learnt):
    """Along a random direction of head and parameters at once, and along the head's alone."""
    weights, _, params = model
    batch, _ = packed(learnt)
    loss_of = jax.jit(lambda p: measure(weights.model, REWARDED, p, batch)[0])
    gradient = jax.jit(jax.grad(loss_of))(params)
    rng = np.random.default_rng(0)
    for below in np.float32([1.0, 0.0]):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        direction["params"] = jax.tree.map(lambda x, b=below: b * x, direction["params"])

        def moved(by, along=direction):
            return jax.tree.map(lambda x, along_x: x + np.float32(by) * along_x, params, along)

        rise = float(loss_of(moved(2e-3))) - float(loss_of(moved(-2e-3)))
        both = zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        slope = sum(float(jnp.vdot(g, d)) for g, d in both)
        assert rise / 4e-3 == pytest.approx(slope, rel=0.02)


def test_no_token_is_predicted(model, learnt):
    """The matrix that predicts may hold anything: it has no say, and gets no gradient."""
    weights, _, params = model
    broken = {**params, "params": {**params["params"], "head": params["params"]["head"] * np.nan}}
    batch, _ = packed(learnt)
    grads = jax.jit(jax.grad(lambda p: measure(weights.model, REWARDED, p, batch)[0]))(broken)
    assert not np.any(grads["params"]["head"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert np.any(grads["params"]["embedding"]) and np.any(grads["reward"]["weights"])


def test_only_centring_decides_what_is_learnt():
    assert settings(CONFIG) == {"name": "reward", "centring": 0.1}
    assert settings(ObjectiveConfig("reward", beta=3.0)) == settings(ObjectiveConfig("reward"))


@pytest.mark.parametrize("rank, mesh", [(0, {}), (2, dict(data=2, fsdp=2, tensor=2))])
def test_steps_teach_it_what_is_better(make_weights, make_params, learnt, rank, mesh):
    """From a head of zeros; what is frozen stays as it is, and the mean reward is 0 at the end."""
    weights = make_weights(**mesh, layers=1, positions="rope")
    trainer = Trainer(weights, OptimizerConfig(), LoraConfig(rank=rank), REWARDED)
    trained, frozen = trainer.parts.divide(make_params(weights), jax.random.key(0))
    batch, _ = packed(learnt)
    assert not trainer.rewards(trained, batch, frozen).any()
    below = jax.tree.map(np.asarray, frozen)
    state, losses = trainer.start(trained), []
    for _ in range(25):
        state, metrics = trainer.step(state, batch, 0.01, frozen)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(2)) and losses[-1] < 0.3
    assert float(metrics.accuracy) == 1.0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, frozen), below)
    weights_N = np.array([1.0, 2.0, 1.0, 0.5])
    head = centred_head(trainer, state.params, frozen, learnt, weights_N, BATCH)
    rewards_4x2 = trainer.rewards(state.params, batch, frozen)[:8].reshape(4, 2) + head.offset
    assert np.average(rewards_4x2.mean(1), weights=weights_N) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_head_is_no_matrix_to_an_optimizer(model, name):
    """It is not decayed, and not orthogonalised."""
    weights, _, params = model
    trainer = Trainer(weights, OptimizerConfig(name=name, weight_decay=0.5), objective=REWARDED)
    head = {"reward": params["reward"]}
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.5))
    nothing = jax.tree.map(jnp.zeros_like, head)
    with jax.numpy_dtype_promotion("standard"):  # as in the step
        updates, _ = optimizer.update(nothing, optimizer.init(head), head)
    assert not np.any(updates["reward"]["weights"])
    assert jax.tree.structure(trainer.abstract.params) == jax.tree.structure(params)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("plain") / "m", max_length=128)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Comparisons whose better reply ends with a fox, and one that no row has room for."""
    rng, rows = np.random.default_rng(0), []
    for i in range(160):
        rest = " ".join(rng.choice(["quick", "12", "world", "?"], rng.integers(1, 4)))
        pair = {"chosen": f"{rest} fox", "rejected": f"{rest} dog"}
        rows.append({"prompt": f"q{i // 2}"} | pair)
    rows.append({"prompt": "long", "chosen": "a" * 90, "rejected": "b"})
    path = tmp_path_factory.mktemp("comparisons") / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tuning(checkpoint, kind="lora", **more) -> RewardConfig:
    given = {"roles.base.path": checkpoint, "tune": kind, "held_out": "0.3", "train.epochs": "12"}
    given |= {"train.row_length": "64", "train.optimizer.learning_rate": "0.01"}
    if kind == "lora":
        given |= {"train.lora.rank": "4"}
    return lay(RewardConfig(), {}, given | more)


@pytest.fixture(scope="module")
def folders(checkpoint, source, tmp_path_factory):
    """Of either kind, a folder."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind) / "out"
        run_file(tuning(checkpoint, kind), source, str(folder), QUIET)
        return folder

    return make


@pytest.mark.parametrize("kind, beside", [("lora", ADAPTER), ("full", MODEL)])
def test_what_is_tuned_is_written_beside_the_head_and_judges(folders, checkpoint, kind, beside):
    folder = folders(kind)
    card = json.loads((folder / CARD).read_text())
    assert {path.name for path in folder.iterdir()} == {HEAD, CARD, beside}
    assert card["comparisons"]["no_room"] == 1 and card["settings"]["tune"] == kind
    assert ("lora" in card["settings"]["train"]) == (kind == "lora")
    assert not {"l2", "steps"} & card["settings"].keys()
    assert all(name.startswith(f"{beside}/") for name in card["tuned"]) and card["tuned"]
    assert card["held_out"]["accuracy"] > 0.9 and card["training"]["accuracy"] > 0.9
    assert card["training"]["loss"] < 0.5
    judge = load_reward(str(folder), make_mesh(MeshConfig(data=1)), batch=5)
    assert judge.identity()["tuned"] == card["tuned"]
    replies = [("q1", f"quick {word}") for word in ("fox", "dog")]
    one, two = judge.scores(replies)
    assert one.score > 0.6 > 0.4 > two.score, "the rewards of training are 0 in the mean"
    # The head says this of what was tuned, and not of the checkpoint as it was.
    shutil.move(folder / beside, folder / "aside")
    with pytest.raises(UserError, match="is not what reward.json is about"):
        load_reward(str(folder), make_mesh(MeshConfig(data=1)), batch=5)
    shutil.move(folder / "aside", folder / beside)


def test_a_tuned_model_that_is_there_is_left_alone_and_another_is_refused(
    folders, checkpoint, source, monkeypatch
):
    folder = folders("lora")
    before = (folder / HEAD).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "load", None)  # nothing is read
        run_file(tuning(checkpoint, batch="16"), source, str(folder), QUIET)
    assert (folder / HEAD).stat().st_mtime_ns == before
    for other in (tuning(checkpoint, **{"train.lora.rank": "3"}), tuning(checkpoint, "full")):
        with pytest.raises(UserError, match="of another checkpoint, of other comparisons"):
            run_file(other, source, str(folder), QUIET)


def test_an_adapter_is_pefts(folders, checkpoint):
    config = json.loads((folders("lora") / ADAPTER / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == checkpoint
    TrainedReward.describe(str(folders("lora")))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"tune": "head"}, "'config.train' is not read with 'config.tune=head'"),
        ({"steps": "3"}, "'config.steps' is not read with 'config.tune=lora'"),
        ({"l2": "3"}, "'config.l2' is not read"),
        ({"tune": "hed"}, "did you mean 'head'?"),
        ({"train.lora.rank": "0"}, "'config.train.lora.rank' is 0"),
        ({"train.lora.targets": "qeury"}, "did you mean 'query'?"),
        ({"train.optimizer.decay": "1"}, "exceed the whole"),
        ({"train.rows": "3"}, "'config.train.rows' is 3"),
        ({"train.row_length": "4"}, "has no comparison to train on: 0 ties"),
    ],
)
def test_mistakes_are_named(checkpoint, source, tmp_path, overrides, message):
    with pytest.raises(UserError) as caught:
        run_file(tuning(checkpoint, **overrides), source, str(tmp_path / "out"), QUIET)
    assert message in str(caught.value) and not (tmp_path / "out").exists()
