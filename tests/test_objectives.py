"""Objectives in training: what a packed batch is worth, and loops that learn by each of them."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import promotion

from karploop import launch
from karploop.config import COMPARING, OF_PAIRS, ObjectiveConfig, OptimizerConfig, TrainConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.records import Contrasts, Episodes, Examples, Labelled
from karploop.resolve import resolve
from karploop.training.lessons import origins, units, with_reference
from karploop.training.objectives import EPISODES, PAIRS, make_objective, settings
from karploop.training.packing import pack, places
from karploop.training.reference import logprobs_of
from karploop.training.trainer import Trainer

NAMES = ("sft", "dpo", "ipo", "simpo", "orpo", "kto", "policy_gradient")
PROMPTS = ["1+2=", "34+5=", "6+7=", "8+9="]
GOOD, BAD = ["3", "39", "13", "17"], ["4", "38", "1", "1777"]
BATCH = TrainConfig(rows=2, row_length=32)


def rows_of(kind):
    difficulty, row = np.ones(4, np.int64), np.arange(4)
    source = ["made"] * 4
    if kind == "pairs":
        return Contrasts(
            PROMPTS, GOOD, BAD, difficulty, np.ones(4), source, row, source, row + 10
        )  # fmt: skip
    if kind == "labels":
        desirable = np.array([True, False, True, False])
        return Labelled(PROMPTS, GOOD, desirable, difficulty, source, row)
    if kind == "episodes":
        tokens = [[3, 1], [2, 4, 1], [5, 1], [6, 7, 8, 9]]
        logprobs = [[-1.0] * len(t) for t in tokens]
        advantages = [[a] * len(t) for a, t in zip([1.0, -1.0, 0.5, 0.0], tokens, strict=True)]
        return Episodes(PROMPTS, tokens, logprobs, advantages, difficulty, source, row)
    return Examples(PROMPTS, GOOD, difficulty, source, row)


@pytest.fixture(scope="module")
def model(make_weights, make_params):
    weights = make_weights(layers=1, positions="rope")
    return weights, make_params(weights)


@pytest.fixture(scope="module")
def trainers(model):
    @functools.cache
    def make(config):
        objective = make_objective(config, longest=6)
        return Trainer(model[0], OptimizerConfig(), objective=objective)

    return make


def packed(learnt):
    """All units, in as many batches as they take."""
    order = iter(range(len(learnt)))
    return list(pack(learnt, order, BATCH.rows, BATCH.row_length))


def lesson_of(trainer, tokenizer, params):
    """Units with what the reference, which is the model itself, says of them."""
    objective = trainer.objective
    learnt = units(rows_of(objective.lesson), PlainPrompting(tokenizer), objective.config, 32)
    if objective.reference:
        found = logprobs_of(learnt, functools.partial(trainer.logprobs, params), BATCH)
        learnt = with_reference(learnt, found, objective.reference)
    return learnt


def configured(name):
    return (
        ObjectiveConfig(name=name, kl=0.1) if name == "policy_gradient" else ObjectiveConfig(name)
    )


def test_the_config_knows_which_objectives_learn_from_pairs_and_from_groups():
    field = next(f for f in dataclasses.fields(ObjectiveConfig) if f.name == "name")
    lessons = {
        n: make_objective(ObjectiveConfig(name=n), 8).lesson for n in field.metadata["choices"]
    }
    assert {n for n, lesson in lessons.items() if lesson == PAIRS} == set(OF_PAIRS)
    assert {n for n, lesson in lessons.items() if lesson in (PAIRS, EPISODES)} == set(COMPARING)


def test_units_carry_what_is_known_of_them(tokenizer):
    (unit, *_) = units(rows_of("pairs"), PlainPrompting(tokenizer), ObjectiveConfig("dpo"), 32)
    assert [text.tokens[text.prompt_length :].tolist() for text in unit] == [
        [*tokenizer.encode(answer), tokenizer.eos_id] for answer in (GOOD[0], BAD[0])
    ]
    assert origins(rows_of("pairs"))[1] == (("made", 1), ("made", 11))
    episodes = units(rows_of("episodes"), PlainPrompting(tokenizer), ObjectiveConfig(), 32)
    found = [text.by_token["advantage"].tolist() for (text,) in episodes]
    assert found == [[1.0] * 2, [-1.0] * 3, [0.5] * 2, [0.0] * 4]
    batches = packed(episodes)
    seen = [(b.by_token["sampler"] != 0) == (b.weights_BxL > 0) for b, _ in batches]
    assert all(same.all() for same in seen)


def test_a_pair_stays_together_and_finds_its_places(tokenizer):
    learnt = units(rows_of("pairs"), PlainPrompting(tokenizer), ObjectiveConfig("dpo"), 32)
    taken = []
    for batch, here in pack(learnt, iter(range(4)), 1, 18):
        texts = [text for unit in here for text in learnt[unit]]
        assert batch.by_text["present"].sum() == len(texts) and len(texts) % 2 == 0
        for place, text in enumerate(texts):
            inside_BxL = (batch.places_BxL == place) & (batch.weights_BxL > 0)
            assert (
                batch.targets_BxL[inside_BxL].tolist() == text.tokens[text.prompt_length :].tolist()
            )
        taken += here
    assert taken == [0, 1, 2, 3]
    with pytest.raises(UserError, match="raise 'rows' or 'row_length'"):
        next(pack(learnt, iter([1]), 1, 10))


def by_hand(config, logprobs, learnt):
    """The loss in float64 from each text's log-probabilities, straight from the formulas."""
    sums = [[np.sum(x, dtype=np.float64) for x in unit] for unit in logprobs]
    means = [[np.mean(x, dtype=np.float64) for x in unit] for unit in logprobs]
    own = [[text.by_text.get("reference", 0.0) for text in unit] for unit in learnt]

    def logistic(x):
        return math.log1p(math.exp(-x))

    losses = []
    for (c, r), (mc, mr), (rc, rr) in zip(sums, means, own, strict=True):
        if config.name == "dpo":
            losses.append(logistic(config.beta * ((c - rc) - (r - rr))))
        elif config.name == "ipo":
            losses.append(((c - rc) - (r - rr) - 1 / (2 * config.beta)) ** 2)
        elif config.name == "simpo":
            losses.append(logistic(config.beta * (mc - mr) - config.margin))
        else:
            odds = [m - math.log(1 - math.exp(m)) for m in (mc, mr)]
            losses.append(-mc + config.odds_weight * logistic(odds[0] - odds[1]))
    return np.mean(losses)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_preferences_of_a_packed_batch_by_hand(model, trainers, tokenizer, name):
    """With another reference than the model, so that nothing cancels."""
    _, params = model
    trainer = trainers(ObjectiveConfig(name))
    learnt = lesson_of(trainer, tokenizer, params)
    logprobs = logprobs_of(learnt, functools.partial(trainer.logprobs, params), BATCH)
    if trainer.objective.reference:
        other = [[x - 0.3 * (1 + i) for i, x in enumerate(unit)] for unit in logprobs]
        learnt = with_reference(learnt, other, "text")
    (batch, taken), *rest = packed(learnt)
    assert not rest and taken == [0, 1, 2, 3]
    logprobs_BxL = jnp.asarray(trainer.logprobs(params, batch))
    loss, more = trainer.objective.loss(logprobs_BxL, batch)
    assert float(loss) == pytest.approx(
        by_hand(trainer.objective.config, logprobs, learnt), rel=1e-5
    )
    assert tuple(more) == trainer.objective.measures


def test_a_model_is_no_distance_from_itself(model, trainers, tokenizer):
    """What the reference says in a pass of its own is what a step sees, packed in another order."""
    _, params = model
    for name, at_start in (("dpo", math.log(2)), ("policy_gradient", None)):
        trainer = trainers(configured(name))
        learnt = lesson_of(trainer, tokenizer, params)
        batch, _ = next(pack(learnt, iter([2, 0, 3, 1]), BATCH.rows, BATCH.row_length))
        loss, more = trainer.objective.loss(jnp.asarray(trainer.logprobs(params, batch)), batch)
        if at_start:
            assert float(loss) == pytest.approx(at_start, abs=1e-5)
        else:
            assert float(more["policy/kl_reference"]) == pytest.approx(0, abs=1e-6)


def test_labels_of_a_packed_batch_by_hand(model, trainers, tokenizer):
    """Eq. 7 of arXiv 2402.01306, with the baseline from answers to the next prompt."""
    _, params = model
    config = ObjectiveConfig("kto", beta=0.3, desirable_weight=1.5)
    trainer = trainers(config)
    learnt = lesson_of(trainer, tokenizer, params)
    endings = [[t.tokens[t.prompt_length :].tolist() for t in unit] for unit in learnt]
    assert [strange for _, strange in endings] == [own for own, _ in endings[1:] + endings[:1]]
    logprobs = logprobs_of(learnt, functools.partial(trainer.logprobs, params), BATCH)
    moved = [[x - 0.2 * (2 * i + k) for k, x in enumerate(u)] for i, u in enumerate(logprobs)]
    learnt = with_reference(learnt, moved, "text")
    gains = np.array(
        [[0.2 * (2 * i + k) * len(x) for k, x in enumerate(u)] for i, u in enumerate(logprobs)]
    )
    baseline = max(gains[:, 1].mean(), 0)
    value = 0.3 * (gains[:, 0] - baseline)
    signs = np.array([1, -1, 1, -1])
    expected = np.mean(np.where(signs > 0, 1.5, 1.0) / (1 + np.exp(signs * value)))
    (batch, _), *rest = packed(learnt)
    assert not rest
    loss, _ = trainer.objective.loss(jnp.asarray(trainer.logprobs(params, batch)), batch)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_a_policy_gradient_by_hand(model, trainers, tokenizer, aggregate):
    _, params = model
    config = ObjectiveConfig("policy_gradient", aggregate=aggregate, clip_low=0.1, clip_high=0.3)
    trainer = trainers(config)
    learnt = lesson_of(trainer, tokenizer, params)
    logprobs = logprobs_of(learnt, functools.partial(trainer.logprobs, params), BATCH)
    losses = []
    for (x,), (text,) in zip(logprobs, learnt, strict=True):
        ratio = np.exp(np.float64(x) + 1.0)
        advantage = text.by_token["advantage"]
        losses.append(-np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.3) * advantage))
    expected = {
        "token": np.concatenate(losses).mean(),
        "sequence": np.mean([np.mean(x) for x in losses]),
        "constant": np.sum(np.concatenate(losses)) / (6 * len(losses)),
    }[aggregate]
    (batch, _), *rest = packed(learnt)
    assert not rest
    loss, _ = trainer.objective.loss(jnp.asarray(trainer.logprobs(params, batch)), batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_examples_may_count_alike_whatever_their_length(model, trainers, tokenizer):
    _, params = model
    trainer = trainers(ObjectiveConfig(weighting="example"))
    learnt = lesson_of(trainer, tokenizer, params)
    logprobs = logprobs_of(learnt, functools.partial(trainer.logprobs, params), BATCH)
    (batch, _), *_ = packed(learnt)
    loss, _ = trainer.objective.loss(jnp.asarray(trainer.logprobs(params, batch)), batch)
    assert float(loss) == pytest.approx(-np.mean([x.mean() for (x,) in logprobs]), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_steps_learn_what_the_objective_says(model, make_params, trainers, tokenizer, name):
    """The better answers gain on the worse ones; what had an advantage becomes likelier."""
    weights, params = model
    trainer = trainers(configured(name))
    learnt = lesson_of(trainer, tokenizer, params)
    read = functools.partial(trainer.logprobs, params)
    before = logprobs_of(learnt, read, BATCH)
    state = trainer.start(make_params(weights))
    order = itertools.cycle(range(len(learnt)))
    for batch, _ in itertools.islice(pack(learnt, order, BATCH.rows, BATCH.row_length), 20):
        state, metrics = trainer.step(state, batch, 0.01)
    assert np.isfinite(float(metrics.loss)) and set(metrics.more) == set(trainer.objective.measures)
    after = logprobs_of(learnt, functools.partial(trainer.logprobs, state.params), BATCH)
    gains = [
        [float(a.sum() - b.sum()) for a, b in zip(new, old, strict=True)]
        for new, old in zip(after, before, strict=True)
    ]
    if trainer.objective.lesson == "pairs":
        assert np.mean([better - worse for better, worse in gains]) > 0.5
    elif trainer.objective.lesson == "labels":
        assert np.mean([own for own, _ in gains[::2]]) > np.mean([own for own, _ in gains[1::2]])
    elif trainer.objective.lesson == "episodes":
        (up,), (down,), *_ = gains
        assert up > down
    else:
        assert np.mean(gains) > 0.5


TINY = dict(
    name="tiny",
    rounds=2,
    mesh=dict(data=1),
    task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=60),
    model=dict(layers=1, width=32, heads=2, head_width=16, mlp_width=64, max_length=32),
    # Until about every other answer is right.
    warmup=dict(
        steps=150,
        checkpoint_every=150,
        rows=8,
        row_length=32,
        optimizer=dict(learning_rate=3e-3),
    ),
    train=dict(
        steps=4, checkpoint_every=2, rows=4, row_length=32, optimizer=dict(learning_rate=1e-3)
    ),
    generate=dict(prompts=16, samples=6, batch=16, difficulty_step=0),
    judge=dict(name="verifier"),
    filter=dict(name="none", on_empty="skip"),
    regime=dict(data="replace"),
    evaluate=dict(problems=8, difficulties=(1,), batch=8),
)


def run(workdir, name, **changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    with promotion():
        config = resolve(TINY, {"objective.name": name} | changes)
        assert launch.launch(config, str(workdir), name) == 0
    return json.loads((workdir / f"runs/{name}/summary.json").read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Loops of pairs and of episodes in one store; the rewards of the latter pay for distance."""
    folder = tmp_path_factory.mktemp("loops")
    run(folder, "dpo", objective__reference="round", preference__pairing="all_pairs")
    run(folder, "kto", rounds="1")
    run(folder, "policy_gradient", objective__kl="0.05", objective__kl_in="reward")
    return folder


@pytest.mark.parametrize(
    ("name", "stage"), [("dpo", "pairs"), ("kto", "labels"), ("policy_gradient", "experience")]
)
def test_loops_learn_from_pairs_and_from_episodes(workdir, name, stage):
    summary = json.loads((workdir / f"runs/{name}/summary.json").read_text())
    trained = [r["stages"] for r in summary["rounds"] if "train" in r["stages"]]
    assert trained, "no round found anything to compare"
    for stages in trained:
        assert stage in stages and "judge" in stages
        steps = pq.read_table(workdir / "store/train" / stages["train"] / "steps.parquet")
        measures = make_objective(configured(name), 4).measures
        assert steps.num_rows == 4 and set(measures) < set(steps.column_names)
        manifest = json.loads(
            (workdir / "store/train" / stages["train"] / "manifest.json").read_text()
        )
        assert "seed" not in manifest["inputs"] and "reference" in manifest["inputs"]
    log = (workdir / f"runs/{name}/metrics.jsonl").read_text()
    assert measures[0] in log


def test_pairs_are_of_right_and_wrong(workdir):
    (table,) = (
        pq.read_table(p) for p in list((workdir / "store/pairs").glob("*/pairs.parquet"))[:1]
    )
    for row in table.to_pylist():
        assert row["margin"] == 1.0 and row["chosen"] != row["rejected"]
        assert row["chosen_source"] == row["rejected_source"]


def test_episodes_are_what_was_sampled_with_advantages_that_cancel(workdir):
    path = next((workdir / "store/experience").glob("*/episodes.parquet"))
    episodes = pq.read_table(path).to_pylist()
    by_prompt = {}
    for row in episodes:
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["advantages"]) > 0
        (advantage,) = set(row["advantages"])
        by_prompt.setdefault(row["prompts"], []).append(advantage)
    assert all(sum(group) == pytest.approx(0, abs=1e-4) for group in by_prompt.values())
    assert any(any(group) for group in by_prompt.values())


def test_both_texts_of_a_pair_are_traced_to_what_they_trained(workdir):
    pairs = pq.read_table(next((workdir / "store/pairs").glob("*/pairs.parquet"))).to_pylist()
    rows = [pq.read_table(p).to_pylist() for p in (workdir / "store/train").glob("*/rows.parquet")]
    used = {(row["source"], row["row"]) for table in rows for row in table}
    for side in ("chosen", "rejected"):
        assert {(p[f"{side}_source"], p[f"{side}_row"]) for p in pairs} & used


def test_an_interrupted_round_ends_the_same(workdir, tmp_path):
    changes = dict(objective__reference="round", preference__pairing="all_pairs")
    run(tmp_path, "dpo", rounds="1", **changes)
    whole = json.loads((workdir / "runs/dpo/summary.json").read_text())
    assert run(tmp_path, "dpo", **changes)["params_sha256"] == whole["params_sha256"]


def test_only_keys_that_a_loss_reads_make_its_stage():
    assert settings(ObjectiveConfig("dpo", margin=3.0)) == settings(ObjectiveConfig("dpo"))
    assert settings(ObjectiveConfig("dpo", beta=3.0)) != settings(ObjectiveConfig("dpo"))
    for name in NAMES:
        assert settings(ObjectiveConfig(name))["name"] == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "dpo", "generate.samples": "1"}, "'config.generate.samples' to 2"),
        ({"objective.name": "dpo", "noise.rate": "0.1"}, "imitates none"),
        ({"objective.name": "dpo", "members": "2"}, "set it to 1"),
        ({"objective.name": "dpo", "regime.seed_share": "0.5"}, "leave it at"),
        ({"objective.name": "policy_gradient", "generate.chain": "answer"}, "leave it empty"),
        ({"objective.name": "policy_gradient", "objective.truncate": "2"}, "ratios are clipped"),
        ({"objective.name": "dppo"}, "dpo"),
    ],
)
def test_objectives_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        resolve(TINY, changes)


def test_an_objective_of_scores_wants_a_judge():
    with pytest.raises(UserError, match="the objective 'dpo' reads scores"):
        prepare(resolve(TINY, {"objective.name": "dpo", "judge.name": ""}))


def test_a_batch_has_room_for_every_text():
    assert places(3, 5) == 16 and places(2, 4) == 8
    assert jax.eval_shape(lambda: jnp.zeros(places(2, 4))).shape == (8,)
