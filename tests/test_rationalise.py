"""Rationalisation: who is asked again, with what, and that nothing but the generator sees it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from itertools import product
from unittest import mock

import pyarrow.parquet as pq
import pytest
import tiny
from finished_runs import promotion

from karploop import launch
from karploop.catalogue import read_catalogue
from karploop.data.problems import is_held_out
from karploop.data.tasks import Task, get_task
from karploop.errors import UserError
from karploop.lineage import trace_params, trace_sample
from karploop.machinery import prepare
from karploop.reporting.model_card import model_card
from karploop.resolve import resolve
from karploop.store import Store


@dataclass(frozen=True)
class Secret(Task):
    """A digit that nobody can tell from the prompt, but from a hint everybody."""

    name: str = "secret"
    alphabet = "0123456789=()"

    @property
    def hintable(self):
        return True

    def sample(self, rng, difficulty):
        return "".join(rng.choice(list("0123456789"), difficulty)) + "="

    def prompts(self, difficulty):
        return ("".join(digits) + "=" for digits in product("0123456789", repeat=difficulty))

    def space(self, difficulty):
        return 10**difficulty

    def difficulty(self, prompt):
        return len(prompt) - 1

    def answer(self, prompt):
        return str(hashlib.sha256(prompt.encode()).digest()[0] % 10)

    def hinted(self, prompt):
        return f"{prompt[:-1]}({self.answer(prompt)})="

    def max_prompt_length(self, difficulty):
        return difficulty + 1

    def max_hinted_length(self, difficulty):
        return difficulty + 4

    def max_completion_length(self, difficulty):
        return 1


@dataclass(frozen=True)
class Known(Secret):
    """The same digit for all."""

    name: str = "known"

    def answer(self, prompt):
        return "7"


SECRET, KNOWN = Secret(), Known()


def settings(name, **overrides):
    made = tiny.get_config()
    optimizer = {"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.0}
    train = {"row_length": 64, "rows": 8, "steps": 100, "optimizer": optimizer}
    made.update(
        {
            "mesh": {"data": 1},
            "rounds": 1,
            "task": {
                "name": f"test_rationalise:{name}",
                "seed_difficulty": 3,
                "seed_problems": 600,
                "hints": True,
            },
            "model": {"max_length": 64, "width": 32, "head_width": 16, "mlp_width": 64},
            "generate": {"difficulty_step": 0, "spread": 3, "samples": 2, "rationalise": True},
            "filter": {"name": "verifier"},
            "regime": {"data": "replace", "start": "base"},
        }
    )
    made.warmup = dict(made.warmup, **train)
    made.train = dict(made.train, **(train | {"steps": 10}))
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve(made.to_dict(), overrides)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One round on secrets with hints and one without in one store, and one on what is known."""
    folder = tmp_path_factory.mktemp("rationalise")
    compiled = prepare(settings("SECRET"))  # both tasks have texts of the same lengths

    def shared(config):
        compiled.weights._live.clear()
        return dataclasses.replace(compiled, config=config, task=get_task(config.task.name))

    with promotion(), mock.patch.object(launch, "prepare", shared):
        for name, config in {
            "hinted": settings("SECRET"),
            "alone": settings("SECRET", generate__rationalise="False"),
            "known": settings("KNOWN"),
        }.items():
            assert launch.launch(config, str(folder), name) == 0
    return folder


def stages(workdir, run, index=0):
    summary = json.loads((workdir / f"runs/{run}/summary.json").read_text())
    return next(r for r in summary["rounds"] if r["round"] == index)


def table(workdir, run, stage, file, index=0):
    key = stages(workdir, run, index)["stages"][stage]
    return pq.read_table(workdir / "store" / stage / key / file).to_pylist()


def test_prompts_without_a_right_completion_are_asked_again_and_no_others(workdir):
    own = table(workdir, "hinted", "generate", "samples.parquet")
    solved = {
        row["prompt_id_S"]
        for row in own
        if row["finished_S"] and row["completions"] == SECRET.answer(row["prompts"])
    }
    hinted = table(workdir, "hinted", "rationalise", "samples.parquet")
    assert solved, "a guess is right now and then"
    assert {row["prompt_id_S"] for row in hinted} == set(range(64)) - solved
    assert {row["sample_S"] for row in hinted} == {2, 3}
    prompts = {row["prompt_id_S"]: row["prompts"] for row in own}
    for row in hinted:
        assert row["prompts"] == prompts[row["prompt_id_S"]]
        assert row["hinted"] == SECRET.hinted(row["prompts"])
        assert row["logprobs"] == [], "those with a hint are not the model's own"


def test_what_is_right_is_learnt_without_its_hint(workdir):
    own, hinted = (
        table(workdir, "hinted", stage, "samples.parquet") for stage in ("generate", "rationalise")
    )
    keys = stages(workdir, "hinted")["stages"]
    rows = {keys["generate"]: own, keys["rationalise"]: hinted}
    kept = table(workdir, "hinted", "filter", "examples.parquet")
    assert {row["source"] for row in kept} == rows.keys()
    for row in kept:
        assert row["prompts"] == rows[row["source"]][row["row"]]["prompts"]
        assert row["completions"] == rows[row["source"]][row["row"]]["completions"]
        assert row["completions"] == SECRET.answer(row["prompts"])
        assert "(" not in row["prompts"]
    used = table(workdir, "hinted", "train", "rows.parquet")
    assert any(row["source"] == keys["rationalise"] for row in used)
    held_out = table(workdir, "hinted", "held_out", "held_out.parquet", -1)
    assert not any("(" in row["prompts"] for row in held_out)
    assert not any(is_held_out(SECRET, row["prompts"], 0.1) for row in kept)


def test_metrics_say_what_hints_gave_and_count_it_nowhere_else(workdir):
    metrics, alone = (stages(workdir, run)["metrics"] for run in ("hinted", "alone"))
    hinted = table(workdir, "hinted", "rationalise", "samples.parquet")
    right = sum(r["finished_S"] and r["completions"] == SECRET.answer(r["prompts"]) for r in hinted)
    assert metrics["hinted"] == len(hinted)
    assert metrics["hinted_right"] == metrics["hinted_kept"] == right > 20
    assert not any(name.startswith("hinted") for name in alone)
    assert {k: v for k, v in metrics.items() if k in alone and "token" not in k} == {
        k: v for k, v in alone.items() if "token" not in k
    }


def test_arms_with_and_without_hints_share_what_comes_before(workdir):
    with_, without = (stages(workdir, run)["stages"] for run in ("hinted", "alone"))
    assert with_["prompts"] == without["prompts"]
    assert with_["generate"] == without["generate"]
    assert with_["train"] != without["train"]
    assert "rationalise" not in without


def test_nobody_is_asked_again_where_all_are_solved(workdir):
    found = stages(workdir, "known")
    assert found["metrics"]["sample_accuracy"] == 1.0
    assert table(workdir, "known", "rationalise", "samples.parquet") == []
    assert found["metrics"]["hinted"] == found["metrics"]["hinted_kept"] == 0.0


def test_labelled_problems_come_in_both_forms(workdir):
    plain = table(workdir, "hinted", "seed", "examples.parquet", -1)
    hinted = table(workdir, "hinted", "seed", "hinted.parquet", -1)
    for one, two in zip(plain, hinted, strict=True):
        assert two == one | {"prompts": SECRET.hinted(one["prompts"])}
        assert one["completions"] == SECRET.answer(one["prompts"])


def test_a_row_is_traced_to_its_hint_and_forward(workdir):
    catalogue = read_catalogue(Store(str(workdir)))
    keys = stages(workdir, "hinted")["stages"]
    kept = table(workdir, "hinted", "filter", "examples.parquet")
    row = next(r for r in kept if r["source"] == keys["rationalise"])
    trace = trace_sample(catalogue, f"{row['source']}:{row['row']}")
    assert trace["sample"]["stage"] == "rationalise"
    assert trace["sample"]["hinted"] == SECRET.hinted(row["prompts"])
    assert trace["prompt"]["text"] == row["prompts"]
    (decision,) = trace["decisions"]
    assert decision["kept"] and decision["verdict"]["score"] == 1.0
    trained = trace_params(catalogue, keys["train"])
    sources = {r["source"]: r["filter"] for r in trained["chain"][0]["rows"]}
    assert sources[keys["rationalise"]] == sources[keys["generate"]] == "verifier"
    base = stages(workdir, "hinted", -1)["stages"]["warmup"]
    sampled = {g["stage"] for g in trace_params(catalogue, base)["generated"]}
    assert sampled == {"generate", "rationalise"}


def test_the_hint_is_read_by_the_generator_alone(workdir):
    """By the manifests: gold verdicts of the first samples go to it, and to the other run's
    filter, which reads the verifier by name."""
    (path,) = workdir.glob(
        f"store/rationalise/{stages(workdir, 'hinted')['stages']['rationalise']}"
    )
    inputs = json.loads((path / "manifest.json").read_text())["inputs"]
    assert {role: ref["stage"] for role, ref in inputs.items()} == {
        "prompts": "prompts",
        "params": "warmup",
        "gold": "judge",
        "samples_0": "generate",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"task.hints": "False"}, "set 'config.task.hints=True'"),
        ({"objective.name": "kto", "judge.name": "verifier"}, "compares what one prompt gave"),
        ({"generate.chain": "answer"}, "asks the policy itself"),
        ({"members": "2"}, "would tell them what to vote for"),
        ({"filter.name": "none"}, "the filter 'none' would keep what repeats them"),
        ({"filter.name": "vote"}, "the filter 'vote' would keep"),
        ({"filter.name": "random", "filter.match": "verifier"}, "the filter 'random' would keep"),
        ({"task.name": "reverse_addition"}, "task 'reverse_addition' does not say how"),
    ],
)
def test_what_hints_do_not_go_with_is_refused(overrides, message):
    overrides = {key.replace(".", "__"): value for key, value in overrides.items()}
    with pytest.raises(UserError) as error:
        prepare(settings("SECRET", **overrides))
    assert message in str(error.value)


def test_the_model_card_says_that_hints_were_given(workdir):
    for run, said in {"hinted": True, "alone": False}.items():
        config, summary = (
            json.loads((workdir / f"runs/{run}/{name}.json").read_text())
            for name in ("config", "summary")
        )
        card = model_card(
            config=config, summary=summary, environment={}, round=0, base="b", files={},
            params_sha256="0", adapter=False,
        )  # fmt: skip
        assert ("asked again with the gold answer as a hint" in card) is said


def test_a_task_that_writes_no_hints_says_so():
    class Mute(Secret):
        hinted, max_hinted_length = Task.hinted, Task.max_hinted_length

    with pytest.raises(UserError, match="does not say how a hint is written"):
        Mute().hinted("1=")
    with pytest.raises(UserError, match="does not say how a hint is written"):
        Mute().max_hinted_length(1)
