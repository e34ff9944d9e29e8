"""Two processes of four devices, then four of two: the entry point itself, stopped, resumed, and
compared.

They share one workdir. Parameters are split over the devices, so that no process holds them whole.
What they are compared with runs in this process meanwhile, on one device.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from karploop import cli, launch, loop
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.reporting.progress import Progress
from karploop.stages import Stages
from karploop.store import Store
from karploop.training.train import STEPS_FILE

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 240  # a hang fails here; the whole takes about a minute on two busy cores
CONFIG = "tests/tiny.py"
SETTINGS = {"rounds": "1", "generate.prompts": "32", "generate.temperature": "0"}


def start(workdir, *arguments, devices=4):
    command = [sys.executable, "-m", "experiments.run", f"--config={CONFIG}", "--run_name=r"]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(workdir, processes=2, mesh=(1, 4, 2)):
    """Processes of one run, with eight devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    common = [f"--config.mesh.{axis}={size}" for axis, size in axes]
    common += [f"--coordinator_address={address}", f"--num_processes={processes}"]
    return [
        start(workdir, *common, f"--process_id={index}", devices=8 // processes)
        for index in range(processes)
    ]


def finish(processes):
    """(exit code, stdout, stderr) of each process."""
    deadline = time.monotonic() + SECONDS
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def ours(stdout):
    """What is left without the words of the CPU collectives, whose threads write in between one
    another's: where numbers and spaces stand means nothing."""
    words = r"\[Gloo\]Rank|isconnectedto|peerranks|\.|Expectednumberofconnected|is:"
    return re.sub(words, "", re.sub(r"\d+|\s+", "", stdout))


def said(stderr):
    """The words of a log without the compiler's, which from jax 0.11 on tells how it reshards."""
    lines = stderr.splitlines()
    return " ".join(line for line in lines if "spmd_partitioner" not in line).split()


def summary(workdir):
    return json.loads((workdir / "runs/r/summary.json").read_text())


def run_here(workdir):
    """The same run on one device of this process: its rounds, and how much each compiled."""
    config = cli.load_config(str(ROOT / CONFIG), SETTINGS | {"mesh.data": "1"})
    store = Store(str(workdir))
    store.open()
    rounds, compiled = [], [0]

    def count(event, seconds, **_):
        compiled[-1] += event == "/jax/core/compile/backend_compile_duration"

    def after_round(done):
        rounds.append(done)
        compiled.append(0)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        loop.run(prepare(config), Stages(store, Progress(quiet=True)), after_round)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return rounds, compiled[:-1]


def losses(rounds):
    """Of each training step, over all stages."""
    stages = [r.stages.get("warmup") or r.stages["train"] for r in rounds]
    return [loss for stage in stages for loss in stage.table(STEPS_FILE)["loss"].to_pylist()]


def logged_losses(workdir):
    rows = map(json.loads, (workdir / "runs/r/metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def wait_for_checkpoint(workdir, process):
    """Returns when a checkpoint of the warm-up is being written."""
    deadline = time.monotonic() + SECONDS
    while not list(workdir.glob("partial/warmup/*/checkpoints/*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_stop_resume_on_another_mesh_and_compute_what_one_does(tmp_path):
    """Losses to a relative 1e-5, held-out likelihoods to 1e-4, greedy answers exactly."""
    two = tmp_path / "several"
    pair = start_all(two)
    expected, compiled = run_here(tmp_path / "one")
    assert compiled[0] > 0 and compiled[1:] == [0], "a run compiles each program once"
    wait_for_checkpoint(two, pair[0])
    pair[1].send_signal(signal.SIGTERM)  # one process is asked, both stop
    (code_0, _, log_0), (code_1, out_1, log_1) = finish(pair)
    assert (code_0, code_1) == (0, 0), log_0 + log_1
    assert "stopped; resume with" in log_0
    assert ours(out_1) == "" and said(log_1) == "stopping after the current chunk …".split()
    assert not (two / "runs/r/summary.json").exists() or not summary(two)["complete"]

    (code_0, out_0, log_0), *others = finish(start_all(two, processes=4, mesh=(2, 2, 2)))
    assert code_0 == 0 and not any(code for code, _, _ in others), log_0 + others[0][2]
    assert "exact_match by difficulty" in out_0 and "round 0 (1 of 1)  train" in log_0
    assert ours(out_0), "it says something"
    for _, out, log in others:
        assert (ours(out), said(log)) == ("", []), "only the main process speaks"
    assert not any(path.is_file() for path in (two / "tmp").rglob("*"))

    assert summary(two)["complete"]
    assert len(logged_losses(two)) == 20
    assert logged_losses(two) == pytest.approx(losses(expected), rel=1e-5)
    for got, here in zip(summary(two)["rounds"], expected, strict=True):
        assert got["evals"] == pytest.approx(here.evals, abs=1e-4)
        assert got["metrics"] == pytest.approx(got["metrics"] | here.metrics, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_no_process_waits_for_a_dead_one(tmp_path, victim):
    pair = start_all(tmp_path)
    wait_for_checkpoint(tmp_path, pair[0])
    pair[victim].kill()
    killed = time.monotonic()
    code, _, log = finish(pair)[1 - victim]
    assert code not in (0, -signal.SIGKILL), "it must end by itself, and not well"
    assert time.monotonic() - killed < 120, "the runtime misses a process's heartbeats after 100 s"
    assert "another process of this run has ended" in log
    assert "goes on from there" in log and "Traceback" not in log


def test_a_cluster_that_is_not_there_is_a_users_mistake():
    with pytest.raises(UserError, match="cannot join the other processes.*--coordinator_address"):
        launch.join_cluster(None, None, None)
