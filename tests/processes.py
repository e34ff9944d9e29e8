"""Tiny loops as processes of their own, with or without faults, and a look at what they left."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parent.parent
RUN = "run"
LIMIT_SECONDS = 300.0  # for one process; generous, machines are sometimes busy


@dataclass(frozen=True)
class Fault:
    """What `faults.py` is to do: `kind` just before the `number`-th write that matches."""

    kind: str
    match: str
    number: int = 1


class Loop:
    """A running process of `experiments.run` on `tiny.py`; its output goes to files."""

    def __init__(
        self,
        workdir: os.PathLike | str,
        *overrides: str,
        run: str = RUN,
        fault: Fault | None = None,
        env: dict[str, str] | None = None,
        logs: pathlib.Path | None = None,
        command: list[str] | None = None,
    ):
        module = [
            "experiments.run",
            "--config=tests/tiny.py",
            f"--workdir={workdir}",
            f"--run_name={run}",
            *overrides,
        ]
        if fault is None:
            line = [sys.executable, "-m", *module]
        else:
            what = [str(workdir), fault.kind, fault.match, str(fault.number)]
            line = [sys.executable, "tests/faults.py", *what, "--", *module]
        logs = logs or pathlib.Path(workdir).parent
        logs.mkdir(parents=True, exist_ok=True)
        stem = f"{time.monotonic_ns()}"
        self._out, self._err = logs / f"{stem}.out", logs / f"{stem}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command or line, cwd=ROOT, stdout=out, stderr=err, env=os.environ | (env or {})
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def wait(self) -> int:
        """The exit code; negative is the number of the signal that killed it."""
        try:
            return self.process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end after {LIMIT_SECONDS:.0f} s:\n{self.stderr}") from None

    def wait_until(self, happened: Callable[[], object]) -> None:
        """Returns when `happened` is true; fails if the process ends before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not happened():
            assert self.process.poll() is None, f"ended too early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.stderr}"
            time.sleep(0.02)


def finish(workdir, *overrides: str, **options) -> Loop:
    """Runs to the end, which has to be a good one."""
    loop = Loop(workdir, *overrides, **options)
    code = loop.wait()
    assert code == 0, f"exit code {code}:\n{loop.stderr}"
    return loop


def tree(directory: pathlib.Path) -> dict[str, bytes]:
    """Every file under `directory`, by relative name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Outcome:
    """What must be the same after any interruption."""

    store: dict[str, bytes]
    params_sha256: str
    metrics: list[dict]

    @classmethod
    def of(cls, workdir: pathlib.Path, run: str = RUN) -> Outcome:
        folder = workdir / "runs" / run
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["complete"]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        # Seconds differ from one execution to the next.
        metrics = [
            {k: v for k, v in json.loads(line).items() if not k.startswith("seconds")}
            for line in lines
        ]
        return cls(tree(workdir / "store"), summary["params_sha256"], metrics)

    def check(self, other: Outcome) -> None:
        """Fails, naming files, unless `other` is the same."""
        assert other.store.keys() == self.store.keys()
        differing = [name for name in self.store if other.store[name] != self.store[name]]
        assert not differing
        assert other.params_sha256 == self.params_sha256
        assert other.metrics == self.metrics


def leftovers(workdir: pathlib.Path) -> list[str]:
    """What only a run under way may have."""
    found = [p for name in ("partial", "tmp", "locks") for p in (workdir / name).rglob("*")]
    found += workdir.rglob(".*.tmp")
    return [str(p.relative_to(workdir)) for p in found if p.name != "gate"]
