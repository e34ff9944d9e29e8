"""Rows through a chain, all of them a step at a time.

Each step is one call of its role for all the rows that have come to it, so that a thousand rows
cost as many calls as a chain has steps. What a row draws depends on the seed, the step, the turn
and the row's id alone: rows can be cut into parts and done in any order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError

from karploop.asking import Asked, How, Role
from karploop.chains.definition import Ask, Branch, Chain, Draw, Let, Repeat, Step
from karploop.chains.rendering import Templates
from karploop.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What steps leave open."""

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # of steps without a template


@dataclass
class Run:
    """One row on its way.

    Attributes:
      asked: what a step without a template asks.
      variables: the row's fields, and what steps have added.
      steps: every text so far: {step, role, prompt, text}, `value`, where that is not the text,
        and `cut`, where it did not end before the most tokens.
      error: why the row went no further; empty while it does.
    """

    id: int
    asked: Asked
    variables: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    tokens: int = 0

    def whole(self, output: str) -> bool:
        """Whether the text that became `output` (else the last one) ended by itself."""
        named = [step for step in self.steps if step["step"] == output] or self.steps
        return bool(named) and not named[-1].get("cut", False)


class Runner:
    """A chain with its templates and roles."""

    def __init__(
        self, chain: Chain, roles: Mapping[str, Role], settings: Settings, templates: Templates
    ):
        self._chain, self._roles, self._settings = chain, roles, settings
        self._templates = templates

    def run(self, runs: list[Run]) -> None:
        """Takes all the rows to their last step; the result is the variable `chain.output`.

        Raises:
          UserError: a template reads a variable that a row does not have.
        """
        self._go(self._chain.steps, runs, place="")

    def _go(self, steps: Sequence[Step], runs: list[Run], place: str) -> None:
        """All the rows through all the steps; `place` names where that is."""
        for number, step in enumerate(steps):
            going = [run for run in runs if not run.error]
            if not going:
                return
            here = f"{place}/{number}"
            match step:
                case Ask():
                    self._ask(step, going, here)
                case Let():
                    for run in going:
                        run.variables[step.name] = step.value(run.variables)
                case Draw():
                    for run in going:
                        rng = np.random.default_rng([self._settings.seed, _number(here), run.id])
                        run.variables[step.name] = step.options[rng.integers(len(step.options))]
                case Repeat():
                    self._repeat(step, going, here)
                case Branch():
                    self._branch(step, going, here)

    def _repeat(self, step: Repeat, runs: list[Run], place: str) -> None:
        for turn in range(1, step.times + 1):
            runs = [run for run in runs if not run.error and self._again(step, run, turn)]
            for run in runs:
                run.variables["turn"] = turn
            self._go(step.steps, runs, f"{place}#{turn}")

    def _again(self, step: Repeat, run: Run, turn: int) -> bool:
        """Whether the row takes this turn, having taken the one before."""
        return turn == 1 or not step.until or not step.until(run.variables)

    def _branch(self, step: Branch, runs: list[Run], place: str) -> None:
        cases = [*step.cases.items(), (None, step.otherwise)]
        parts: list[list[Run]] = [[] for _ in cases]
        for run in runs:
            value = run.variables[step.on]
            known = [i for i, (case, _) in enumerate(cases[:-1]) if case == value]
            parts[known[0] if known else -1].append(run)
        for i, ((_, steps), part) in enumerate(zip(cases, parts, strict=True)):
            self._go(steps, part, f"{place}?{i}")

    def _ask(self, step: Ask, runs: list[Run], place: str) -> None:
        settings = self._settings
        prompts = [self._prompt(step, run) for run in runs]
        how = How(
            seed=(settings.seed, _number(place)),
            max_new_tokens=step.max_new_tokens or settings.max_new_tokens,
            temperature=settings.temperature if step.temperature is None else step.temperature,
            top_p=settings.top_p,
            stop=step.stop or (() if step.template else settings.stop),
        )
        said = self._roles[step.role].complete(prompts, [run.id for run in runs], how)
        for run, prompt, answer in zip(runs, prompts, said, strict=True):
            record = {"step": step.name, "role": step.role, "prompt": prompt, "text": answer.text}
            run.steps.append(record)
            run.tokens += answer.spent.tokens_out
            if not answer.finished:
                record["cut"] = True
            if answer.text is None:
                run.error = f"step '{step.name}': {answer.error}"
                record["error"] = answer.error
                continue
            value = step.parse(answer.text)
            run.variables[step.name] = value
            if value != answer.text.strip():
                record["value"] = value

    def _prompt(self, step: Ask, run: Run) -> Asked:
        if not step.template:
            return run.asked
        try:
            return self._templates[step.template].render(run.variables)
        except TemplateError as error:
            raise UserError(
                f"chain '{self._chain.name}', step '{step.name}': template '{step.template}' "
                f"cannot be filled in for row {run.id} ({error}); what there is: "
                f"{', '.join(sorted(run.variables))}"
            ) from error


def _number(place: str) -> int:
    """32 bits that tell places apart in the random stream."""
    return zlib.crc32(place.encode())
