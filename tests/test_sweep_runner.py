"""The sweep runner, with a stand-in for the run command."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from experiments.sweep import run_sweep
from karploop.errors import UserError
from karploop.reporting.arms import read_arms, report, shared_time
from karploop.sweeps import ROOT, Arm, Sweep, name_arms, over

# A run that takes its stage costs from its overrides: `warmup` is shared by all arms, `train` is
# its own. It fails, is slow or ends early where an override says so.
FAKE_RUN = textwrap.dedent("""
    import json, pathlib, signal, sys, time
    workdir, run, overrides = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    with open(workdir / "calls", "a") as calls:
        calls.write(run + "\\n")
    if overrides.get("fail") and not (workdir / "mended").exists():
        sys.exit("out of memory")
    if overrides.get("slow"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # stops in good order
        time.sleep(60)
    stages = {("warmup.1", "w"): 100.0, ("train", "t-" + run): overrides["train"]}
    for (stage, key), seconds in stages.items():
        path = workdir / "provenance" / stage.partition(".")[0] / (key + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": seconds}))
    rounds = [{"round": i - 1, "evals": {}, "metrics": {}, "stages": {s: k}}
              for i, (s, k) in enumerate(stages)]
    path = workdir / "runs" / run / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"run": run, "rounds": rounds, "complete": True}))
""")


def fake_command(sweep, arm, workdir):
    arguments = [str(workdir), sweep.run_name(arm), json.dumps(arm.overrides)]
    return [sys.executable, "-S", "-c", FAKE_RUN, *arguments]


def make_sweep(entries) -> Sweep:
    return Sweep(config="configs/tiny.py", arms=name_arms(entries), title="Fakes", name="fakes")


def run(sweep, workdir, **options):
    return run_sweep(sweep, workdir, command=fake_command, **options)


def calls(workdir) -> list[str]:
    return (workdir / "calls").read_text().split()


def statuses(workdir) -> dict[str, str]:
    return {record.name: record.status for record in read_arms(workdir, "fakes")["arms"]}


def test_a_failing_arm_is_recorded_and_the_rest_run_then_mended(tmp_path):
    sweep = make_sweep([{"train": 1.0}, {"train": 2.0, "fail": True}, {"train": 3.0}])
    said = []
    outcome = run(sweep, tmp_path, say=said.append)
    names = [arm.name for arm in sweep.arms]
    assert outcome.failed == [names[1]] and not outcome.stopped
    assert statuses(tmp_path) == dict(zip(names, ["done", "failed", "done"], strict=True))
    record = read_arms(tmp_path, "fakes")["arms"][1]
    assert record.exit_code == 1 and record.overrides == {"train": 2.0, "fail": True}
    with open(record.log) as log:
        assert "out of memory" in log.read()
    assert "    out of memory" in said, "why it failed is shown at once"

    (tmp_path / "mended").touch()
    outcome = run(sweep, tmp_path, only="fail", say=said.append)
    assert outcome.failed == []
    assert set(statuses(tmp_path).values()) == {"done"}
    assert calls(tmp_path) == [sweep.run_name(sweep.arms[i]) for i in (0, 1, 2, 1)]


def test_time_saved_counts_shared_stages_once(tmp_path):
    sweep = make_sweep(over("train", [1.0, 2.0, 4.0]))
    outcome = run(sweep, tmp_path, jobs=3)
    time_ = shared_time(tmp_path, [record.run for record in outcome.records])
    assert (time_.apart, time_.together, time_.saved) == (307.0, 107.0, 200.0)
    assert time_.unknown == 0
    shown = report(outcome.records, time_)
    assert "stage time: 1m47s; arm by arm it would have been 5m07s: sharing saved 3m20s (65%)" in (
        shown
    )
    (tmp_path / "provenance/warmup/w.json").unlink()
    time_ = shared_time(tmp_path, [record.run for record in outcome.records] + ["never-run"])
    assert (time_.apart, time_.together, time_.unknown) == (7.0, 7.0, 1)


def test_a_signal_stops_the_arm_and_the_sweep_and_running_again_resumes(tmp_path):
    sweep = make_sweep([{"train": 1.0}, {"train": 2.0, "slow": True}, {"train": 3.0}])
    script = textwrap.dedent(f"""
        import pathlib, test_sweep_runner
        sweep = test_sweep_runner.make_sweep({[arm.overrides for arm in sweep.arms]!r})
        outcome = test_sweep_runner.run(sweep, pathlib.Path({str(tmp_path)!r}))
        raise SystemExit(7 if outcome.stopped else 0)
    """)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}
    )
    deadline = time.monotonic() + 30
    log = tmp_path / "calls"
    while not (log.exists() and len(calls(tmp_path)) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the arm is past its first line; let it set its handler
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7
    assert list(statuses(tmp_path).values()) == ["done", "interrupted", "pending"]
    assert len(calls(tmp_path)) == 2, "no arm was started after the signal"
    outcome = run(sweep, tmp_path, only="train=3")
    assert [record.status for record in outcome.records] == ["done", "interrupted", "done"]


def test_an_arm_that_stops_of_itself_is_not_done(tmp_path):
    sweep = make_sweep([{"train": 1.0}])
    stopped = run_sweep(sweep, tmp_path, command=lambda *_: [sys.executable, "-S", "-c", "pass"])
    assert [record.status for record in stopped.records] == ["interrupted"]


def test_records_of_changed_arms_are_void(tmp_path):
    first = make_sweep([{"train": 1.0}])
    run(first, tmp_path)
    changed = Sweep("configs/tiny.py", [Arm("train=1.0", {"train": 9.0})], "Fakes", name="fakes")
    other = name_arms([{"train": 5.0}])
    both = Sweep("configs/tiny.py", [*changed.arms, *other], "Fakes", name="fakes")
    outcome = run(both, tmp_path, only="train=5")
    assert [record.status for record in outcome.records] == ["pending", "done"]


def test_only_must_fit_some_arm(tmp_path):
    with pytest.raises(UserError, match="its arms are train=1"):
        run(make_sweep([{"train": 1}]), tmp_path, only="vote")


def test_unknown_sweep_in_a_workdir_names_those_there(tmp_path):
    run(make_sweep([{"train": 1}]), tmp_path)
    with pytest.raises(UserError, match="those run there are fakes"):
        read_arms(tmp_path, "fake")
