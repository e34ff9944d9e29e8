"""A run that was interrupted, however and wherever, ends as one that was not: to the byte.

Each test compares the whole `store/` tree, the hash of the parameters and the metrics with those of
one uninterrupted run. `faults.py` picks the moments by what the process is about to write.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import ROOT, Fault, Loop, Outcome, finish, leftovers

STAGES = (  # in the order of the loop
    "held_out", "seed", "warmup", "evaluate", "prompts", "generate", "filter", "watch", "train",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Outcome:
    workdir = tmp_path_factory.mktemp("reference") / "workdir"
    finish(workdir)
    assert not leftovers(workdir)
    outcome = Outcome.of(workdir)
    assert {name.split("/")[0] for name in outcome.store} == set(STAGES)
    return outcome


def check(workdir: pathlib.Path, reference: Outcome) -> None:
    reference.check(Outcome.of(workdir))
    assert not leftovers(workdir)


# -- kill -9 -----------------------------------------------------------------------------------


def through_the_loop(rng: random.Random) -> list[Fault]:
    """A kill in every stage in turn: as it commits, or in the chunks and checkpoints before."""

    def commit(stage: str) -> Fault:
        return Fault("kill", rng.choice([
            rf"^os.rename tmp/\S+ store/{stage}/",  # all is written, nothing is committed
            rf"^shutil.rmtree partial/{stage}/",  # committed, the chunks not yet removed
            rf"^os.remove locks/{stage}-",  # all done but for the lock
            rf"^os.rename \S+ provenance/{stage}/",
            rf"^open tmp/\S+ store/{stage}/manifest|^open tmp/\S+/manifest.json",
        ]))  # fmt: skip

    faults = []
    for stage in STAGES:
        if stage in ("warmup", "train"):
            faults.append(Fault("kill", rf"partial/{stage}/\S+checkpoints/", rng.randint(1, 70)))
        if stage == "generate":
            faults.append(Fault("kill", r"partial/generate/\S+chunk-", rng.randint(2, 8)))
        faults.append(commit(stage))
    return [*faults, Fault("kill", "^open runs/|^os.rename runs/", rng.randint(1, 12))]


def anywhere(rng: random.Random, count: int) -> list[Fault | float]:
    """Kills before the n-th write of a process, or after so many seconds of its work."""
    return [
        Fault("kill", ".", rng.randint(1, 160)) if rng.random() < 0.5 else rng.uniform(0.0, 4.0)
        for _ in range(count)
    ]


def kill_at(moment: Fault | float, workdir: pathlib.Path) -> bool:
    """Runs a loop until the moment has come; whether it came before the end."""
    if isinstance(moment, Fault):
        loop = Loop(workdir, fault=moment)
    else:
        loop = Loop(workdir)
        lock = workdir / "locks" / "run-run-0"

        def at_work() -> bool:
            """It has its lock, or is at its end already."""
            try:
                return f"process {loop.pid} " in lock.read_text()
            except FileNotFoundError:
                return loop.process.poll() is not None

        loop.wait_until(at_work)
        try:
            loop.process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            loop.process.kill()
    code = loop.wait()
    assert code in (0, -signal.SIGKILL), f"{moment}: exit code {code}\n{loop.stderr}"
    return code != 0


def killed_again_and_again(workdir: pathlib.Path, moments, reference: Outcome) -> int:
    """Kills one loop at each moment, resuming in between; a finished one is begun anew.

    Returns how often it was killed.
    """
    kills = 0
    for moment in moments:
        if kill_at(moment, workdir):
            kills += 1
        else:
            check(workdir, reference)
            shutil.rmtree(workdir)
    finish(workdir)
    check(workdir, reference)
    return kills


def kills(tmp_path: pathlib.Path, reference: Outcome, wanted: int, seed: int, step: int = 1) -> int:
    """Two loops at a time: one killed in every `step`-th stage in turn, one anywhere."""
    rng = random.Random(seed)
    done, lap = 0, 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        while done < wanted:
            orderly = through_the_loop(rng)[::step]
            share = min(wanted - done, 34) - len(orderly)
            lists = [orderly, anywhere(rng, max(share, 1))]
            victims = [
                pool.submit(killed_again_and_again, tmp_path / f"{lap}-{i}" / "w", list_, reference)
                for i, list_ in enumerate(lists)
            ]
            counts = [victim.result() for victim in victims]
            assert counts[0] == len(orderly), "a stage was passed without a kill in it"
            done, lap = done + sum(counts), lap + 1
    return done


def test_killed_at_eight_moments(tmp_path, reference):
    assert kills(tmp_path, reference, wanted=8, seed=0, step=2) >= 8


@pytest.mark.slow
def test_killed_at_two_hundred_moments(tmp_path, reference):
    assert kills(tmp_path, reference, wanted=200, seed=1) >= 200


# -- SIGTERM -----------------------------------------------------------------------------------


def test_sigterm_ends_well_and_the_printed_command_resumes(tmp_path, reference):
    workdir = tmp_path / "workdir"
    for where, kept in (
        (r"partial/warmup/\S+/checkpoints/3", "partial/warmup/*/checkpoints/3/sha256.json"),
        (r"partial/generate/\S+chunk-", "partial/generate/*/chunk-*"),
    ):
        loop = Loop(workdir, fault=Fault("stop", where))
        assert loop.wait() == 0, loop.stderr
        assert "Traceback" not in loop.stderr
        assert list(workdir.glob(kept)), "the chunk under way was not finished"
        assert not list((workdir / "tmp").iterdir())
    program, *arguments = shlex.split(re.search("resume with: (.*)", loop.stderr)[1])
    assert program == "python"
    resumed = Loop(workdir, command=[sys.executable, *arguments])
    assert resumed.wait() == 0, resumed.stderr
    check(workdir, reference)


# -- a full disk -------------------------------------------------------------------------------


def ended_for_want_of_space(loop: Loop) -> None:
    assert loop.wait() == 1, loop.stderr
    assert "error: the disk is full" in loop.stderr
    assert f'File "{ROOT}/karploop' not in loop.stderr  # tensorstore's threads print tracebacks


def test_full_disk(tmp_path, reference):
    workdir = tmp_path / "workdir"
    for where in (
        r"checkpoints/6.orbax\S+/metrics",  # in Orbax's thread
        r"^open tmp/\S+/manifest.json",  # a commit
        r"chunk-\S+tmp$",
    ):
        ended_for_want_of_space(Loop(workdir, fault=Fault("full", where)))
        assert not list((workdir / "tmp").iterdir())
        assert not list(workdir.rglob(".*.tmp"))
    finish(workdir)
    check(workdir, reference)


def test_full_disk_of_a_real_file_system(tmp_path, reference):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        ended_for_want_of_space(Loop(disk / "workdir", logs=tmp_path))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(disk / "workdir", logs=tmp_path)
        check(disk / "workdir", reference)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# -- damage ------------------------------------------------------------------------------------


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = (flip, truncate, pathlib.Path.unlink)


@pytest.mark.parametrize(
    "which", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_damaged_store(tmp_path_factory, reference, which):
    """The `which`-th file of every stage at once, so that four runs cover every file there is."""
    workdir = tmp_path_factory.mktemp("damage") / "workdir"
    for name, data in reference.store.items():
        path = workdir / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    damaged = []
    for number, entry in enumerate(sorted((workdir / "store").glob("*/*"))):
        files = sorted(entry.iterdir())
        if which < len(files):
            DAMAGES[(number + which) % len(DAMAGES)](files[which])
            damaged.append(str(files[which]))
    assert damaged
    loop = finish(workdir)
    assert [path for path in damaged if path not in loop.stderr] == []
    check(workdir, reference)


def test_damaged_chunk_and_checkpoint(tmp_path, reference):
    workdir = tmp_path / "workdir"
    loop = Loop(workdir, fault=Fault("kill", "checkpoints/9"))
    assert loop.wait() == -signal.SIGKILL
    array = max(workdir.glob("partial/warmup/*/checkpoints/6/state/**/d/*"), key=os.path.getsize)
    flip(array)
    loop = Loop(workdir, fault=Fault("kill", r"partial/generate/\S+chunk-", 6))
    assert loop.wait() == -signal.SIGKILL
    assert str(array) in loop.stderr
    assert "3/10" in loop.stderr or "warmup  10/10" in loop.stderr
    first, second, *_ = sorted(workdir.glob("partial/generate/*/chunk-*"))
    flip(first)
    truncate(second)
    loop = finish(workdir)
    assert str(first) in loop.stderr and str(second) in loop.stderr
    check(workdir, reference)


@pytest.mark.slow
def test_other_chunks_than_before(tmp_path, reference):
    """The size of a batch is no part of a stage's key, so it may change in the middle.

    It may change the last bit of a log-probability, so what is compared is the text.
    """
    workdir = tmp_path / "workdir"
    loop = Loop(workdir, fault=Fault("kill", r"partial/generate/\S+chunk-", 6))
    assert loop.wait() == -signal.SIGKILL
    [key] = [path.name for path in workdir.glob("partial/generate/*")]
    # Under another name, as a run's own config is fixed; the two share their stages.
    finish(workdir, "--config.generate.batch=32", run="other")
    name = f"generate/{key}/samples.parquet"
    found, wanted = (
        pq.read_table(pa.BufferReader(store[name])).select(["prompts", "completions"])
        for store in (Outcome.of(workdir, "other").store, reference.store)
    )
    assert found.equals(wanted)
    assert not leftovers(workdir)


# -- several processes ---------------------------------------------------------------------------


def test_two_processes(tmp_path, reference):
    workdir = tmp_path / "workdir"
    first = Loop(workdir, fault=Fault("pause", "checkpoints/6/"))
    first.wait_until(lambda: "faults: pause" in first.stderr)

    same = Loop(workdir)
    assert same.wait() == 2
    assert f"process {first.pid} on" in same.stderr
    assert "Traceback" not in same.stderr

    stopped, other = Loop(workdir, run="stopped"), Loop(workdir, run="other")
    waiting = f"waiting for warmup-.*held by process {first.pid} on"
    for loop in (stopped, other):
        loop.wait_until(lambda loop=loop: re.search(waiting, loop.stderr))
    stopped.process.terminate()
    assert stopped.wait() == 0, stopped.stderr
    assert "resume with:" in stopped.stderr

    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0, first.stderr
    assert other.wait() == 0, other.stderr
    assert "warmup  reused" in other.stderr and "warmup  started" not in other.stderr
    reference.check(Outcome.of(workdir, "other"))
    check(workdir, reference)


def test_a_killed_holder_holds_nothing(tmp_path, reference):
    workdir = tmp_path / "workdir"
    first = Loop(workdir, fault=Fault("pause", r"partial/generate/\S+chunk-", 5))
    first.wait_until(lambda: "faults: pause" in first.stderr)
    other = Loop(workdir, run="other")
    other.wait_until(lambda: "waiting for generate-" in other.stderr)
    kept = [path.stat().st_ino for path in workdir.glob("partial/generate/*/chunk-*")]
    assert kept
    first.process.kill()
    first.wait()
    assert other.wait() == 0, other.stderr
    reference.check(Outcome.of(workdir, "other"))
    finish(workdir)
    check(workdir, reference)


# -- places that cannot be written ---------------------------------------------------------------


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="wants /proc")
def test_workdir_that_cannot_be_made(tmp_path):
    started = time.monotonic()
    loop = Loop("/proc/karploop", logs=tmp_path)
    assert loop.wait() == 2
    assert "/proc/karploop" in loop.stderr and "--workdir" in loop.stderr
    assert "Traceback" not in loop.stderr
    assert time.monotonic() - started < 120


def test_the_tests_find_their_config():
    assert (ROOT / "tests" / "tiny.py").is_file()
