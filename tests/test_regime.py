"""What rounds train on and start from, and when the loop has had enough."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import config, start
from hypothesis import given
from hypothesis import strategies as st

from karploop.catalogue import Run
from karploop.config import RegimeConfig, TrainConfig
from karploop.errors import UserError
from karploop.loop import plateau
from karploop.reporting.comparison import metric_value
from karploop.retention import Policy, _chosen_rounds
from karploop.training.mixture import draw_weights


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Runs of several regimes in one store, each of two rounds."""
    folder = tmp_path_factory.mktemp("regimes")
    for name, changes in {
        "accumulate": {},
        "replace": {"regime__data": "replace", "regime__seed_share": "0"},
        "budget": {"regime__data": "budget", "regime__budget": "3"},
        "own": {"regime__data": "budget", "regime__budget": "3", "regime__seed_share": "0.5"},
        "base": {"regime__start": "base"},
        "scratch": {"regime__start": "scratch"},
        "keep": {"regime__optimizer": "keep"},
    }.items():
        start(folder, "plain", name, **changes)
    return folder


def trained(workdir, name):
    """Of each round's training: its folder and its manifest."""
    summary = json.loads((workdir / f"runs/{name}/summary.json").read_text())
    keys = [r["stages"]["train"] for r in summary["rounds"] if "train" in r["stages"]]
    folders = [workdir / "store/train" / key for key in keys]
    assert len(folders) == 2
    return [(f, json.loads((f / "manifest.json").read_text())) for f in folders]


def sources(folder):
    """Where the rows came from that were trained on, with how many different ones."""
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    return {s: sum(r["source"] == s for r in rows) for s in {r["source"] for r in rows}}


def test_accumulate_trains_on_all_rounds_and_replace_on_the_last(workdir):
    (_, _), (second, _) = trained(workdir, "accumulate")
    assert "seed" in sources(second) and len(sources(second)) == 3
    (first, _), (second, manifest) = trained(workdir, "replace")
    assert len(sources(first)) == len(sources(second)) == 1
    assert "seed" not in sources(second) and sources(first) != sources(second)
    assert [name for name in manifest["inputs"] if name.startswith("kept")] == ["kept_0"]


def test_budget_draws_so_many_rows_of_all_rounds(workdir):
    for folder, _ in trained(workdir, "budget"):
        assert 0 < sum(sources(folder).values()) <= 3, "labelled rows count as any other"
    for folder, _ in trained(workdir, "own"):
        drawn = {s: count for s, count in sources(folder).items() if s != "seed"}
        assert 0 < sum(drawn.values()) <= 3 < sources(folder)["seed"]


def test_a_round_starts_from_the_base_or_goes_on(workdir):
    summary = json.loads((workdir / "runs/base/summary.json").read_text())
    warmup = summary["rounds"][0]["stages"]["warmup"]
    for name, starts in {"base": [True, True], "accumulate": [True, False]}.items():
        inputs = [manifest["inputs"]["params"] for _, manifest in trained(workdir, name)]
        assert [warmup in json.dumps(given) for given in inputs] == starts


def test_from_scratch_no_round_starts_from_earlier_parameters(workdir):
    (first, one), (second, other) = trained(workdir, "scratch")
    assert "params" not in one["inputs"] and "params" not in other["inputs"]
    assert one["rng"]["round"] != other["rng"]["round"]  # other fresh ones in each
    (base, _), _ = trained(workdir, "base")
    assert sources(first) == sources(base)
    params = [(folder / "params.safetensors").read_bytes() for folder in (first, base)]
    assert params[0] != params[1]


def test_moments_are_handed_on_where_they_are_kept(workdir):
    (first, _), (second, _) = trained(workdir, "keep")
    (other, _), (reset, _) = trained(workdir, "accumulate")
    assert (second / "optimizer.safetensors").is_file()
    assert not (reset / "optimizer.safetensors").exists()

    def params(folder):
        return (folder / "params.safetensors").read_bytes()

    assert params(first) == params(other), "the first round has nothing to go on with"
    assert params(second) != params(reset)


def test_an_interrupted_run_that_keeps_moments_ends_the_same(workdir, tmp_path):
    start(tmp_path, "plain", "keep", regime__optimizer="keep", rounds="1")
    start(tmp_path, "plain", "keep", regime__optimizer="keep")
    ends = [
        json.loads((folder / "runs/keep/summary.json").read_text())["params_sha256"]
        for folder in (workdir, tmp_path)
    ]
    assert ends[0] == ends[1]


def test_a_plateau_ends_the_loop(tmp_path):
    start(tmp_path, "plain", "r", regime__patience="1", regime__min_gain="1", rounds="3")
    rounds = json.loads((tmp_path / "runs/r/summary.json").read_text())["rounds"]
    assert [r["round"] for r in rounds] == [-1, 0]
    assert "has not risen by more than 1 in 1 rounds" in rounds[-1]["stopped"]


def test_every_so_many_rounds_are_measured_and_the_last(tmp_path):
    """What looks at a run copes: patience, garbage collection, table and picture."""
    start(tmp_path, "plain", "r", evaluate__every="2", rounds="3", regime__patience="2")
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    rounds = summary["rounds"]
    measured = [r["round"] for r in rounds if r["evals"]]
    assert measured == [-1, 1, 2]
    assert [r["round"] for r in rounds if "evaluate" in r["stages"]] == measured
    assert "has not risen" in rounds[-1]["stopped"] or not rounds[-1].get("stopped")
    table = (tmp_path / "runs/r/accuracy.txt").read_text()
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["base", "1", "2"]
    assert (tmp_path / "runs/r/accuracy.png").is_file()
    assert metric_value(summary, "reverse_addition/*/exact_match@0") is None
    assert metric_value(summary, "reverse_addition/*/exact_match") is not None
    run = Run("r", {"retention": {"last": 1, "best": 3}}, summary)
    assert set(_chosen_rounds(run, Policy())) == {-1, 1, 2}, "of those measured the best"


@pytest.mark.parametrize(
    ("scores", "patience", "gain", "ends"),
    [
        ([0.1, 0.2, 0.3], 1, 0.0, False),
        ([0.1, 0.2, 0.2], 1, 0.0, True),
        ([0.1, 0.2, 0.2], 2, 0.0, False),
        ([0.3, 0.2, 0.3, 0.3], 2, 0.0, True),
        ([0.3, 0.2, 0.34], 2, 0.05, True),
        ([0.3], 2, 0.0, False),
        ([0.3, None, None], 2, 0.0, False),
        ([0.3, 0.3, 0.3], 0, 0.0, False),
    ],
)
def test_plateaus(scores, patience, gain, ends):
    assert bool(plateau(scores, RegimeConfig(patience=patience, min_gain=gain))) is ends


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), st.floats(0.1, 0.5))
def test_groups_get_their_share_of_draws(rest, seed, newest, share):
    group_N = np.repeat([0, 1, 2], [rest, seed, newest])
    groups = [(group_N == 1, share), (group_N == 2, 0.3)]
    difficulty_N = np.arange(1, len(group_N) + 1)
    weights_N = draw_weights(difficulty_N, TrainConfig(mixing="by_difficulty"), *groups)
    if not (seed or newest):
        assert np.allclose(weights_N, weights_N[0] * difficulty_N / difficulty_N[0])
        return
    found = [weights_N[group_N == g].sum() / weights_N.sum() for g in (1, 2)]
    assert np.allclose(found, [share * bool(seed), 0.3 * bool(newest)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime__seed_share": "-0.5"}, "seed_share' is -0.5"),
        ({"regime__seed_share": "0.7", "train__newest_share": "0.4"}, "more than all draws"),
        ({"regime__optimizer": "keep", "regime__start": "base"}, "leave it at reset"),
        ({"regime__optimizer": "keep", "regime__start": "scratch"}, "leave it at reset"),
        ({"regime__start": "scratch", "train__lora__rank": "2"}, "is trained further"),
        ({"regime__start": "scratch", "objective__name": "kto"}, "improves parameters that sample"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config("plain", **changes)
