"""The entry point as a user meets it: what a run leaves behind, and how mistakes end it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=tests/tiny.py"


def run(*arguments: str, config: str = CONFIG) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", config, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    result = run(f"--workdir={workdir}", "--run_name=r")
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_run_leaves_what_the_readme_promises(finished):
    workdir, result = finished
    summary = json.loads((workdir / "runs/r/summary.json").read_text())
    assert summary["run"] == "r"
    assert summary["complete"]
    assert [r["round"] for r in summary["rounds"]] == [-1, 0, 1]
    assert len(summary["params_sha256"]) == 64
    assert summary["seconds"] > 0
    assert 1e8 < summary["peak_host_bytes"] < 1e11
    for entry in summary["rounds"]:
        assert set(entry["evals"]) >= {"reverse_addition/2/exact_match", "reverse_addition/2/nll"}
        for stage, key in entry["stages"].items():
            assert (workdir / "store" / stage / key / "manifest.json").exists()
    metrics = summary["rounds"][1]["metrics"]
    assert {"yield", "label_precision", "mean_length", "entropy", "distinct_answers"} <= set(
        metrics
    )
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "accuracy.png",
        "accuracy.txt",
    ):
        assert (workdir / "runs/r" / name).stat().st_size > 0
    assert list((workdir / "runs/r/tensorboard").glob("events.*"))
    assert "exact_match by difficulty" in result.stdout
    assert "round 1 (2 of 2)  train" in result.stderr


def test_the_log_has_every_step_once_and_names_its_round(finished):
    lines = (finished[0] / "runs/r/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(30))
    assert [row["round"] for row in rows if row["kind"] == "eval"] == [-1, 0, 1]


def test_a_finished_run_is_found_again_and_may_grow_by_rounds(finished):
    workdir, _ = finished
    before = json.loads((workdir / "runs/r/summary.json").read_text())
    again = run(f"--workdir={workdir}", "--run_name=r", "--config.rounds=3")
    assert again.returncode == 0
    assert "warmup  reused" in again.stderr
    after = json.loads((workdir / "runs/r/summary.json").read_text())
    assert len(after["rounds"]) == 4
    for old, new in zip(before["rounds"], after["rounds"], strict=False):
        assert old["stages"] == new["stages"]


def test_another_config_under_the_same_name_is_refused(finished):
    result = run(f"--workdir={finished[0]}", "--run_name=r", "--config.train.steps=11")
    assert result.returncode == 2
    assert "train.steps: 10 there, 11 now" in result.stderr
    assert "--run_name" in result.stderr


def test_dry_run_prints_the_resolved_config_and_touches_nothing(tmp_path):
    workdir = tmp_path / "w"
    result = run(f"--workdir={workdir}", "--dry_run", "--config.seed=7")
    assert result.returncode == 0
    assert json.loads(result.stdout)["seed"] == 7
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.trian.steps=3"], "unknown key 'config.trian': did you mean 'train'?"),
        (["--config.train.steps=many"], "wants int, got 'many'"),
        (["--config.generate.prompts=0"], "must be at least 1, got 0"),
        (["--config.mesh.data=64"], "needs 64 devices"),
        (["--config.model.max_length=10", "--config.train.row_length=8"], "max_length"),
        (["--config.task.name=revrse"], "unknown task 'revrse'"),
        (["--config.filter.name=verifer"], "did you mean 'verifier'"),
        (["--workdir=/proc/nowhere"], "cannot write to the workdir '/proc/nowhere'"),
        (["--wrkdir=x"], "wrkdir"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_ends_with_a_message_and_code_2(tmp_path, arguments, message):
    result = run(f"--workdir={tmp_path}", *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_config_file_is_a_mistake(tmp_path):
    result = run(f"--workdir={tmp_path}", config="--config=configs/no_such.py")
    assert result.returncode == 2
    assert "no config file 'configs/no_such.py'" in result.stderr


@pytest.mark.parametrize(
    ("decision", "rounds", "trained"),
    [
        ("stop", 2, False),
        pytest.param("skip", 3, False, marks=pytest.mark.slow),
        ("train", 3, True),
    ],
)
def test_a_filter_that_keeps_nothing_stops_skips_or_trains_on_earlier_data(
    tmp_path, decision, rounds, trained
):
    result = run(
        f"--workdir={tmp_path}",
        "--run_name=r",
        "--config.filter.name=discard",
        f"--config.filter.on_empty={decision}",
    )
    assert result.returncode == 0, result.stderr
    assert "round 0: the filter 'discard' kept nothing" in result.stderr
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert len(summary["rounds"]) == rounds
    assert ("train" in summary["rounds"][1]["stages"]) == trained
    assert ("stopped" in summary["rounds"][1]) == (decision == "stop")


def test_a_loss_that_is_not_a_number_stops_and_names_step_and_batch(tmp_path):
    arguments = [f"--workdir={tmp_path}", "--run_name=r"]
    diverging = ["--config.train.optimizer.learning_rate=1e30"]
    result = run(*arguments, *diverging)
    assert result.returncode == 1
    assert "nan at step" in result.stderr
    assert "clip_norm" in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "store/warmup").glob("*/params.safetensors"))
    mended = run(f"--workdir={tmp_path}", "--run_name=mended")
    assert mended.returncode == 0
    assert "warmup  reused" in mended.stderr
