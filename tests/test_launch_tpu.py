"""`launch_tpu.sh` against a `gcloud` that records what it is asked, fails, and preempts.

What is sent to the workers really runs there, in folders that stand for their homes; only the
installer, and in most tests `experiments.run`, are stand-ins.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from processes import LIMIT_SECONDS, Outcome, finish

ROOT = pathlib.Path(__file__).parent.parent
FAKE = pathlib.Path(__file__).with_name("fake_gcloud.py")
SCRIPTS = ("launch_tpu.sh", "experiments/tpu_worker.sh")
OPTIONS = (
    "--name=pod", "--zone=z-a", "--accelerator_type=v5litepod-16", "--backoff=0", "--poll=0",
)  # fmt: skip
RUN = ("--config=configs/mine.py:arg", "--workdir=gs://bucket/dir", "--config.name=it's two words")

# Makes uv, as `pip install --target uv uv` does; uv makes venv/bin/python, and notes installs.
PYTHON3 = """#!/bin/sh
mkdir -p uv/bin && cp "$FAKE_CLOUD/bin/uv" uv/bin/uv
"""
UV = """#!/bin/sh
echo "$HOME $*" >>"$FAKE_CLOUD/uv.log"
case $1 in venv) mkdir -p venv/bin && cp "$FAKE_CLOUD/bin/run" venv/bin/python ;; esac
"""
# What `python -m experiments.run` is to a worker: notes how it was called, takes its time, ends.
STAND_IN = f"""#!{sys.executable} -SE
import json, os, pathlib, signal, sys, time
cloud, home = pathlib.Path(os.environ["FAKE_CLOUD"]), pathlib.Path(os.environ["HOME"])
plan = json.loads((cloud / "plan.json").read_text())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
count = cloud / ("starts-" + home.name)
start = int(count.read_text()) if count.exists() else 0
print(f"worker {{home.name}} start {{start}}", flush=True)
files = sorted(str(p) for p in pathlib.Path(".").rglob("*") if p.is_file())
note = dict(worker=home.name, argv=sys.argv[1:], token=os.environ.get("TOKEN"), files=files)
note["config"] = pathlib.Path("configs/mine.py").read_text()
with (cloud / "runs.jsonl").open("a") as f:
    f.write(json.dumps(note) + "\\n")
written = count.with_name("starts.of." + home.name)
written.write_text(str(start + 1))
os.replace(written, count)
pick = lambda name, other: (plan.get(name, []) + [other] * 99)[start]
end = time.monotonic() + pick("seconds", 0)
while time.monotonic() < end and not (cloud / "release").exists():
    time.sleep(0.02)
print(f"worker {{home.name}} ends", flush=True)
sys.exit(pick("codes", [0] * 9)[int(home.name)])
"""


@dataclass(frozen=True)
class Cloud:
    """The checkout that is launched from, and the cloud it is launched to."""

    checkout: pathlib.Path
    folder: pathlib.Path

    def plan(self, **plan) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder}/path:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "FAKE_CLOUD": str(self.folder)} | more

    def start(self, *more: str, options=OPTIONS, run=RUN, env=()) -> subprocess.Popen:
        return subprocess.Popen(
            [self.checkout / "launch_tpu.sh", *options, *more, *run],
            env=self.environment(**dict(env)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *more: str, code: int = 0, **rest) -> subprocess.CompletedProcess:
        process = self.start(*more, **rest)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == code, out + err
        return subprocess.CompletedProcess(process.args, code, out, err)

    def lines(self, name: str) -> list:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def calls(self) -> list[list[str]]:
        return self.lines("calls")

    @property
    def kinds(self) -> list[str]:
        """Of each call the verb, for ssh the worker's command; looks at the state left out."""
        found = []
        for call in self.calls:
            command = re.findall(r"tpu_worker\.sh (\w+)", " ".join(call))
            verb = re.search(r"create|describe|delete|scp|rsync|ssh", " ".join(call))[0]
            found.append(command[-1] if verb == "ssh" else verb)
        return [kind for kind in found if kind != "describe"]

    @property
    def exists(self) -> bool:
        return (self.folder / "tpu.json").exists()


ONCE = ["status", "scp", "install", "start", "follow", "status"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A small checkout to copy."""
    checkout = tmp_path_factory.mktemp("committed")
    for name in (*SCRIPTS, "requirements.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "configs").mkdir()
    (checkout / "configs/mine.py").write_text("committed\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(checkout)]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    return checkout


@pytest.fixture
def cloud(tmp_path, committed):
    checkout, folder = tmp_path / "check out", tmp_path / "cloud"
    shutil.copytree(committed, checkout)
    programs = {
        "path/gcloud": f'#!/bin/sh\nexec {sys.executable} -SE {FAKE} "$@"\n',
        "bin/python3": PYTHON3,
        "bin/uv": UV,
        "bin/run": STAND_IN,
    }
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    made = Cloud(checkout, folder)
    made.plan()
    yield made
    for pid in folder.glob("workers/*/.karploop/run/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    program = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert program, "shellcheck is missing: pip install -r requirements-dev.txt"
    result = subprocess.run([program, name], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "set -euo pipefail" in (ROOT / name).read_text()


def test_from_nothing_to_results_and_nothing_left(cloud, tmp_path):
    results = tmp_path / "re sults"
    done = cloud.launch(f"--fetch={results}", "--project=mine")
    assert cloud.kinds == ["create", *ONCE, "rsync", "delete"]
    create = next(c for c in cloud.calls if "create" in c)
    assert create == [
        "compute", "tpus", "tpu-vm", "create", "pod", "--version=v2-alpha-tpuv5-lite",
        "--accelerator-type=v5litepod-16", "--zone=z-a", "--project=mine", "--quiet",
    ]  # fmt: skip
    assert all("--project=mine" in call for call in cloud.calls)
    assert sorted(run["worker"] for run in cloud.lines("runs")) == ["0", "1"]
    for run in cloud.lines("runs"):
        assert run["argv"] == ["-m", "experiments.run", "--distributed", *RUN]
    assert "worker 0 ends" in done.stdout and "worker 1" not in done.stdout
    assert ["storage", "rsync", "--recursive", "gs://bucket/dir/runs", str(results)] in [
        call[:5] for call in cloud.calls
    ]
    assert results.is_dir() and not cloud.exists


def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cloud):
    options = ("--spot", "--num_slices=2", "--network=n", "--create_flag=--reserved", "--env=TOKEN")
    shown = cloud.launch(*options, "--dry_run", env={"TOKEN": "hush-hush"})
    assert cloud.calls == [] and "hush-hush" not in shown.stdout + shown.stderr
    printed = [line for line in shown.stdout.splitlines() if line.startswith("gcloud ")]
    cloud.launch(*options, env={"TOKEN": "hush-hush"})
    run_again = "\n".join(["set -e", 'gcloud() { printf "%s\\0" "$@"; echo; }', *printed])
    words = subprocess.run(["bash", "-c", run_again], capture_output=True, text=True, check=True)
    shown_calls = [line.rstrip("\0").split("\0") for line in words.stdout.splitlines()]

    def comparable(call):  # but for the scratch folder and the number of the attempt
        return [re.sub(r"\S*/tmp\.\w+|start \d+-\d+", "", word) for word in call]

    nodes = [c for c in cloud.calls if "describe" in c and "tpu-vm" in c]
    assert [c[4] for c in nodes] == ["pod-0", "pod-1"]  # a dry run has no slices to look at
    assert [comparable(c) for c in shown_calls] == [
        comparable(c) for c in cloud.calls if c not in nodes
    ]


def test_slices_are_queued_and_waited_for_and_come_back_when_preempted(cloud):
    waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    cloud.plan(states=waiting, during={"follow 1": "preempt"}, seconds=[50, 0])
    done = cloud.launch("--num_slices=2", "--spot", "--max_restarts=0")
    again = ["status", "scp", "install", "start"]
    assert cloud.kinds == ["create", *again, "follow", "delete", "create", *ONCE, "delete"]
    create = next(c for c in cloud.calls if "create" in c)
    assert create[2:4] == ["queued-resources", "create"]
    assert {"--node-count=2", "--node-prefix=pod", "--spot"} <= set(create)
    assert all("--force" in c for c in cloud.calls if "delete" in c)
    for call in cloud.calls:
        worker = next((a for a in call if a.startswith("--worker=")), None)
        if worker:
            assert worker.replace("worker", "node") in call
    assert [w for w in waiting if f"launch: pod: {w}" not in done.stderr] == []
    assert "SUSPENDED" in done.stderr
    assert len(cloud.lines("runs")) == 4


def test_a_preempted_vm_is_made_anew_and_the_run_goes_on(cloud):
    cloud.plan(workers=1, during={"follow 1": "preempt", "create 2": "fail"}, seconds=[50, 0])
    done = cloud.launch("--spot", "--max_restarts=0")
    assert cloud.kinds.count("create") == 3 and cloud.kinds[-1] == "delete"
    assert cloud.kinds.index("delete") < cloud.kinds.index("create", 1)
    assert "pod is PREEMPTED" in done.stderr
    first, second = cloud.lines("runs")
    assert first == second


def test_a_mistake_is_not_tried_again(cloud):
    cloud.plan(codes=[[2, 2]])
    done = cloud.launch(code=2)
    assert cloud.kinds.count("start") == 1 and not cloud.exists
    assert "refuses its arguments" in done.stderr


def test_a_failing_run_is_tried_again_only_so_often(cloud):
    cloud.plan(codes=[[1, 0], [0, 134], [0, 1]])
    done = cloud.launch("--max_restarts=2", code=1)
    assert cloud.kinds.count("start") == 3 and not cloud.exists
    assert "restart 2 of 2" in done.stderr and "failed 3 times" in done.stderr
    assert cloud.kinds.count("complain") == 3 and ": worker 1 ends" in done.stdout


def test_a_run_that_was_told_to_stop_is_not_taken_for_done(cloud):
    """`experiments.run` exits with 0 in both cases; machines that go down tell it to stop."""
    cloud.plan(during={"follow 1": "stop"}, seconds=[50, 0])
    cloud.launch("--max_restarts=1")
    assert cloud.kinds.count("start") == 2


def test_after_a_broken_connection_the_same_run_is_watched(cloud):
    cloud.plan(during={"follow 1": "cut", "describe 3": "fail"}, seconds=[50], release="follow 2")
    done = cloud.launch("--max_restarts=1")
    assert cloud.kinds == ["create", *ONCE[:5], "status", "follow", "status", "delete"]
    assert len(cloud.lines("runs")) == 2
    assert "worker 0 ends" in done.stdout


def test_a_run_that_ended_while_nobody_watched_is_not_run_again(cloud):
    cloud.plan(during={"follow 1": "cut", "status 2": "fail"})
    cloud.launch("--max_restarts=2")
    assert len(cloud.lines("runs")) == 2


def test_what_was_there_before_is_used_and_stays(cloud):
    cloud.launch("--keep")
    assert cloud.exists and "delete" not in cloud.kinds
    cloud.launch()
    assert cloud.exists and cloud.kinds.count("create") == 1
    installs = (cloud.folder / "uv.log").read_text()
    assert installs.count("pip install") == 2  # one a worker: the requirements are the same
    (cloud.checkout / "requirements.txt").write_text("numpy\n")
    cloud.launch("--delete")
    installs = (cloud.folder / "uv.log").read_text()
    assert installs.count("pip install") == 4 and "jax[tpu] gcsfs" in installs
    assert not cloud.exists


def test_a_lost_tpu_of_somebody_else_is_left_alone(cloud):
    cloud.launch("--keep")
    (cloud.folder / "tpu.json").write_text('{"gone": true}')
    done = cloud.launch(code=1)
    assert "give --delete" in done.stderr and "delete" not in cloud.kinds
    cloud.launch("--keep", "--replace", code=1)
    assert "delete" not in cloud.kinds


def test_another_run_on_the_tpu_is_left_alone_unless_told(cloud):
    cloud.plan(during={"follow 1": "cut"}, seconds=[50, 0])
    cloud.launch("--keep", "--max_restarts=0", code=1)
    other = [*RUN, "--config.seed=1"]
    done = cloud.launch("--delete", code=2, run=other)
    assert "--replace" in done.stderr and cloud.exists
    assert cloud.kinds.count("start") == 1
    cloud.launch("--replace", run=other)
    assert [run["argv"][-1] for run in cloud.lines("runs")] == [RUN[-1]] * 2 + [other[-1]] * 2


@pytest.mark.parametrize("number, delete", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_ctrl_c_leaves_the_run_unless_told_to_delete(cloud, number, delete):
    cloud.plan(during={"follow 1": "hang"}, seconds=[50], release="follow 2")
    process = cloud.start(*["--delete_on_interrupt"] * delete)
    deadline = time.monotonic() + 60
    while not (cloud.folder / "hangs").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    asked = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert time.monotonic() - asked < 10  # and not once the connection ends by itself
    assert cloud.exists != delete and (cloud.kinds[-1] == "delete") == delete
    if not delete:
        assert "gcloud compute tpus tpu-vm delete pod" in err
        done = cloud.launch("--delete")  # the same command watches it again
        assert len(cloud.lines("runs")) == 2 and "worker 0 ends" in done.stdout
        assert not cloud.exists


def test_values_of_the_environment_reach_the_run_and_nothing_else(cloud):
    token = "hush 'n\" $HOME\nhush"
    cloud.plan(during={"start 1": "hang"})
    process = cloud.start("--env=TOKEN", env={"TOKEN": token})
    sent = cloud.folder / "workers/0/.karploop/environment"
    deadline = time.monotonic() + 60
    while not (cloud.folder / "hangs").exists() and not sent.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert stat.S_IMODE(sent.stat().st_mode) == 0o600
    assert stat.S_IMODE(sent.parent.stat().st_mode) == 0o700
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    cloud.plan()
    done = cloud.launch("--env=TOKEN", "--keep", env={"TOKEN": token})
    assert [run["token"] for run in cloud.lines("runs")] == [token] * 2
    kept = [p for p in cloud.folder.rglob("*") if p.is_file() and p.name != "runs.jsonl"]
    assert [p for p in kept if "hush" in p.read_text(errors="replace")] == []
    assert "hush" not in done.stdout + done.stderr


def test_what_git_tracks_is_copied_as_it_stands(cloud):
    (cloud.checkout / "configs/mine.py").write_text("not yet committed\n")
    (cloud.checkout / "scrap.txt").write_text("untracked\n")
    done = cloud.launch()
    run = cloud.lines("runs")[0]
    assert run["config"] == "not yet committed\n" and "scrap.txt" not in run["files"]
    assert "scrap.txt" in done.stderr and "not committed go along" in done.stderr
    stashes = ["git", "-C", str(cloud.checkout), "stash", "list"]
    assert subprocess.run(stashes, capture_output=True, check=True).stdout == b""


MISTAKES = {
    "no name": (OPTIONS[1:], RUN, "--name"),
    "no zone": (("--name=a", *OPTIONS[2:]), RUN, "--zone"),
    "no type": (OPTIONS[:2], RUN, "--accelerator_type"),
    "unknown type": ((*OPTIONS, "--accelerator_type=h100-8"), RUN, "--runtime_version"),
    "unknown option": ((*OPTIONS, "--frobnicate=1"), RUN, "--frobnicate"),
    "option without its value": ((*OPTIONS, "--fetch"), RUN, "--fetch"),
    "stray argument": ((*OPTIONS, "stray"), RUN, "stray"),
    "no slices": ((*OPTIONS, "--num_slices=0"), RUN, "--num_slices"),
    "no number": ((*OPTIONS, "--max_restarts=few"), RUN, "--max_restarts"),
    "keep and delete": ((*OPTIONS, "--keep", "--delete"), RUN, "exclude"),
    "local workdir": (OPTIONS, (RUN[0], "--workdir=/tmp/x"), "gs://"),
    "no workdir": (OPTIONS, RUN[:1], "gs://"),
    "no config": (OPTIONS, RUN[1:2], "--config"),
    "config that is not copied": (OPTIONS, ("--config=configs/no.py", RUN[1]), "configs/no.py"),
    "unset variable": ((*OPTIONS, "--env=NO_SUCH_NAME"), RUN, "NO_SUCH_NAME"),
    "value on the command line": ((*OPTIONS, "--env=KEY=hush"), RUN, "--env=NAME"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_anything_costs_money(cloud, name):
    options, run, said = MISTAKES[name]
    refused = cloud.launch(options=options, run=run, code=2)
    assert said in refused.stderr and "hush" not in refused.stderr and cloud.calls == []


def test_arguments_may_be_given_in_every_way_that_the_run_reads(cloud):
    run = ("--config", RUN[0][9:], "--config.rounds", "2", "--", "--workdir", RUN[1][10:], "-v=1")
    cloud.launch("--fetch=" + str(cloud.folder / "r"), "--run_name=mine", run=run)
    argv = cloud.lines("runs")[0]["argv"]
    assert argv[3:] == ["--run_name=mine", *[a for a in run if a != "--"]]
    assert "gs://bucket/dir/runs/mine" in next(c for c in cloud.calls if "rsync" in c)


def test_help_names_every_option(cloud):
    text = cloud.launch("--help").stdout
    source = (ROOT / "launch_tpu.sh").read_text()
    parsed = re.search(r"parse\(\) \{(.*?)\n\}", source, re.S)[1]
    options = set(re.findall(r"(--[a-z_]+)(?==\*| \||\))", parsed)) - {"--help"}
    assert len(options) > 20 and {o for o in options if o not in text} == set()


def test_a_tpu_that_cannot_be_had_leaves_nothing_to_delete(cloud):
    cloud.plan(during={"create 1": "fail"})
    done = cloud.launch(code=1)
    assert cloud.kinds == ["create"] and "--queued" in done.stderr


def test_a_request_that_fails_is_not_made_for_ever(cloud):
    cloud.plan(states=["WAITING_FOR_RESOURCES", "FAILED"])
    cloud.launch("--queued", code=1)
    assert cloud.kinds == ["create", "delete"]
    create = next(call for call in cloud.calls if "create" in call)
    assert "--node-id=pod" in create and "--runtime-version=v2-alpha-tpuv5-lite" in create


def test_what_cannot_be_installed_is_not_tried_for_ever(cloud):
    (cloud.folder / "bin/uv").write_text("#!/bin/sh\nexit 1\n")
    done = cloud.launch("--max_restarts=1", code=1)
    assert cloud.kinds.count("install") == 2 and "start" not in cloud.kinds
    assert "failed 2 times" in done.stderr and not cloud.exists


def test_without_an_answer_nothing_is_created(cloud):
    cloud.plan(during={"describe 1": "fail"})
    done = cloud.launch(code=1)
    assert cloud.kinds == [] and "something else" in done.stderr


@pytest.mark.slow
def test_a_preempted_loop_ends_with_the_same_bytes(cloud, tmp_path):
    """The loop itself: only the bucket and the cluster of machines are stood in for."""
    straight, bucket = tmp_path / "straight/workdir", tmp_path / "bucket/workdir"
    finish(straight)
    shared = ("XDG_CACHE_HOME", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # of conftest.py
    (cloud.folder / "bin/run").write_text(
        "\n".join(
            [
                "#!/bin/sh",
                *[f"export {name}={os.environ[name]}" for name in shared],
                f"(until [ -e {bucket}/store/generate ]; do sleep 0.05; done",
                "touch $FAKE_CLOUD/starts-0) &",  # which is when the machine is taken away
                f"cd {ROOT} && exec {sys.executable} -m experiments.run --config=tests/tiny.py \\",
                f"--workdir={bucket} --run_name=run",
            ]
        )
    )
    cloud.plan(workers=1, during={"follow 1": "preempt"})
    done = cloud.launch("--spot", run=RUN[:2])
    assert cloud.kinds.count("create") == 2
    assert "warmup  reused" in done.stdout and "generate  started" in done.stdout
    Outcome.of(straight).check(Outcome.of(bucket))
