"""Models as judges within a loop: who is asked, with which weights, and what follows."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")

from published import settings, sums  # noqa: E402
from small_models import save_llama  # noqa: E402
from small_tokenizers import CHATML  # noqa: E402

from karploop import launch  # noqa: E402
from karploop.data.tasks import get_task  # noqa: E402
from karploop.errors import RunFailed, UserError  # noqa: E402
from karploop.judging.verifier import verifier  # noqa: E402
from karploop.judging.vote import vote  # noqa: E402
from karploop.machinery import Machinery, prepare  # noqa: E402
from karploop.oversight.fitness import measured  # noqa: E402
from karploop.records import (  # noqa: E402
    SAMPLES_FILE,
    SELECTION_FILE,
    VERDICTS_FILE,
    Opinions,
    Samples,
    Selection,
)
from karploop.resolve import resolve  # noqa: E402
from karploop.roles.on_mesh import MeshRole  # noqa: E402
from karploop.sampling.by_chain import ChainSamples  # noqa: E402
from karploop.store import Store  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "m", CHATML, max_length=1024)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("task"))


JUDGED = {
    "filter__name": "threshold",
    "filter__threshold": 0.0,
    "judge__name": "rubric",
    # A random model rarely stops: give it many tries.
    "prompt__max_new_tokens": 40,
    "train__row_length": 128,
    "generate__samples": 8,
    "task__seed_problems": 12,
}


@functools.cache
def compiled(model, task) -> Machinery:
    return prepare(resolve(settings(model, task, **JUDGED)))


def start(workdir, name, model, task, **more) -> dict:
    """A run's summary; runs share what they compile."""

    def prepared(config):
        own, shared = prepare(config), compiled(model, task)
        shared.weights._live = {}
        same = {name: getattr(shared, name) for name in ("weights", "sampler", "trainers")}
        return dataclasses.replace(own, **same)

    config = resolve(settings(model, task, **JUDGED | more))
    with mock.patch.object(launch, "prepare", prepared):
        assert launch.launch(config, str(workdir), name) == 0
    return json.loads((workdir / "runs" / name / "summary.json").read_text())


def rounds(workdir, summary):
    """Of each round, the judge's manifest, its opinions and the filter's selection."""
    store = Store(str(workdir))
    for done in summary["rounds"][1:]:
        keys = done["stages"]
        manifest = store.manifest("judge", keys["judge"])
        table = _table(store, manifest, VERDICTS_FILE)
        kept = _table(store, store.manifest("filter", keys["filter"]), SELECTION_FILE)
        yield manifest, Opinions.from_table(table), Selection.from_table(kept)


def _table(store, manifest, name):
    return pq.read_table(store.fetch(manifest, name))


@pytest.fixture(scope="module")
def rewarding(model, task, tmp_path_factory):
    """A policy that rates itself, with the roles that were asked."""
    workdir, asked = tmp_path_factory.mktemp("rewarding"), []
    with pytest.MonkeyPatch.context() as patch:
        real = MeshRole.score

        def score(self, *args):
            asked.append(self)
            return real(self, *args)

        patch.setattr(MeshRole, "score", score)
        summary = start(workdir, "run", model, task)
    return workdir, summary, asked


def test_the_policy_rates_itself_by_its_weights_of_that_round(rewarding):
    workdir, summary, asked = rewarding
    base, first, second = summary["rounds"]
    (one, opinions, selection), (two, later, _) = rounds(workdir, summary)
    assert one.inputs["role_judge"]["key"] == base["stages"]["import"]
    assert two.inputs["role_judge"]["key"] == first["stages"]["train"]
    known = ~np.isnan(opinions.score_S)
    assert known.any() and (opinions.score_S[known] > 0).all()
    for i, reason in enumerate(opinions.reasons):
        assert reason == ("" if known[i] else "did not end")
    assert list(json.loads(opinions.criteria[int(np.argmax(known))])) == [
        "accuracy", "helpfulness", "safety",
    ]  # fmt: skip
    assert (opinions.tokens_in[known] > 100).all() and set(opinions.judges) != set(later.judges)
    assert (selection.kept_S == known).all()
    # Programs are compiled once for all rounds.
    assert len({id(role._samplers) for role in asked}) == 1


def test_the_policys_buffers_are_the_judges(model, task):
    """Bound to the policy, a judge takes no memory of its own."""
    machinery = prepare(resolve(settings(model, task, **JUDGED)))
    marks = object()
    artifact = type("Artifact", (), {"content": "c"})()
    machinery.weights.load = lambda found: marks if found is artifact else None
    roles = machinery.roles.load(
        machinery.weights, machinery.weights.mesh, machinery.roles.inputs(["judge"], [artifact])
    )
    assert roles["judge"].params is marks and roles["judge"].weights is machinery.weights


def test_the_judge_is_measured_beside_the_policy_before_it_is_used(rewarding, model, task):
    """A random model tells nothing from nothing; a run may end for it before it has sampled."""
    workdir, summary, _ = rewarding
    for done in summary["rounds"][1:]:
        metrics = done["metrics"]
        assert metrics["fitness/policy"] == 0 and 0 <= metrics["fitness/judge"] <= 1
        assert metrics["fitness/coverage"] == 1
    stopped = start(workdir, "stopped", model, task, judge__fitness="stop")
    base, first = stopped["rounds"]
    assert "which may be chance" in first["stopped"] and set(first["stages"]) == {
        "fitness", "evaluate",
    }  # fmt: skip


@pytest.mark.parametrize(
    "right, pairs, objection",
    [
        ([True] * 6 + [False] * 14, [(1.0, 0.0)] * 20, ""),
        ([True] * 19 + [False], [(1.0, 0.0)] * 18 + [(0.0, 1.0)] * 2, "and the policy in 95%"),
        ([False] * 20, [(1.0, 0.0)] * 11 + [(0.0, 1.0)] * 9, "in 55% of 20 cases, which may be"),
        ([False] * 20, [(0.5, 0.5)] * 20, "in 50% of 20 cases"),
        ([False] * 20, [(None, 0.5)] * 20, "no verdict on any of 20"),
        ([False] * 20, [(None, 0.5)] * 10 + [(0.9, 0.1)] * 10, ""),
    ],
)
def test_a_judge_is_fit_above_chance_and_not_below_the_policy(right, pairs, objection):
    found = measured(right, pairs)
    assert objection in found.objection and bool(objection) == bool(found.objection)


@pytest.mark.parametrize("weights, second", [("base", "base"), ("round:0", "round 0")])
def test_weights_of_another_round_can_judge(model, task, weights, second):
    more = {"roles__judge": {"weights": weights}}
    machinery = prepare(resolve(settings(model, task, **JUDGED | more)))
    history = ["base", "round 0", "round 1"]
    assert machinery.roles.inputs(["judge"], history[:1]) == {"role_judge": "base"}
    assert machinery.roles.inputs(["judge"], history) == {"role_judge": second}


def test_comparisons_rank_the_samples_of_a_prompt(rewarding, model, task):
    workdir, _, _ = rewarding
    more = {"judge__name": "pairwise", "filter__name": "best", "rounds": 1}
    summary = start(workdir, "ranked", model, task, **more)
    ((manifest, opinions, selection),) = rounds(workdir, summary)
    assert manifest.config["judge"] == "pairwise"
    assert set(selection.reasons) <= {
        "the best of its prompt", "not the best of its prompt", "no verdict", "did not end",
        "no better than the others",
    }  # fmt: skip
    known = ~np.isnan(opinions.score_S)
    assert known.any() and selection.kept_S.sum() <= 8
    assert all(
        reason in ("did not end", "nothing to compare it with")
        for reason, there in zip(opinions.reasons, known, strict=True)
        if not there
    )


def test_a_vote_and_a_verifier_judge_beside_a_model(rewarding, model, task):
    """Every sample's row has what each would say of it alone; only the model is measured."""
    workdir, plain, _ = rewarding
    more = {"judge__name": "ensemble", "judge__members": "rubric, vote*0.5, verifier"}
    summary = start(workdir, "mixed", model, task, **JUDGED | more | {"rounds": 1})
    ((manifest, opinions, _),) = rounds(workdir, summary)
    assert manifest.config["judge"] == "ensemble+verifier"
    assert all(name.startswith("ensemble+verifier-") for name in opinions.judges)
    store, gold = Store(str(workdir)), get_task(task)
    generated = store.manifest("generate", summary["rounds"][1]["stages"]["generate"])
    samples = Samples.from_table(_table(store, generated, SAMPLES_FILE))
    shares, right = vote(samples, gold, "samples").scores, verifier(samples, gold).scores
    ((_, rated, _), *_) = rounds(workdir, plain)
    assert 0 < samples.finished_S.sum() < len(samples) and len(set(shares)) > 2
    for i, criteria in enumerate(map(json.loads, opinions.criteria)):
        if not samples.finished_S[i]:
            assert opinions.reasons[i] == "did not end" and opinions.scores[i] is None
            continue
        assert (criteria["vote"], criteria["verifier"]) == (shares[i], right[i])
        assert criteria["rubric"] == pytest.approx(rated.scores[i], abs=1e-6)
        if shares[i] is not None:
            total = rated.scores[i] + shares[i] / 2 + right[i]
            assert opinions.scores[i] == pytest.approx(total / 2.5, abs=1e-6)
    one, other = (s["rounds"][1]["metrics"]["fitness/judge"] for s in (summary, plain))
    assert one == pytest.approx(other)


def test_an_endpoint_judges_and_what_it_does_not_say_is_missing(
    model, task, tmp_path, serve, capsys
):
    """A verdict that cannot be read drops its row and is counted; `stop` refuses to go on. How many
    calls it may take at most is said before."""
    server = serve(rules=[["Request: 1", "So so. Rating: 4"], ["Request: 2", "Rating: none"]])
    there = {"base_url": server.endpoint.base_url, "model": "small"}
    there |= {"input_price": 1.0, "cap": 1e-4}
    more = {"roles__judge": there, "judge__rationale": True, "rounds": 1}
    with pytest.raises(RunFailed, match="cap"):
        start(tmp_path, "poor", model, task, **more)
    assert "judge: warning: it may cost $0.0" in capsys.readouterr().err
    there["cap"] = 0.0  # the same run goes on
    summary = start(tmp_path, "poor", model, task, **more)
    line = re.search(r"all rounds: judge, 'small': up to (\d+) calls.*", capsys.readouterr().err)
    assert sum(server.stats()["answered"].values()) <= int(line[1]) == 3 * (8 * 8 + 2 * 10)
    assert "at most" in line[0] and "warning" not in line[0]
    ((_, opinions, selection),) = rounds(tmp_path, summary)
    known = ~np.isnan(opinions.score_S)
    assert known.any() and set(opinions.score_S[known]) == {0.75}
    assert (selection.kept_S == known).all()
    missing = [reason for reason in opinions.reasons if "no answer" in reason]
    assert missing and summary["rounds"][1]["metrics"]["no_verdict"] == len(missing)
    with pytest.raises(UserError, match="samples have no verdict .*no answer behind 'Rating:'"):
        start(tmp_path, "stopped", model, task, **more, filter__missing="stop")


def test_an_endpoint_judges_by_probabilities_if_it_has_any(model, task, tmp_path, serve):
    """One that has none is found before the first stage; one that is down may yet come back."""
    levels = [["Criterion", f" {level}", -9.0 + 8.0 * (level == 4)] for level in range(1, 6)]
    servers = serve(worths=levels), serve(echo="silent")
    able, silent = (
        JUDGED | {"roles__judge": {"base_url": s.endpoint.base_url, "model": "small"}, "rounds": 1}
        for s in servers
    )
    with pytest.raises(UserError, match="'config.roles.judge' is asked for log-probabilities"):
        start(tmp_path, "silent", model, task, **silent)
    assert not list(Store(str(tmp_path)).root.glob("store/*/*"))
    summary = start(tmp_path, "able", model, task, **able)
    ((_, opinions, _),) = rounds(tmp_path, summary)
    known = ~np.isnan(opinions.score_S)
    assert known.any() and np.allclose(opinions.score_S[known], 0.75, atol=0.01)
    servers[0].stop()
    assert start(tmp_path, "again", model, task, **able)["rounds"][1]["stages"]


CHAINED = {
    "generate__chain": "critique_revise",
    "generate__samples": 2,
    "filter__name": "none",
    "judge__name": "",
    "rounds": 1,
}


def test_a_chain_makes_the_completions_and_all_its_texts_are_kept(
    rewarding, model, task, serve, capsys
):
    """The policy drafts and revises by its weights of the round, a critic elsewhere finds fault."""
    workdir, plain, _ = rewarding
    server = serve(rules=[["Where does the reply fall short", "Say it in one word."]])
    there = {"base_url": server.endpoint.base_url, "model": "small"}
    summary = start(workdir, "chained", model, task, **CHAINED, roles__critic=there)
    store = Store(str(workdir))
    manifest = store.manifest("generate", summary["rounds"][1]["stages"]["generate"])
    assert manifest.inputs["role_policy"]["key"] == plain["rounds"][0]["stages"]["import"]
    samples = ChainSamples.from_table(_table(store, manifest, SAMPLES_FILE))
    assert len(samples) == 16 and len(set(samples.completions)) > 8
    for i, steps in enumerate(map(json.loads, samples.steps)):
        assert [step["role"] for step in steps] == ["policy", "critic", "policy"]
        # Asked as in every other round: with the examples, and the question in its format.
        assert steps[0]["prompt"].endswith(f"Q: {samples.prompts[i]}\nA:")
        assert steps[0]["prompt"].count("Q: ") == 3
        assert steps[1]["text"] == "Say it in one word." and steps[1]["text"] in steps[2]["prompt"]
        assert samples.completions[i] == f" {steps[2]['text'].strip()}"
        assert samples.finished_S[i] == ("cut" not in steps[2] and len(samples.tokens[i]) < 40)
    calls = server.stats()["answered"]
    assert "all rounds: critic, 'small': up to 16 calls" in capsys.readouterr().err
    start(workdir, "again", model, task, **CHAINED, roles__critic=there)
    assert server.stats()["answered"] == calls


@pytest.mark.parametrize(
    "more, message",
    [
        (CHAINED | {"generate__chain": "critic_revise"}, "did you mean 'critique_revise'"),
        (CHAINED | {"generate__top_k": 5}, "leave 'top_k' and 'min_p' at 0"),
        (CHAINED | {"roles__critik": {"weights": "base"}}, "did you mean 'critic'"),
        ({"judge__name": ""}, "'config.judge.name' says nobody's"),
        ({"filter__name": "none"}, "reads no judge"),
        ({"filter__name": "vote"}, "reads the judge 'vote'"),
        ({"roles__jugde": {"weights": "base"}}, "did you mean 'judge'"),
        ({"roles__debater": {"weights": "base"}}, "asked by nothing"),
        ({"roles__judge": {"weights": "last"}}, "write policy, base, round:N, or reward"),
        ({"roles__judge": {}}, "wants a model"),
        ({"roles__judge": {"weights": "base", "cap": 1.0}}, "wants a model"),
        ({"roles__judge": {"weights": "base", "path": "x"}}, "those of a loop"),
        (
            {"roles__judge": {"base_url": "http://localhost/v1", "model": "m", "chat": "yes"}},
            "to be asked as a chat",
        ),
        ({"judge__name": "constitution", "judge__principles": 99}, "has 10"),
    ],
)
def test_mistakes_are_named_before_anything_is_compiled(model, task, more, message):
    with pytest.raises(UserError, match=message):
        prepare(resolve(settings(model, task, **JUDGED | more)))


def test_a_policy_from_scratch_judges_nobody():
    with pytest.raises(UserError, match="reads the characters of its task alone"):
        prepare(resolve({"filter": {"name": "threshold"}, "judge": {"name": "rubric"}}))
