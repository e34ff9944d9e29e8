"""A loop compiles in its first round what it needs, and nothing after that."""

import dataclasses

import jax
import pytest
from finished_runs import promotion

from karploop import loop, machinery
from karploop.machinery import prepare
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Stages
from karploop.store import Store

STAGE = dict(checkpoint_every=2, rows=4, row_length=32, optimizer=dict(learning_rate=3e-3))
TINY = dict(
    name="tiny",
    rounds=3,
    mesh=dict(data=1),
    task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=60),
    model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
    warmup=STAGE | dict(steps=60),
    train=STAGE | dict(steps=3),
    generate=dict(prompts=10, samples=8, batch=4),  # each round one digit more
    judge=dict(name="vote"),
    filter=dict(name="threshold", threshold=0.0, on_empty="skip"),
    evaluate=dict(problems=4, difficulties=(1, 2), batch=4),
)
OBJECTIVES = {
    "sft": {"train.tokens": "300", "train.accumulation": "2", "train.lora.rank": "2"},
    "dpo": {"objective.name": "dpo", "objective.reference": "round"},
    "kto": {
        "objective.name": "kto",
        "preference.desirable": "0.2",
        "train.accumulation": "2",
    },
    "policy gradient": {"objective.name": "policy_gradient", "regime.data": "replace"},
    "divergence in the loss": {"objective.name": "policy_gradient", "objective.kl": "0.1"},
    "divergence in the reward": {
        "objective.name": "policy_gradient",
        "objective.kl": "0.1",
        "objective.kl_in": "reward",
        "regime.optimizer": "keep",
    },
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where all runs find the same base."""
    store = Store(str(tmp_path_factory.mktemp("store")), print)
    store.open()
    return store


@pytest.fixture(scope="module")
def shared():
    return prepare(resolve(TINY))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_after_its_first_round_a_loop_compiles_nothing(store, shared, name):
    """Though prompts get longer, and what is kept, compared and trained on is never as much."""
    config = resolve(TINY, OBJECTIVES[name])
    shared.weights._live.clear()
    trainers = machinery.make_trainers({0: config}, shared.weights, shared.policy, None)[0]
    rounds, compiled = [], [0]

    def count(event, seconds, **_):
        compiled[-1] += event == "/jax/core/compile/backend_compile_duration"

    def after_round(done):
        rounds.append(done)
        compiled.append(0)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        own = dataclasses.replace(shared, config=config, trainers=trainers)
        with promotion():
            loop.run(own, Stages(store, Progress(quiet=True)), after_round)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert all("train" in done.stages for done in rounds[1:]), "every round must have trained"
    assert compiled[0] + compiled[1] > 0, "the counter must notice what does compile"
    assert compiled[2:-1] == [0, 0]
