"""Every stage and every run of a workdir, read once, and how they hang together.

A stage's key holds the *contents* of its inputs, not their keys, so two stages that wrote the same
bytes share what follows from them, and a manifest names only the one that came first. Edges are
therefore followed by content.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from karploop.errors import UserError
from karploop.files import read_whole
from karploop.phases import laid
from karploop.store import Corrupt, Manifest, Store

Name = tuple[str, str]  # stage and key
TRAINED = ("warmup", "import", "train")  # stages that write parameters, or say where they are
REWARD = "reward"  # … those of a reward model, which a round trains in place of the policy
LEARNT = (*TRAINED, REWARD)
SEED = "seed"  # stage of the labelled rows, and their `source` in rows.parquet
# By stage, settings that it has as of its round, where the config has those of all rounds.
OF_ROUND = {"filter": ("threshold", "agreement")}


@dataclass(frozen=True)
class Run:
    """A run directory, as far as the store is concerned."""

    name: str
    config: dict[str, Any]  # {} where config.json is missing
    summary: dict[str, Any]  # {} before the base is measured

    @property
    def complete(self) -> bool:
        return bool(self.summary.get("complete"))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return sorted(self.summary.get("rounds", []), key=lambda entry: entry["round"])

    @property
    def stages(self) -> dict[int, list[Name]]:
        """By round: the run's own stages ('train.1' in a summary is the second member's)."""
        return {
            entry["round"]: [(s.partition(".")[0], key) for s, key in entry["stages"].items()]
            for entry in self.rounds
        }


@dataclass(frozen=True)
class Catalogue:
    """Every manifest and every run of one workdir, read once, and the edges between them."""

    store: Store
    manifests: dict[Name, Manifest]
    damaged: list[Name]  # entries without a manifest that can be read
    runs: list[Run]

    @cached_property
    def content(self) -> dict[Name, str]:
        return {name: manifest.content for name, manifest in self.manifests.items()}

    @cached_property
    def by_content(self) -> dict[str, list[Name]]:
        found = defaultdict(list)
        for name, content in self.content.items():
            found[content].append(name)
        return found

    @cached_property
    def used_by(self) -> dict[Name, list[dict[str, Any]]]:
        """By stage: the runs that it belongs to, and the round in which it did."""
        found: dict[Name, list[dict[str, Any]]] = defaultdict(list)
        for run in self.runs:
            for round_, names in run.stages.items():
                for name in names:
                    found[name].append({"run": run.name, "round": round_})
        return found

    @cached_property
    def trained(self) -> list[Name]:
        """Stages that wrote parameters, in the order of their rounds."""
        found = [name for name in self.manifests if name[0] in LEARNT]
        return sorted(found, key=lambda name: (round_of(self.manifests[name]), name))

    def resolve(self, reference: Mapping[str, str]) -> Name | None:
        """The stage that holds an input's content; None where no stage does any more."""
        name = (reference["stage"], reference["key"])
        if self.content.get(name) == reference["content"]:
            return name
        return next(iter(self.by_content.get(reference["content"], [])), None)

    def input(self, name: Name, role: str) -> Name | None:
        """The stage behind one input of another."""
        reference = self.manifests[name].inputs.get(role)
        return self.resolve(reference) if reference else None

    def readers(self, name: Name, stages: Iterable[str], role: str) -> list[Name]:
        """The stages that had this one's content as the input `role`, or as `role`0, `role`1, …"""
        content, found = self.content[name], []
        for reader, manifest in self.manifests.items():
            if reader[0] in stages and any(
                reference["content"] == content and (r == role or r.startswith(f"{role}_"))
                for r, reference in manifest.inputs.items()
            ):
                found.append(reader)
        return sorted(found, key=lambda n: (round_of(self.manifests[n]), n))

    def ancestors(self, names: Iterable[Name]) -> set[Name]:
        """These stages and all that they were made from."""
        found: set[Name] = set()
        waiting = [name for name in names if name in self.manifests]
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found.add(name)
            for reference in self.manifests[name].inputs.values():
                named = (reference["stage"], reference["key"])
                waiting += [n for n in (named, self.resolve(reference)) if n in self.manifests]
        return found

    def reach(self, config: Mapping[str, Any]) -> set[Name]:
        """Every stage that a run of this config could have made, or could find and use.

        A superset: a stage is left out only where its randomness, its settings or its inputs
        cannot be the run's. Without a config nothing is left out.
        """
        if "seed" not in config:
            return set(self.manifests)
        phases = laid(config).values()
        waiting = {
            name: manifest
            for name, manifest in self.manifests.items()
            if any(_may_belong(manifest, phase) for phase in phases)
        }
        found: set[Name] = set()
        contents: set[str] = set()
        while True:
            new = {
                name
                for name, manifest in waiting.items()
                if all(r["content"] in contents for r in manifest.inputs.values())
            }
            if not new:
                return found
            found |= new
            contents |= {self.content[name] for name in new}
            waiting = {n: m for n, m in waiting.items() if n not in new}


def _may_belong(manifest: Manifest, config: Mapping[str, Any]) -> bool:
    """Whether a stage's randomness and settings could be those of a run of this config."""
    rng = manifest.rng
    if rng and (rng["seed"] != config["seed"] or rng["member"] >= config.get("members", 1)):
        return False
    section = config.get("task" if manifest.stage == SEED else manifest.stage)
    known = dict(section) if isinstance(section, Mapping) else {}
    if manifest.stage == SEED:
        known.pop("name", None)  # a stage has the task's content there, too
    for name in OF_ROUND.get(manifest.stage, ()):
        known.pop(name, None)
    if not (config.get("roles") or {}).get("policy", {}).get("path"):  # which brings its own
        known["model"] = config.get("model")
    return all(value == known[k] for k, value in manifest.config.items() if k in known)


def read_catalogue(store: Store) -> Catalogue:
    """Reads all manifests, then all runs: a stage that is listed belongs to a run that is, too.

    Raises:
      UserError: there is no store, or a run's config or summary cannot be read.
    """
    require_store(store)
    folder = store.root / "store"
    names = [(stage.name, e.name) for stage in folders(folder) for e in folders(stage)]

    def read(name: Name) -> Manifest | None:
        try:
            return store.manifest(*name)
        except Corrupt:
            return None

    with ThreadPoolExecutor(16) as pool:
        read_names = dict(zip(names, pool.map(read, names), strict=True))
    return Catalogue(
        store,
        {name: manifest for name, manifest in read_names.items() if manifest},
        [name for name, manifest in read_names.items() if not manifest],
        _runs(store.root / "runs"),
    )


def require_store(store: Store) -> None:
    """Raises UserError where no run has ever written."""
    if not (store.root / "store").exists():
        raise UserError(
            f"no store in '{store.root}': --workdir wants the directory that runs were given"
        )


def folders(path: epath.Path) -> list[epath.Path]:
    """The folders in a folder, by name; none where it does not exist."""
    if not path.exists():
        return []
    return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir())


def _runs(folder: epath.Path, prefix: str = "") -> list[Run]:
    found = []
    for path in folders(folder):
        config, summary = path / "config.json", path / "summary.json"
        if config.exists() or summary.exists():
            found.append(Run(prefix + path.name, _read_json(config), _read_json(summary)))
        else:  # a run's name may have slashes
            found += _runs(path, f"{prefix}{path.name}/")
    return found


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(read_whole(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"'{path}' cannot be read ({error}): start its run again, which writes it anew, or "
            "delete the run's folder"
        ) from error
    return value if isinstance(value, dict) else {}


def round_of(manifest: Manifest) -> int:
    """The round of a stage's randomness: −1 for the base, 0 for a stage that has none."""
    return (manifest.rng or {}).get("round", 0)


def member_of(manifest: Manifest) -> int:
    return (manifest.rng or {}).get("member", 0)


def mean_exact_match(evals: Mapping[str, Any]) -> float | None:
    """Mean held-out accuracy over tasks and difficulties; None where nothing was measured."""
    values = [v for k, v in evals.items() if k.endswith("/exact_match") and v is not None]
    return sum(values) / len(values) if values else None
