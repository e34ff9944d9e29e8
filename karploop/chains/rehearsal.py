"""A chain as it may go, before anything is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from karploop.asking import Role
from karploop.chains.definition import Branch, Chain, Repeat
from karploop.chains.rendering import Templates
from karploop.chains.run import Run, Runner, Settings
from karploop.endpoints.forecast import Tally, extreme


class Rehearsal(Runner):
    """A runner whose roles count what they are asked, and make up what they say.

    A row goes as it would, until a reply is made up. From there on nobody knows whether a condition
    holds: by what the tally is for, it takes as few turns and the cheapest case, or as many and
    the dearest, for each endpoint by itself.
    """

    def __init__(
        self,
        chain: Chain,
        roles: Mapping[str, Role],
        settings: Settings,
        templates: Templates,
        tally: Tally,
    ):
        super().__init__(chain, roles, settings, templates)
        self._tally = tally

    def _again(self, step: Repeat, run: Run, turn: int) -> bool:
        if turn > 1 and step.until and run.id in self._tally.unsure:
            return self._tally.longest
        return super()._again(step, run, turn)

    def _branch(self, step: Branch, runs: list[Run], place: str) -> None:
        unsure = [run for run in runs if run.id in self._tally.unsure]
        super()._branch(step, [run for run in runs if run.id not in self._tally.unsure], place)
        if not unsure:
            return
        before, loads, ends = self._tally.loads, [], []
        for number, steps in enumerate([*step.cases.values(), step.otherwise]):
            self._tally.loads = {}
            copies = [replace(run, variables=dict(run.variables)) for run in unsure]
            self._go(steps, copies, f"{place}?{number}")
            loads.append(self._tally.loads)
            ends.append(copies)
        pick = max if self._tally.longest else min
        self._tally.loads = before
        self._tally.add(extreme(loads, pick))
        for run, *ways in zip(unsure, *ends, strict=True):
            for way in ways:
                _merge(run.variables, way.variables, self._tally.longest)


def copied(runs: Sequence[Run]) -> list[Run]:
    """Rows that may be taken through a chain without a trace."""
    return [Run(run.id, run.asked, dict(run.variables)) for run in runs]


def _merge(variables: dict[str, Any], others: Mapping[str, Any], longest: bool) -> None:
    """Of each variable the longer value, or the shorter one, as a template shows it."""
    for name, value in others.items():
        own = variables.setdefault(name, value)
        if (len(str(value)) > len(str(own))) == longest:
            variables[name] = value
