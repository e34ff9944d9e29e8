"""Reward models that a loop trains itself: the round, its policy, and the judge that follows."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import promotion
from test_objectives import TINY

from karploop import curriculum, launch
from karploop.bindings import Bindings
from karploop.errors import RunFailed, UserError
from karploop.machinery import prepare
from karploop.models.reward_head import HEAD
from karploop.models.weights import params_sha256
from karploop.records import PAIRS_FILE, VERDICTS_FILE, Contrasts, Opinions, Samples
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.roles.in_loop import check_reward_models
from karploop.stages import Stages, Stopped
from karploop.store import Store
from karploop.training.train import ROWS_FILE, STEPS_FILE

REWARD = {"objective.name": "reward", "preference.pairing": "all_pairs", "rounds": "2"}
JUDGED = {
    "objective.name": "policy_gradient",
    "objective.reward": "raw",
    "judge.name": "reward",
    "roles.judge.weights": "reward",
}
THEN_JUDGED = {
    key if key.startswith("roles.") else f"phases.1.{key}": value for key, value in JUDGED.items()
}


def config(**changes):
    return resolve(TINY, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two rounds of a loop that trains reward models, on pairs that gold decides."""
    folder = tmp_path_factory.mktemp("reward")
    with promotion():
        assert launch.launch(config(**REWARD), str(folder), "reward") == 0
    return folder


@pytest.fixture(scope="module")
def rounds(workdir):
    """A summary's rounds, the base first."""
    return json.loads((workdir / "runs/reward/summary.json").read_text())["rounds"]


def opened(workdir, stop_requested=lambda: False) -> Stages:
    store = Store(str(workdir), print)
    store.open()
    return Stages(store, Progress(quiet=True), stop_requested)


class Course:
    """The stages of one loop's first round, found or computed; and what a second one asks."""

    def __init__(self, stages: Stages, machinery):
        self.loop = Bindings(machinery, stages)
        self.base = self.loop.base(0)
        prompts = self.loop.prompts(0, curriculum.first(machinery.config))
        self.samples = {0: self.loop.generate(0, 0, prompts, self.base, [self.base])}
        verdicts = self.loop.judge(0, self.samples, [self.base])
        selection = self.loop.filter(0, self.samples, verdicts)
        self.pairs, _ = self.loop.lesson(0, self.samples, verdicts, selection, [self.base])

    def reward(self):
        return self.loop.train(0, 0, self.base, self.base, [self.pairs], [self.base])


@pytest.fixture(scope="module")
def machinery():
    return prepare(config(**REWARD))


def test_a_round_trains_a_reward_model_and_leaves_the_policy(workdir, rounds):
    base, first, second = rounds
    for done in (first, second):
        assert {"pairs", "reward", "evaluate"} < done["stages"].keys()
        assert "train" not in done["stages"] and done["evals"] == base["evals"]
        assert done["stages"]["evaluate"] == base["stages"]["evaluate"], "nothing is measured anew"
    assert first["stages"]["reward"] != second["stages"]["reward"]
    summary = json.loads((workdir / "runs/reward/summary.json").read_text())
    store = Store(str(workdir))
    warmup = store.manifest("warmup", base["stages"]["warmup"])
    assert summary["params_sha256"] == params_sha256(warmup)
    made = store.manifest("reward", second["stages"]["reward"])
    assert made.inputs["params"]["key"] == warmup.key
    assert {n for n in made.inputs if n.startswith("kept_")} <= {"kept_0"}, "regime.data=replace"
    assert {HEAD, "params.safetensors", STEPS_FILE, ROWS_FILE} == set(made.files)
    steps = pq.read_table(store.fetch(made, STEPS_FILE))
    assert {"reward/accuracy", "reward/margin"} < set(steps.column_names) and steps.num_rows == 4
    assert steps["loss"][0].as_py() == pytest.approx(np.log(2), abs=1e-5)
    assert '"reward/margin"' in (workdir / "runs/reward/metrics.jsonl").read_text()


def test_stopped_in_the_middle_it_ends_the_same(workdir, rounds, machinery, tmp_path):
    """A round goes on from the checkpoint that a stop left, to the bit."""
    shutil.copytree(workdir / "store", tmp_path / "store", ignore=lambda *_: ["reward"])
    course = Course(opened(tmp_path), machinery)
    asked = itertools.count()
    course.loop.stages.stop_requested = lambda: next(asked) >= 1  # behind the first checkpoint
    with promotion(), pytest.raises(Stopped):
        course.reward()
    kept = [path.name for path in tmp_path.glob("partial/reward/*/checkpoints/*")]
    assert kept == ["2"]
    machinery.weights._live.clear()
    course.loop.stages.stop_requested = lambda: False
    with promotion():
        resumed = course.reward()
    whole = Store(str(workdir)).manifest("reward", rounds[1]["stages"]["reward"])
    assert resumed.manifest.files == whole.files


@pytest.fixture(scope="module")
def judged(workdir, machinery):
    """A first round's reward model, a loop with other settings that judges by it, and how."""
    stages = opened(workdir)
    course = Course(stages, machinery)
    with promotion():
        reward = course.reward()
        other = Bindings(prepare(config(**REWARD, **THEN_JUDGED)), stages).at(1)
        verdicts = other.judge(1, course.samples, [course.base, course.base], [reward])
    return course, reward, other, verdicts


def assert_centred(course, verdicts):
    """Read by the judge, the texts that it was trained on have a mean reward of 0."""
    opinions = Opinions.from_table(verdicts.table(VERDICTS_FILE))
    samples = Samples.gather({"samples_0": course.samples[0]})
    rewards = [json.loads(text).get("reward") for text in opinions.criteria]
    by_text = {
        (prompt, text): found
        for prompt, text, found in zip(samples.prompts, samples.completions, rewards, strict=True)
        if found is not None
    }
    assert len(by_text) > 20 and np.std(list(by_text.values())) > 0.01
    pairs = Contrasts.from_table(course.pairs.table(PAIRS_FILE))
    both = [
        [by_text[prompt, text] for prompt, text in zip(pairs.prompts, side, strict=True)]
        for side in (pairs.chosen, pairs.rejected)
    ]
    assert np.mean(both) == pytest.approx(0, abs=1e-4)


def test_the_next_rounds_judge_is_the_reward_model(judged):
    course, reward, other, verdicts = judged
    manifest = verdicts.manifest
    assert manifest.inputs["role_judge"] == reward.reference
    assert_centred(course, verdicts)
    seats = other.m.judge.seats
    assert other.m.roles.inputs(seats, ["base"], ["old", "new"]) == {"role_judge": "new"}
    with pytest.raises(RunFailed, match="no round with 'config.objective.name=reward' found"):
        other.m.roles.inputs(seats, ["base"])


def test_an_adapter_judges_with_what_lies_below_it(judged, workdir):
    course, _, other, verdicts = judged
    small = Course(opened(workdir), prepare(config(**REWARD, **{"train.lora.rank": "2"})))
    with promotion():
        reward = small.reward()
        found = other.judge(1, course.samples, [course.base, course.base], [reward])
    assert {HEAD, "adapter.safetensors", STEPS_FILE, ROWS_FILE} == set(reward.manifest.files)
    assert found.manifest.key != verdicts.manifest.key
    assert_centred(small, found)


def test_what_it_says_teaches_the_policy(judged):
    """Of the rounds before, a policy gradient takes what is of its own kind: not the pairs."""
    course, _, other, verdicts = judged
    with promotion():
        selection = other.filter(1, course.samples, verdicts)
        history = [course.base, course.base]
        lesson, rows = other.lesson(1, course.samples, verdicts, selection, history)
        trained = other.train(1, 0, course.base, course.base, [course.pairs, lesson], history)
    assert lesson.manifest.stage == "experience" and rows and not other.rewards
    assert trained.manifest.inputs["kept_0"] == lesson.reference
    assert "kept_1" not in trained.manifest.inputs
    assert params_sha256(trained.manifest) != params_sha256(course.base.manifest)


def test_a_judge_that_no_round_can_have_trained_is_refused(tmp_path):
    by_gold, by_reward = config(**REWARD), config(**JUDGED)
    check_reward_models([by_gold, by_reward, by_reward])
    check_reward_models([by_gold] * 3)
    for rounds, where in (([by_reward], 0), ([config(), by_reward, by_gold], 1)):
        with pytest.raises(UserError, match=f"before round {where}, which judges by it, no round"):
            check_reward_models(rounds)
    members = {"judge.name": "ensemble", "judge.members": "verifier, reward@other"}
    mixed = config(**members, **{"roles.other.weights": "reward"})
    with pytest.raises(UserError, match="'config.roles.other.weights=reward' is the newest"):
        check_reward_models([mixed])
    with pytest.raises(UserError, match="let an earlier one have it"):
        launch.launch(by_reward, str(tmp_path / "none"), "run")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (JUDGED | {"roles.judge.chat": "yes"}, "leave 'chat' at auto"),
        (JUDGED | {"roles.judge.path": "x"}, "those of a loop"),
        (JUDGED | {"judge.name": "rubric"}, "'weights=reward' is a reward model"),
        (REWARD | {"regime.optimizer": "keep"}, "each round trains another model"),
        (REWARD | {"members": "2"}, "set it to 1"),
        (REWARD | {"generate.samples": "1"}, "'config.generate.samples' to 2"),
        (REWARD | {"judge.name": ""}, "the objective 'reward' reads scores"),
        (REWARD | {"train.row_length": "4"}, "shorter than the longest example"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(changes, message):
    with pytest.raises(UserError, match=message):
        prepare(config(**changes))
