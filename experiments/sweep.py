"""Runs the arms of a sweep, one process each, over one shared store.

python -m experiments.sweep --sweep=NAME[:ARG] --workdir=DIR [--only=TEXT] [--dry_run] [--jobs=N]

Stages that arms have in common are computed once. A failed arm is recorded and the others run; the
same command again goes on where this one stopped, and passes quickly over what is done. What
became of each arm is in DIR/sweeps/NAME/arms.json, its output in logs/ beside it. Exit code 1 if
an arm failed.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from karploop import cli, sweeps
from karploop.errors import UserError
from karploop.reporting.arms import ArmRecord, ArmsFile, read_summary, report, shared_time
from karploop.reporting.progress import format_duration
from karploop.store import is_local
from karploop.sweeps import Arm, Sweep

_POLL_SECONDS = 0.1
_LOG_LINES = 5  # of a failed arm, shown at once

Command = Callable[[Sweep, Arm, pathlib.Path], list[str]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `run_sweep` ended."""

    records: list[ArmRecord]  # of all arms, also those not chosen this time
    failed: list[str]  # names of arms that failed in this call
    stopped: bool  # by a signal


@dataclasses.dataclass
class _Child:
    """An arm's running process."""

    process: subprocess.Popen
    record: ArmRecord
    started: float
    signals_passed: int = 0


def run_command(sweep: Sweep, arm: Arm, workdir: pathlib.Path) -> list[str]:
    """The command line that runs one arm."""
    return [
        sys.executable,
        "-m",
        "experiments.run",
        f"--config={sweep.config}",
        f"--workdir={workdir}",
        f"--run_name={sweep.run_name(arm)}",
        *(f"--config.{key}={sweeps.override_text(v)}" for key, v in arm.overrides.items()),
    ]


def choose(arms: Sequence[Arm], only: str) -> list[Arm]:
    """The arms whose name contains `only`.

    Raises:
      UserError: there is none.
    """
    chosen = [arm for arm in arms if only in arm.name]
    if not chosen:
        names = ", ".join(arm.name for arm in arms)
        raise UserError(f"--only={only} fits no arm of the sweep; its arms are {names}")
    return chosen


def run_sweep(
    sweep: Sweep,
    workdir: pathlib.Path,
    *,
    only: str = "",
    jobs: int = 1,
    command: Command = run_command,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Runs the arms whose name contains `only`, `jobs` at a time.

    The first SIGINT, SIGTERM or SIGHUP is passed to the arms under way and starts no more; the
    second one kills them.
    """
    queue = choose(sweep.arms, only)
    total, failed = len(queue), []
    arms_file = ArmsFile(sweep, workdir)
    children: list[_Child] = []
    received: list[int] = []  # signals
    with _listen(received), _terminated_at_exit(children):
        while children or (queue and not received):
            while queue and len(children) < jobs and not received:
                child = _start(sweep, queue.pop(0), workdir, arms_file, command)
                children.append(child)
                arms_file.set(child.record)
                place = f"[{total - len(queue)}/{total}] {child.record.name}"
                say(f"{place}: running, log in {child.record.log}")
            time.sleep(_POLL_SECONDS)
            for child in list(children):
                _pass_on(received, child)
                if child.process.poll() is None:
                    continue
                children.remove(child)
                _close(child, workdir, stopping=bool(received))
                arms_file.set(child.record)
                _tell_end(child.record, say)
                if child.record.status == "failed":
                    failed.append(child.record.name)
    return Outcome(arms_file.records(), failed, bool(received))


def _start(
    sweep: Sweep, arm: Arm, workdir: pathlib.Path, arms_file: ArmsFile, command: Command
) -> _Child:
    log = arms_file.directory / "logs" / f"{arm.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    line = command(sweep, arm, workdir)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(line)}\n")
        out.flush()
        # A process group of its own: Ctrl-C then reaches the arm once, through this process.
        process = subprocess.Popen(
            line,
            cwd=sweeps.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    record = ArmRecord.of(sweep, arm)
    record.status, record.log = "running", str(log)
    return _Child(process, record, time.monotonic())


def _close(child: _Child, workdir: pathlib.Path, stopping: bool) -> None:
    """Fills in how the arm ended; one that was told to stop ends with 0 and is not done."""
    record = child.record
    record.seconds = round(time.monotonic() - child.started, 3)
    record.exit_code = child.process.returncode
    if stopping:
        record.status = "interrupted"
    elif record.exit_code != 0:
        record.status = "failed"
    else:
        record.status = "done" if read_summary(workdir, record.run) else "interrupted"


def _tell_end(record: ArmRecord, say: Callable[[str], None]) -> None:
    say(f"{record.name}: {record.status} after {format_duration(record.seconds)}")
    if record.status == "failed":
        lines = pathlib.Path(record.log).read_text(errors="replace").splitlines()
        for line in lines[-_LOG_LINES:]:
            say(f"    {line}")


def _pass_on(received: Sequence[int], child: _Child) -> None:
    for number in received[child.signals_passed :]:
        if child.signals_passed:
            child.process.kill()
        else:
            child.process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)
        child.signals_passed += 1


@contextlib.contextmanager
def _listen(received: list[int]) -> Iterator[None]:
    """Notes signals in `received` instead of dying of them; ignored ones (nohup) stay ignored."""
    earlier = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminated_at_exit(children: list[_Child]) -> Iterator[None]:
    """Leaves no arm behind should this process fail."""
    try:
        yield
    finally:
        for child in children:
            child.process.terminate()
            child.process.wait()


def define_flags() -> None:
    flags.DEFINE_string("sweep", None, "Sweep: a name, folder or file, and optionally :ARG.")
    flags.DEFINE_string("workdir", "workdir", "Where the runs and their shared store are.")
    flags.DEFINE_string("only", "", "Run only the arms whose name contains this.")
    flags.DEFINE_bool("dry_run", False, "Print the commands and run nothing.")
    flags.DEFINE_integer(
        "jobs", 1, "Arms at a time; a stage that two need is computed by one.", lower_bound=1
    )
    flags.mark_flag_as_required("sweep")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': flags are --NAME=VALUE, see --help")
    args = flags.FLAGS
    if not is_local(args.workdir):
        raise UserError(f"--workdir={args.workdir}: a sweep needs a directory of this machine")
    workdir = pathlib.Path(args.workdir).resolve()
    sweep = sweeps.load_sweep(args.sweep)
    if args.dry_run:
        for arm in choose(sweep.arms, args.only):
            print(shlex.join(run_command(sweep, arm, workdir)))
        return 0
    outcome = run_sweep(sweep, workdir, only=args.only, jobs=args.jobs)
    done = [record.run for record in outcome.records if record.status == "done"]
    print(f"\n{report(outcome.records, shared_time(workdir, done))}")
    if outcome.stopped:
        print(f"stopped; resume with: {cli.command()}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
