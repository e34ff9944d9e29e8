"""A `gcloud` for tests of `launch_tpu.sh`: its TPU is folders here, its workers are processes.

FAKE_CLOUD names a folder that stands for the cloud:

    plan.json     what is to happen, see below            calls.jsonl   every command line, in order
    tpu.json      the TPU, if there is one                workers/K/    worker K's home folder
    runs.jsonl    what each worker's run was started with

The plan may hold
    workers       how many (2)
    states        what `describe` says, one after the other, before the TPU is ready
    during        {"KIND N": ACTION}: on the N-th call of a kind (create, describe, delete, scp,
                  rsync, and of ssh status, install, start, follow, complain)
    codes         of each start in turn, the exit codes of the workers' runs; then 0
    seconds       of each start in turn, how long the runs take at most; then none
    release       "KIND N": at this call the runs end by themselves
ACTIONs: fail (does nothing, exits with 1); cut (the connection breaks, what runs goes on); preempt
(the machines are gone); stop (their processes get SIGTERM); hang (waits for long).
"""

import json
import os
import pathlib
import re
import signal
import sys
import time

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
PLAN = json.loads((CLOUD / "plan.json").read_text())
TPU = CLOUD / "tpu.json"
WORKERS = CLOUD / "workers"


def kind_of(arguments: list[str]) -> str:
    if "ssh" not in arguments:
        verbs = {"create", "describe", "delete", "scp", "rsync"}
        return next(a for a in arguments if a in verbs)
    command = next(a for a in arguments if a.startswith("--command="))
    return re.findall(r"tpu_worker\.sh (\w+)", command)[-1]


def flag(arguments: list[str], name: str) -> str | None:
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")), None)


def make(queued: bool) -> None:
    TPU.write_text(json.dumps({"queued": queued, "states": PLAN.get("states", [])}))
    for number in range(PLAN.get("workers", 2)):
        (WORKERS / str(number)).mkdir(parents=True)


def signal_runs(number: int) -> None:
    for pid in WORKERS.glob("*/.karploop/run/pid"):
        try:
            os.killpg(int(pid.read_text()), number)
        except ProcessLookupError:
            continue


def state(arguments: list[str]) -> str:
    tpu = json.loads(TPU.read_text())
    if "queued-resources" in arguments:
        ready, gone = "ACTIVE", "SUSPENDED"
    else:
        ready, gone = "READY", "PREEMPTED"
    if tpu.get("gone"):
        return gone
    if tpu["states"]:
        now = tpu["states"].pop(0)
        TPU.write_text(json.dumps(tpu))
        return now
    return ready


def on_workers(arguments: list[str]):
    wanted = flag(arguments, "worker")
    return [w for w in sorted(WORKERS.iterdir()) if wanted in ("all", w.name)]


def ssh(arguments: list[str]) -> int:
    import subprocess  # here, as most calls do without it, and there are hundreds

    worst = 0
    for home in on_workers(arguments):
        environment = {
            "HOME": str(home), "PATH": f"{CLOUD}/bin:/usr/bin:/bin", "FAKE_CLOUD": str(CLOUD),
        }  # fmt: skip
        command = ["bash", "-c", flag(arguments, "command")]
        code = subprocess.run(command, cwd=home, env=environment).returncode
        worst = max(worst, code)
    return worst


def scp(arguments: list[str]) -> int:
    import shutil

    files = [a for a in arguments[arguments.index("scp") + 1 :] if not a.startswith("--")]
    for home in on_workers(arguments):
        for source in files[:-1]:
            shutil.copy(source, home / files[-1].partition(":")[2])  # with its mode, as scp does
    return 0


def remove(folder: pathlib.Path) -> None:
    import shutil

    signal_runs(signal.SIGKILL)
    shutil.rmtree(folder)


def act(kind: str, arguments: list[str]) -> int:
    if kind in ("describe", "delete", "scp") or "ssh" in arguments:
        if not TPU.exists():
            print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
            return 1
    if kind == "describe":
        print(state(arguments))
    elif kind == "create":
        make("queued-resources" in arguments)
    elif kind == "delete":
        remove(WORKERS)
        TPU.unlink()
    elif kind == "scp":
        return scp(arguments)
    elif kind == "rsync":
        (pathlib.Path(arguments[-1] if "=" not in arguments[-1] else arguments[-2]) / "x").touch()
    else:
        return ssh(arguments)
    return 0


def wait_for_runs() -> None:
    """Until each worker's has begun, so that what happens to them happens in their midst."""
    deadline = time.monotonic() + 60
    begun = [CLOUD / f"starts-{home.name}" for home in WORKERS.glob("*")]
    while not all(path.exists() for path in begun) and time.monotonic() < deadline:
        time.sleep(0.02)


def main(arguments: list[str]) -> int:
    calls = CLOUD / "calls.jsonl"
    with calls.open("a") as f:
        f.write(json.dumps(arguments) + "\n")
    lines = map(json.loads, calls.read_text().splitlines())
    kind = kind_of(arguments)
    number = sum(kind_of(line) == kind for line in lines)
    if PLAN.get("release") == f"{kind} {number}":
        (CLOUD / "release").touch()
    action = PLAN.get("during", {}).get(f"{kind} {number}")
    if action is None:
        return act(kind, arguments)
    if action == "fail":
        print("ERROR: (gcloud) something else", file=sys.stderr)
        return 1
    if kind == "follow":
        wait_for_runs()
    if action == "hang":
        (CLOUD / "hangs").touch()
        time.sleep(60)
    if action == "preempt":
        remove(WORKERS)
        WORKERS.mkdir()
        TPU.write_text(json.dumps({"gone": True}))
    if action == "stop":
        signal_runs(signal.SIGTERM)
        return act(kind, arguments)
    return 255


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
