"""Sweeps as data: pure functions over lists of config overrides, and the arms they make.

    arms = name_arms(seeds(product(over("filter.name", ["vote", "length"]),
                                   over("generate.samples", [1, 4])), 3))

is twelve arms. An override maps a dotted config key to a value, as in `{"filter.name": "vote"}`.
A sweep lives in `experiments/ablations/NAME/sweep.py`, whose `get_sweep(arg)` returns a `Sweep`.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from karploop.errors import UserError
from karploop.schema import nearest

Overrides = dict[str, Any]

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABLATIONS = ROOT / "experiments" / "ablations"
SEED = "seed"
_LONGEST_NAME = 120  # characters; file systems allow 255, a sweep's name and ".log" come on top
_SAFE = re.compile(r"[A-Za-z0-9._=-]+")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One config of a sweep: the sweep's config with some keys overridden."""

    name: str
    overrides: Overrides
    label: str = ""  # what tables call it and its like under other seeds; empty: its overrides

    @property
    def group(self) -> str:
        """The name that this arm shares with those that differ from it by seed alone."""
        return self.label or name_overrides({k: v for k, v in self.overrides.items() if k != SEED})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Arms over one config, and what to report of them.

    Raises:
      UserError: no arms, two arms of one name, or a name unfit for a file.
    """

    config: str  # "configs/NAME.py" or "configs/NAME.py:ARG"
    arms: Sequence[Arm]
    title: str
    metrics: Sequence[str] = ()  # columns of the table; empty: mean accuracy of each task
    baseline: str = ""  # group that the others are compared with; empty: that of the first arm
    name: str = ""  # set by `load_sweep`

    def __post_init__(self):
        if not self.arms:
            raise UserError(f"the sweep '{self.title}' has no arms")
        for arm in self.arms:
            if not isinstance(arm, Arm):
                raise UserError(
                    f"the sweep '{self.title}' has {arm!r} where an Arm should be: "
                    "make arms of override dicts with sweeps.name_arms"
                )
            if not _SAFE.fullmatch(arm.name) or arm.name.startswith("."):
                raise UserError(f"arm name '{arm.name}': use letters, digits and . _ = - only")
        _refuse_duplicates([arm.name for arm in self.arms], "arm")

    def run_name(self, arm: Arm) -> str:
        """The arm's run under `WORKDIR/runs/`; two sweeps of one workdir never share a run."""
        return f"{self.name}__{arm.name}" if self.name else arm.name


def over(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One override for each value of one key."""
    return chain([{key: value} for value in values])


def product(*lists: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of one entry from each list; the last list varies fastest."""
    return chain([_merge(combination) for combination in itertools.product(*lists)])


def zipit(*lists: Sequence[Overrides]) -> list[Overrides]:
    """The first entries of all lists together, the second ones together, and so on.

    Raises:
      UserError: the lists differ in length.
    """
    if len({len(entries) for entries in lists}) > 1:
        raise UserError(
            f"zipit wants lists of one length, got lengths {', '.join(str(len(e)) for e in lists)}"
        )
    return chain([_merge(entries) for entries in zip(*lists, strict=True)])


def chain(*lists: Sequence[Overrides]) -> list[Overrides]:
    """The lists one after the other.

    Raises:
      UserError: an entry comes twice.
    """
    entries = [dict(entry) for entries in lists for entry in entries]
    _refuse_duplicates([_canonical(entry) for entry in entries], "overrides")
    return entries


def seeds(arms: Sequence[Overrides], n: int) -> list[Overrides]:
    """Each entry under the seeds 0 … n−1."""
    return product(arms, over(SEED, range(n)))


def fix(arms: Sequence[Overrides], **overrides: Any) -> list[Overrides]:
    """Each entry with further keys; write a dotted key as `**{"filter.name": "vote"}`."""
    return product(arms, [overrides])


def name_arms(entries: Sequence[Overrides]) -> list[Arm]:
    """Names each entry after its overrides; the name does not depend on the other entries.

    Raises:
      UserError: an entry comes twice.
    """
    return [Arm(name_overrides(entry), entry) for entry in chain(entries)]


def label_arms(entries: Mapping[str, Overrides], n: int) -> list[Arm]:
    """Each entry under the seeds 0 … n−1, called by its label rather than by its overrides."""
    return [
        Arm(f"{label}__{SEED}={seed}", overrides | {SEED: seed}, label)
        for label, overrides in entries.items()
        for seed in range(n)
    ]


def name_overrides(overrides: Overrides) -> str:
    """A name fit for a file, `KEY=VALUE__KEY=VALUE`: keys by alphabet, the seed last.

    Where characters had to be replaced or the name is too long, a hash keeps it unique.
    """
    keys = sorted(overrides, key=lambda key: (key == SEED, key))
    plain = "__".join(f"{key}={override_text(overrides[key])}" for key in keys) or "default"
    plain = plain.replace(", ", "-")
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", plain).strip("-")
    if name == plain and len(name) <= _LONGEST_NAME:
        return name
    mark = hashlib.sha256(_canonical(overrides).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{mark}"


def override_text(value: Any) -> str:
    """A value as it is written after `--config.KEY=`; lists are separated by commas."""
    if isinstance(value, list | tuple):
        return ", ".join(override_text(item) for item in value)
    return str(value)


def load_sweep(spec: str) -> Sweep:
    """Finds and evaluates a sweep.

    Args:
      spec: `NAME` or `experiments/ablations/NAME` or a path to a sweep's file, each with an
        optional `:ARG` that its `get_sweep` receives.

    Raises:
      UserError: there is no such sweep, or its file does not define one.
    """
    location, _, arg = spec.partition(":")
    path = _sweep_file(location)
    module_spec = importlib.util.spec_from_file_location(f"karploop_sweep_{path.parent.name}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"'{path}' defines no get_sweep(arg)")
    try:
        sweep = module.get_sweep(arg or None)
    except ValueError as error:
        raise UserError(f"'{path}' refuses the argument '{arg}': {error}") from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep in '{path}' returned {sweep!r}, not a karploop.sweeps.Sweep")
    return dataclasses.replace(sweep, name=sweep_name(spec))


def sweep_name(spec: str) -> str:
    """The folder under `WORKDIR/sweeps/` of a sweep named as for `load_sweep`."""
    location, _, arg = spec.partition(":")
    path = pathlib.PurePath(location)
    if path.suffix == ".py":
        path = path.parent if path.stem == "sweep" and path.parent.name else path.with_suffix("")
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", f"{path.name}-{arg}" if arg else path.name)


def _sweep_file(location: str) -> pathlib.Path:
    path = pathlib.Path(location)
    for candidate in (
        path,
        path / "sweep.py",
        ROOT / path / "sweep.py",
        ABLATIONS / path / "sweep.py",
    ):
        if candidate.suffix == ".py" and candidate.is_file():
            return candidate.resolve()
    known = [found.parent.name for found in ABLATIONS.glob("*/sweep.py")]
    hint = nearest(path.name, known) if known else f"there are none in '{ABLATIONS}'"
    raise UserError(f"no sweep '{location}': {hint}")


def _merge(parts: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise UserError(f"the key '{min(twice)}' is set by two parts of one combination")
        merged |= part
    return merged


def _canonical(overrides: Overrides) -> str:
    return json.dumps(overrides, sort_keys=True, default=str)


def _refuse_duplicates(items: Sequence[str], what: str) -> None:
    seen = set()
    for item in items:
        if item in seen:
            raise UserError(f"{what} {item} come twice in a sweep: keep one")
        seen.add(item)
