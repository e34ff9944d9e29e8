"""Garbage collection: which files of a workdir nobody needs any more, and their removal.

**What is large.** `params.safetensors`, `optimizer.safetensors` where rounds hand it on, and on
request `samples.parquet` (a run whose samples were collected computes them again when it is
resumed, so that is for finished work). Everything else
stays as long as any run refers to its stage: manifests, evals, metrics by step, rows used,
verdicts, selections and kept examples are small, and reports and `experiments.trace` read them.

**What is kept.** Of a finished run the parameters (of all members) of its last `last` rounds and of
the `best` rounds with the highest mean held-out exact match; the base counts as a round. Adapters
are small and stay; for those of the rounds kept, so do the parameters below them. Of a run
that is live (a process holds its lock), that is unfinished (its summary does not say complete) or
that belongs to a sweep with arms not done: all that it refers to and all that it could still find
in the store and use (`Catalogue.reach`).

**What happens to the rest.** A large file of a stage that some run refers to is *collected*: the
entry gets the marker COLLECTED and loses the file. Keys, lineage and resuming work as before, and
the file is computed again, to the same bytes, if it is ever read. An entry that no run refers to,
by its summary or as an input of what it refers to, is removed whole. So is what interrupted
stages left under `partial/`: of a stage that is complete, and of any stage once no run is
unfinished. Of these two kinds nothing is removed while a run is live. What dead processes of this
machine left under `tmp/` always goes.

**What a kill can do.** The marker is written before a file is deleted, and an entry is renamed away
before it is deleted, so an entry is whole, collected or absent at every instant. Collecting again
finishes what was cut short.

**What cannot race.** A collection holds the store's gate alone from before it looks to after its
last deletion. A run passes the gate when it starts, and keeps its own lock from then on: it either
waits for the collection or is seen by it. Locks are of one machine (and of a shared disk whose
`flock` reaches across machines). An object store has none: there every unfinished run is taken to
be live, and no run should be *started* while a collection is at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from karploop.catalogue import REWARD, TRAINED, Catalogue, Name, Run, folders, mean_exact_match
from karploop.config import RetentionConfig
from karploop.errors import UserError
from karploop.models.weights import FILE as PARAMS_FILE
from karploop.records import SAMPLES_FILE
from karploop.reporting.tables import round_label
from karploop.schema import nearest
from karploop.store import COLLECTED, Store, abandoned, write_atomic
from karploop.training.moments import MOMENTS


@dataclass(frozen=True)
class Policy:
    """What to keep of a finished run, and which runs to look at."""

    last: int | None = None  # None: the run's own config decides
    best: int | None = None
    samples: bool = False  # collect samples.parquet, too
    sweep: str = ""  # collect from this sweep's runs only; nothing is removed whole then

    @property
    def large(self) -> tuple[str, ...]:
        return (PARAMS_FILE, MOMENTS, *([SAMPLES_FILE] if self.samples else []))


@dataclass(frozen=True)
class Plan:
    """What a collection will do, and why the rest stays."""

    kept: dict[str, str]  # run → what is kept of it
    collect: dict[Name, list[str]]  # stage → its files to go
    remove: list[Name]  # entries that go whole
    folders: list[epath.Path]  # under partial/ and tmp/
    notes: list[str] = field(default_factory=list)


def sweeps(root: epath.Path) -> dict[str, list[dict[str, Any]] | None]:
    """By sweep: its arms as kept in `sweeps/NAME/arms.json`; None where that cannot be read."""
    found: dict[str, list[dict[str, Any]] | None] = {}
    for folder in folders(root / "sweeps"):
        try:
            arms = json.loads((folder / "arms.json").read_text())["arms"]
            found[folder.name] = [dict(arm) for arm in arms]
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            found[folder.name] = None
    return found


def arm_run(sweep: str, arm: dict[str, Any]) -> str:
    """The folder under `runs/` of a sweep's arm."""
    return arm.get("run") or f"{sweep}__{arm.get('name')}"


def live_runs(store: Store) -> set[str]:
    """Names of the runs whose lock is held by a process; on an object store nobody can tell."""
    folder = store.root / "locks"
    if not store.local or not folder.exists():
        return set()
    root = pathlib.Path(folder)
    names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    runs = ((name, re.fullmatch(r"run-(.+)-\d+", name)) for name in names)
    return {match[1] for name, match in runs if match and store.held(name)}


def plan(catalogue: Catalogue, policy: Policy, live: set[str]) -> Plan:
    """What to remove under `policy`, given which runs are live. Changes nothing.

    Raises:
      UserError: `policy.sweep` is not the name of a sweep here.
    """
    reasons = _spared(catalogue, policy, live)
    kept: dict[str, str] = {}
    referenced: set[Name] = set()
    needed: set[tuple[Name, str]] = set()  # large files that stay
    for run in catalogue.runs:
        own = catalogue.ancestors(name for names in run.stages.values() for name in names)
        if run.name in reasons:
            if not run.complete or run.name in live:
                own |= catalogue.reach(run.config)
            needed |= {(name, file) for name in own for file in policy.large}
            kept[run.name] = f"everything: {reasons[run.name]}"
        else:
            rounds = _chosen_rounds(run, policy)
            needed |= _large_of(catalogue, run, rounds)
            kept[run.name] = _describe(rounds)
        referenced |= own
    unknown = live - {run.name for run in catalogue.runs}
    if unknown:
        note = f"nothing is removed: {', '.join(sorted(unknown))} is live and has no run folder"
        return Plan(kept, {}, [], [], [note])
    large = {name: _present(catalogue, name, policy.large) for name in sorted(referenced)}
    unneeded = {n: [f for f in files if (n, f) not in needed] for n, files in large.items()}
    whole, partial, notes = _unreferenced(catalogue, policy, live, referenced)
    return Plan(
        kept,
        {name: files for name, files in unneeded.items() if files},
        whole,
        partial + _abandoned(catalogue.store),
        notes,
    )


def _present(catalogue: Catalogue, name: Name, files: Iterable[str]) -> list[str]:
    """Those of a stage's files that are there still."""
    written, entry = catalogue.manifests[name].files, catalogue.store.entry(*name)
    return [file for file in files if file in written and (entry / file).exists()]


def _unreferenced(
    catalogue: Catalogue, policy: Policy, live: set[str], referenced: set[Name]
) -> tuple[list[Name], list[epath.Path], list[str]]:
    """Entries and partial stages that no run needs, or a note on why they are left alone."""
    unfinished = [run.name for run in catalogue.runs if not run.complete]
    busy = sorted(live) if catalogue.store.local else unfinished
    if policy.sweep or busy:
        why = "--sweep is given" if policy.sweep else f"{', '.join(busy)} is live"
        return [], [], [f"entries that no run refers to and partial stages are left alone: {why}"]
    used = {name for run in catalogue.runs for names in run.stages.values() for name in names}
    entries = [name for name in catalogue.manifests if name not in referenced]
    entries += [name for name in catalogue.damaged if name not in used]
    return sorted(entries), _stale_partials(catalogue, keep_open=bool(unfinished)), []


def _abandoned(store: Store) -> list[epath.Path]:
    if not store.local:
        return []
    return [epath.Path(path) for path in abandoned(pathlib.Path(store.root / "tmp"))]


def _spared(catalogue: Catalogue, policy: Policy, live: set[str]) -> dict[str, str]:
    """The runs of which everything is kept, and why."""
    found = sweeps(catalogue.store.root)
    if policy.sweep and policy.sweep not in found:
        hint = nearest(policy.sweep, found) if found else "there is none"
        raise UserError(f"no sweep '{policy.sweep}' in '{catalogue.store.root}': {hint}")
    names = [run.name for run in catalogue.runs]
    reasons = {}
    if policy.sweep:
        arms = {arm_run(policy.sweep, arm) for arm in found[policy.sweep] or []}
        reasons |= {name: f"not of the sweep {policy.sweep}" for name in names if name not in arms}
    for sweep, arms in found.items():
        if arms is None:
            reasons |= dict.fromkeys(names, f"the sweep {sweep} has an arms.json nobody can read")
            continue
        left = [arm for arm in arms if arm.get("status") != "done"]
        if left:
            reason = f"the sweep {sweep} is not done ({len(left)} of {len(arms)} arms left)"
            reasons |= dict.fromkeys((arm_run(sweep, arm) for arm in arms), reason)
    reasons |= {
        run.name: "unfinished, it can be resumed" for run in catalogue.runs if not run.complete
    }
    return reasons | dict.fromkeys(live, "live")


def _chosen_rounds(run: Run, policy: Policy) -> dict[int, list[str]]:
    """The rounds whose parameters stay, and why each does."""
    own = run.config.get("retention", {})
    default = RetentionConfig()
    last = own.get("last", default.last) if policy.last is None else policy.last
    best = own.get("best", default.best) if policy.best is None else policy.best
    rounds = [entry["round"] for entry in run.rounds]
    scores = {e["round"]: mean_exact_match(e.get("evals", {})) for e in run.rounds}
    ranked = sorted((s, r) for r, s in scores.items() if s is not None)  # of equals the newest
    chosen: dict[int, list[str]] = defaultdict(list)
    for round_ in rounds[len(rounds) - min(last, len(rounds)) :]:
        chosen[round_].append("last")
    for _, round_ in ranked[len(ranked) - min(best, len(ranked)) :]:
        chosen[round_].append("best")
    return dict(sorted(chosen.items()))


def _large_of(catalogue: Catalogue, run: Run, rounds: Iterable[int]) -> set[tuple[Name, str]]:
    """The large files of some rounds: parameters as they were when each ended, those of the reward
    model then, and its samples."""
    current: list[Name] = []
    rewards: list[Name] = []
    found = set()
    for round_, names in run.stages.items():
        # A round that trained nothing (its filter kept nothing) ends with the parameters before.
        current = [name for name in names if name[0] in TRAINED] or current
        rewards = [name for name in names if name[0] == REWARD] or rewards
        if round_ in rounds:
            found |= {(_base(catalogue, name), PARAMS_FILE) for name in [*current, *rewards]}
            found |= {(name, MOMENTS) for name in current}
            found |= {(name, SAMPLES_FILE) for name in names if name[0] == "generate"}
    return found


def _base(catalogue: Catalogue, name: Name) -> Name:
    """The stage whose parameters lie below an adapter; itself, where it trained everything."""
    while name in catalogue.manifests and PARAMS_FILE not in catalogue.manifests[name].files:
        below = catalogue.input(name, "params")
        if below is None:
            break
        name = below
    return name


def _describe(rounds: dict[int, list[str]]) -> str:
    shown = [f"{round_label(r)} ({', '.join(why)})" for r, why in rounds.items()]
    return f"parameters of {', '.join(shown) or 'no round'}"


def _stale_partials(catalogue: Catalogue, keep_open: bool) -> list[epath.Path]:
    """Folders of complete stages, and unless `keep_open` those of all others."""
    store = catalogue.store
    return [
        entry
        for stage in folders(store.root / "partial")
        for entry in folders(stage)
        if not keep_open
        or ((stage.name, entry.name) in catalogue.manifests)
        and not store.collected(stage.name, entry.name)
    ]


def execute(store: Store, what: Plan) -> None:
    """Removes what the plan names; the caller holds the gate. May be cut short and repeated."""
    for stage, key in what.remove:
        store.discard(stage, key)
        (store.root / "provenance" / stage / f"{key}.json").unlink(missing_ok=True)
    for folder in what.folders:
        if not store.local:
            folder.rmtree(missing_ok=True)
            continue
        # Renamed first: half a checkpoint must not be found under its old name. A run that starts
        # sweeps tmp/ before it comes to the gate, and may have been quicker.
        with store.scratch() as aside, contextlib.suppress(FileNotFoundError):
            os.rename(folder, aside / folder.name)
    # Last, because a marker needs a little room on a disk that may be full.
    for (stage, key), files in what.collect.items():
        entry = store.entry(stage, key)
        marker = {"removed": sorted({*files, *_marked(entry / COLLECTED)})}
        write_atomic(entry / COLLECTED, (json.dumps(marker) + "\n").encode())
        for file in files:
            (entry / file).unlink(missing_ok=True)


def _marked(marker: epath.Path) -> list[str]:
    return json.loads(marker.read_text())["removed"] if marker.exists() else []


@dataclass(frozen=True)
class Use:
    """Disk use of one stage, or of a folder beside the store."""

    entries: int = 0
    size: int = 0  # bytes

    def __add__(self, other: Use) -> Use:
        return Use(self.entries + other.entries, self.size + other.size)

    def __sub__(self, other: Use) -> Use:
        return Use(self.entries - other.entries, self.size - other.size)


def disk_use(store: Store) -> dict[str, Use]:
    """Bytes by stage under `store/`, then those of `partial/` and `tmp/`."""
    found = {stage.name: _use(folders(stage)) for stage in folders(store.root / "store")}
    partial = [entry for stage in folders(store.root / "partial") for entry in folders(stage)]
    return found | {"partial/": _use(partial), "tmp/": _use(folders(store.root / "tmp"))}


def freed(store: Store, what: Plan) -> dict[str, Use]:
    """What a plan will free, by stage as in `disk_use`; entries are those that go whole."""
    found: dict[str, Use] = defaultdict(Use)
    for name, files in what.collect.items():
        found[name[0]] += Use(0, sum(size_of(store.entry(*name) / file) for file in files))
    for name in what.remove:
        found[name[0]] += Use(1, size_of(store.entry(*name)))
    for folder in what.folders:
        top = folder.relative_to(store.root).parts[0]
        found[f"{top}/"] += Use(1, size_of(folder))
    return found


def _use(entries: list[epath.Path]) -> Use:
    return Use(len(entries), sum(map(size_of, entries)))


def size_of(path: epath.Path) -> int:
    """Bytes of a file or of all files in a folder; 0 for what has just gone."""
    return sum(_sizes(path))


def _sizes(path: epath.Path) -> Iterator[int]:
    try:
        if path.is_dir():
            for child in path.iterdir():
                yield from _sizes(child)
        else:
            yield path.stat().length
    except FileNotFoundError:
        return
