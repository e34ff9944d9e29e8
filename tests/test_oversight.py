"""Monitors on hand-made samples, and held-out measurement against its own answers."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from karploop import launch
from karploop.data.problems import is_held_out
from karploop.data.tasks import get_task
from karploop.oversight.watch import round_metrics
from karploop.records import Samples, Selection
from karploop.resolve import resolve

REVERSE = get_task("reverse")


def test_round_metrics_by_hand():
    samples = Samples(
        prompt_id_S=np.array([0, 0, 1, 1]),
        sample_S=np.array([0, 1, 0, 1]),
        member_S=np.zeros(4, int),
        difficulty_S=np.array([2, 2, 3, 3]),
        prompts=["12=", "12=", "123=", "123="],
        completions=["21", "21", "321", "32"],
        finished_S=np.array([True, True, True, False]),
        tokens=[[1, 1, 2], [1, 1, 2], [1, 1, 1, 2], [1, 1]],
        logprobs=[[0.0]] * 4,
        entropy_S=np.array([0.0, 1.0, 1.0, 2.0]),
    )
    selection = Selection(kept_S=np.array([True, False, False, False]), reasons=["x"] * 4)
    metrics = dict(round_metrics(samples, selection, REVERSE))
    assert metrics["yield"] == 0.25
    assert metrics["label_precision"] == 1.0
    assert metrics["sample_accuracy"] == 0.75
    assert metrics["finished"] == 0.75
    assert metrics["mean_length"] == 3.0
    assert metrics["entropy"] == 1.0
    assert metrics["distinct_answers"] == 0.75
    assert metrics["yield/2"] == 0.5
    assert np.isnan(metrics["label_precision/3"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("w")
    settings = tiny.get_config()
    settings.update(
        {"mesh": {"data": 1}, "task": {"name": "copy"}, "warmup": {"steps": 60, "rows": 8}}
    )
    launch.launch(resolve(settings.to_dict()), str(workdir), "r")
    return workdir, json.loads((workdir / "runs/r/summary.json").read_text())


def test_exact_match_is_the_share_of_answers_that_gold_accepts(run):
    workdir, summary = run
    task = get_task("copy")
    for entry in summary["rounds"]:
        key = entry["stages"]["evaluate"]
        answers = pq.read_table(workdir / "store/evaluate" / key / "answers.parquet").to_pylist()
        for difficulty in (1, 2):
            rows = [a for a in answers if task.difficulty(a["prompt"]) == difficulty]
            if not rows:
                continue
            accepted = np.mean([task.verify(a["prompt"], a["answer"]) for a in rows])
            assert entry["evals"][f"copy/{difficulty}/exact_match"] == pytest.approx(accepted)
            nll = np.mean([a["nll"] for a in rows])
            assert entry["evals"][f"copy/{difficulty}/nll"] == pytest.approx(nll)


def test_no_held_out_problem_is_ever_trained_on_or_sampled(run):
    workdir, _ = run
    task = get_task("copy")
    for name in ("seed/*/examples.parquet", "filter/*/examples.parquet"):
        for path in (workdir / "store").glob(name):
            prompts = pq.read_table(path, columns=["prompts"])["prompts"].to_pylist()
            assert prompts
            assert not any(is_held_out(task, p, 0.1) for p in prompts)
    for path in (workdir / "store/held_out").glob("*/held_out.parquet"):
        prompts = pq.read_table(path)["prompts"].to_pylist()
        assert all(is_held_out(task, p, 0.1) for p in prompts)


def test_nothing_that_selects_or_trains_reads_gold(run):
    """By the manifests: held-out sets go to no judge or filter, the log's numbers go nowhere."""
    workdir, _ = run
    readers = {}
    for path in (workdir / "store").glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        for source in manifest["inputs"].values():
            readers.setdefault(source["stage"], set()).add(manifest["stage"])
    assert readers["held_out"] == {"evaluate", "prompts"}  # which drop what repeats them
    assert readers["seed"] == {"warmup", "train"}
    assert "watch" not in readers
    assert "evaluate" not in readers
