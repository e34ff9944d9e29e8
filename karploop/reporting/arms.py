"""The record of a sweep: what became of each arm, and what sharing the store saved.

WORKDIR/sweeps/NAME/arms.json   the sweep, and for each arm its status, exit code and log
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from karploop.errors import UserError
from karploop.reporting.progress import format_duration
from karploop.reporting.tables import text_table
from karploop.reporting.writer import write_json_atomic
from karploop.store import Store
from karploop.sweeps import Arm, Sweep


@dataclasses.dataclass
class ArmRecord:
    """What became of one arm."""

    name: str
    group: str  # the arm without its seed
    run: str  # folder under WORKDIR/runs/
    overrides: dict[str, Any]
    status: str = "pending"  # pending, running, done, failed, interrupted
    exit_code: int | None = None
    seconds: float | None = None  # wall time of the last attempt
    log: str = ""

    @classmethod
    def of(cls, sweep: Sweep, arm: Arm) -> "ArmRecord":
        return cls(arm.name, arm.group, sweep.run_name(arm), dict(arm.overrides))


class ArmsFile:
    """The `arms.json` of a sweep; several processes may each run some of its arms."""

    def __init__(self, sweep: Sweep, workdir: pathlib.Path):
        self.directory = workdir / "sweeps" / sweep.name
        self._path = self.directory / "arms.json"
        self._sweep, self._store = sweep, Store(str(workdir))
        self._write({})

    def set(self, record: ArmRecord) -> None:
        """Replaces the record of one arm."""
        self._write({record.name: record})

    def records(self) -> list[ArmRecord]:
        """The arms of the sweep in its order; "pending" where nothing is known."""
        earlier = self._earlier()
        return [earlier.get(a.name) or ArmRecord.of(self._sweep, a) for a in self._sweep.arms]

    def _write(self, changed: dict[str, ArmRecord]) -> None:
        with self._store.lock(f"sweep-{self._sweep.name}", wait=True):
            records = [changed.get(record.name, record) for record in self.records()]
            write_json_atomic(
                self._path,
                {
                    "sweep": self._sweep.name,
                    "title": self._sweep.title,
                    "config": self._sweep.config,
                    "metrics": list(self._sweep.metrics),
                    "baseline": self._sweep.baseline,
                    "arms": [dataclasses.asdict(record) for record in records],
                },
            )

    def _earlier(self) -> dict[str, ArmRecord]:
        """Records on disk that still speak of the same config; others are void."""
        if not self._path.exists():
            return {}
        kept = json.loads(self._path.read_text())
        if kept["config"] != self._sweep.config:
            return {}
        # Through JSON, for tuples come back as lists.
        now = {arm.name: json.loads(json.dumps(arm.overrides)) for arm in self._sweep.arms}
        records = [ArmRecord(**fields) for fields in kept["arms"]]
        return {r.name: r for r in records if now.get(r.name) == r.overrides}


def read_arms(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """A sweep's `arms.json`, its "arms" as ArmRecords.

    Raises:
      UserError: the sweep has not been run in this workdir.
    """
    path = workdir / "sweeps" / name / "arms.json"
    if not path.exists():
        known = sorted(p.parent.name for p in path.parents[1].glob("*/arms.json"))
        there = f"those run there are {', '.join(known)}" if known else "none has been run there"
        raise UserError(
            f"no sweep '{name}' in '{workdir}': {there}. "
            f"Run it with python -m experiments.sweep --sweep={name} --workdir={workdir}"
        )
    kept = json.loads(path.read_text())
    return kept | {"arms": [ArmRecord(**fields) for fields in kept["arms"]]}


def read_summary(workdir: pathlib.Path, run: str) -> dict[str, Any] | None:
    """The summary of a run that reached its end; None for one that did not."""
    path = workdir / "runs" / run / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    return summary if summary.get("complete", True) else None


@dataclasses.dataclass(frozen=True)
class SharedTime:
    """What the store saved, in seconds of stage time."""

    apart: float  # every run computing all its own stages
    together: float  # each distinct stage once
    unknown: int  # distinct stages without a recorded cost, in neither sum

    @property
    def saved(self) -> float:
        return self.apart - self.together


def shared_time(workdir: pathlib.Path, runs: Sequence[str]) -> SharedTime:
    """Adds up the cost of the runs' stages; a run that is not complete counts for nothing."""
    summaries = [read_summary(workdir, run) for run in runs]
    stages_of = [
        {
            (name.partition(".")[0], key)  # train.2 is the train stage of member 2
            for entry in summary["rounds"]
            for name, key in entry["stages"].items()
        }
        for summary in summaries
        if summary is not None
    ]
    cost = {item: _cost(workdir, *item) for item in set().union(*stages_of)}
    return SharedTime(
        apart=sum(cost[item] or 0.0 for stages in stages_of for item in stages),
        together=sum(seconds or 0.0 for seconds in cost.values()),
        unknown=sum(seconds is None for seconds in cost.values()),
    )


def report(records: Sequence[ArmRecord], time_: SharedTime) -> str:
    """The closing lines of a sweep: a row an arm, and what sharing saved."""
    rows = [
        [
            record.name,
            record.status,
            "-" if record.exit_code is None else str(record.exit_code),
            "-" if record.seconds is None else format_duration(record.seconds),
        ]
        for record in records
    ]
    lines = [text_table(["arm", "status", "exit", "time"], rows), ""]
    if time_.apart:
        lines.append(
            f"stage time: {format_duration(time_.together)}; arm by arm it would have been "
            f"{format_duration(time_.apart)}: sharing saved {format_duration(time_.saved)} "
            f"({time_.saved / time_.apart:.0%})"
        )
    if time_.unknown:
        lines.append(f"not counted: {time_.unknown} stages without a recorded cost")
    return "\n".join(lines).rstrip()


def _cost(workdir: pathlib.Path, stage: str, key: str) -> float | None:
    path = workdir / "provenance" / stage / f"{key}.json"
    return json.loads(path.read_text())["seconds"] if path.exists() else None
