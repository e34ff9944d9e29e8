"""Rounds that go back to the labelled problems: self-play against gold completions."""

import json

import pyarrow.parquet as pq
import pytest
import tiny
from finished_runs import promotion

from karploop import launch
from karploop.data.tasks import get_task
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.resolve import pairs_labelled, resolve

SPIN = {
    "generate.problems": "labelled",
    "preference.pairing": "labelled",
    "objective.name": "dpo",
    "objective.reference": "round",
}


def settings():
    made = tiny.get_config()
    optimizer = dict(learning_rate=1e-2)  # until most of what it writes ends
    made.warmup = dict(steps=60, checkpoint_every=60, rows=4, row_length=32, optimizer=optimizer)
    made.update(dict(mesh=dict(data=1), generate=dict(difficulty_step=0, prompts=32)))
    return made.to_dict()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spin")
    with promotion():
        assert launch.launch(resolve(settings(), SPIN), str(folder), "spin") == 0
    return folder


def table(workdir, stage, key, name):
    return pq.read_table(workdir / "store" / stage / key / f"{name}.parquet").to_pydict()


def test_gold_is_preferred_to_what_was_sampled_in_its_place(workdir):
    task = get_task("reverse_addition")
    rounds = json.loads((workdir / "runs/spin/summary.json").read_text())["rounds"]
    seed = table(workdir, "seed", rounds[0]["stages"]["seed"], "examples")
    for done in rounds[1:]:
        stages = done["stages"]
        assert "judge" not in stages and "train" in stages
        asked = table(workdir, "prompts", stages["prompts"], "prompts")
        assert len(set(asked["prompt"])) == 32 and set(asked["prompt"]) <= set(seed["prompts"])
        pairs = table(workdir, "pairs", stages["pairs"], "pairs")
        samples = table(workdir, "generate", stages["generate"], "samples")
        assert pairs["prompts"]
        for i, prompt in enumerate(pairs["prompts"]):
            assert pairs["chosen"][i] == task.answer(prompt) != pairs["rejected"][i]
            assert pairs["chosen_source"][i] == "seed"
            assert seed["prompts"][pairs["chosen_row"][i]] == prompt
            assert pairs["rejected_source"][i] == stages["generate"]
            assert samples["completions"][pairs["rejected_row"][i]] == pairs["rejected"][i]
            assert pairs["margin"][i] != pairs["margin"][i]  # nobody measured one
    assert rounds[1]["stages"]["prompts"] != rounds[2]["stages"]["prompts"]


def test_gold_rows_are_traced_to_what_they_trained(workdir):
    stages = json.loads((workdir / "runs/spin/summary.json").read_text())["rounds"][1]["stages"]
    used = table(workdir, "train", stages["train"], "rows")
    pairs = table(workdir, "pairs", stages["pairs"], "pairs")
    seen = set(zip(used["source"], used["row"], strict=True))
    assert seen & {("seed", row) for row in pairs["chosen_row"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SPIN | {"generate.problems": "new"}, "'config.generate.problems' to labelled"),
        ({"generate.problems": "labelled", "task.seed_problems": "0"}, "there are none"),
        (SPIN | {"preference.pairing": "best_worst"}, "'config.generate.samples' to 2 or more"),
        (SPIN | {"judge.name": "vote"}, "reads no judge"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prepare(resolve(settings(), changes))


@pytest.mark.parametrize("objective", ["sft", "gkd", "kto", "policy_gradient"])
def test_how_pairs_are_made_asks_nothing_of_objectives_without_pairs(objective):
    made = {"objective.name": objective, "preference.pairing": "labelled"}
    made |= {"generate.samples": "2", "judge.name": "vote", "roles.teacher.weights": "base"}
    config = resolve(settings(), made)
    assert config.generate.problems == "new" and not pairs_labelled(config)
