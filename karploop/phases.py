"""Phases of a run: settings that hold from a given round on, until others are laid over them.

Recipes with stages, such as supervised rounds that reinforcement learning follows, are one run with
one store: rounds are numbered on, and parameters, curriculum and held-out problems stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from karploop.errors import UserError
from karploop.schema import lay, nearest

# What a phase may change. All else belongs to the run: its model, its task, who its roles are.
CHANGED = ("generate", "judge", "filter", "noise", "preference", "objective", "train", "regime")
# … but for these: the longest problem that the program is made for, and what is trained.
_FIXED = {
    "generate": ("difficulty_step", "max_difficulty"),
    "train": ("lora",),
}


def by_phase(config: Any) -> dict[int, Any]:
    """The config that holds from each round on, the run's own at 0; in the order of rounds.

    Args:
      config: a `Config`, whose `phases` are partial settings by their first round.

    Raises:
      UserError: a phase that starts at no round, or changes what belongs to the whole run.
    """
    found = {0: config}
    for start in sorted(map(_first_round, config.phases)):
        changes = config.phases[str(start)]
        _check(changes, f"config.phases.{start}")
        found[start] = lay(list(found.values())[-1], changes)
    return found


def in_round(phases: Mapping[int, Any], index: int) -> Any:
    """What holds in a round (−1: before the first), of what is known by first round."""
    return phases[max(start for start in phases if start <= max(index, 0))]


def laid(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The same for a config that was written as JSON: nested settings by first round."""
    phases = settings.get("phases") or {}
    found = {0: dict(settings)}
    for start in sorted(phases, key=int):
        found[int(start)] = _over(list(found.values())[-1], phases[start])
    return found


@contextlib.contextmanager
def told_of(start: int) -> Iterator[None]:
    """Says of a UserError in which phase it arose, if that is not the run's first."""
    try:
        yield
    except UserError as error:
        if not start:
            raise
        raise UserError(f"in the phase from round {start} on: {error}") from error


def _first_round(name: str) -> int:
    if not name.isdecimal() or name != str(int(name)) or name == "0":
        raise UserError(
            f"'config.phases.{name}': a phase is called by the round that it starts at, 1 or "
            "later; what holds from round 0 on stands outside of phases"
        )
    return int(name)


def _check(changes: Mapping[str, Any], where: str) -> None:
    for group, keys in changes.items():
        if group not in CHANGED:
            raise UserError(
                f"'{where}.{group}' belongs to the whole run, and a phase cannot change it: "
                f"{nearest(group, CHANGED)}"
            )
        for key in _FIXED.get(group, ()):
            if key in keys:
                raise UserError(
                    f"'{where}.{group}.{key}' would change what the run's program is made for: "
                    f"set 'config.{group}.{key}', which holds for all rounds"
                )


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _over(merged[name], value) if both else value
    return merged
