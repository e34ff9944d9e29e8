"""What a chain is made of.

A chain is data: a tuple of steps over a row's variables. The row's own fields are variables from
the start; a step adds one under its name, which later templates and conditions read.

    Chain("polite", (Ask("draft"), Ask("output", "polish.jinja", role="editor")))

Templates are jinja files: those in `templates/`, or at a path of one's own. They render the row's
variables and are never made from them, so that what a model writes is data and not a template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Ask:
    """A role completes a template; the text, or what is parsed of it, becomes a variable.

    Attributes:
      name: of the variable.
      parse: from the text to a value; None is "cannot be read", which is a value of its own.
      template: of the prompt; empty: the row as it is, its `prompt` or its `messages`.
      temperature, max_new_tokens: None: the job's.
      stop: strings before which the completion is cut.
    """

    name: str
    template: str = ""
    role: str = "policy"
    parse: Callable[[str], Any] = str.strip
    temperature: float | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Let:
    """A variable computed from others."""

    name: str
    value: Callable[[Variables], Any]


@dataclass(frozen=True)
class Draw:
    """A variable drawn from a list, anew for every row and turn."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Repeat:
    """Steps again and again: `times` times, or until the condition holds.

    The variable `turn` counts from 1. The condition is looked at before every turn but the first.
    """

    steps: tuple[Step, ...]
    times: int
    until: Callable[[Variables], bool] | None = None


@dataclass(frozen=True)
class Branch:
    """The steps of one case, by the value of a variable; `otherwise` where there is none."""

    on: str
    cases: Mapping[Any, tuple[Step, ...]]
    otherwise: tuple[Step, ...] = ()


Step = Ask | Let | Draw | Repeat | Branch


@dataclass(frozen=True)
class Chain:
    """Steps, and the variable that is their result."""

    name: str
    steps: tuple[Step, ...]
    output: str = "output"

    def asks(self) -> Iterator[Ask]:
        """Every place where a role is asked."""
        return (step for step in _all(self.steps) if isinstance(step, Ask))

    def draws(self) -> Iterator[Draw]:
        """Every place where something is drawn from a list."""
        return (step for step in _all(self.steps) if isinstance(step, Draw))

    def with_templates(self, other: Callable[[str], str]) -> Chain:
        """The same with another template for each, by its name."""
        return replace(self, steps=_with_templates(self.steps, other))


def _all(steps: Sequence[Step]) -> Iterator[Step]:
    """Steps, and those within them."""
    for step in steps:
        yield step
        match step:
            case Repeat():
                yield from _all(step.steps)
            case Branch():
                for case in (*step.cases.values(), step.otherwise):
                    yield from _all(case)


def _with_templates(steps: Sequence[Step], other: Callable[[str], str]) -> tuple[Step, ...]:
    def changed(step: Step) -> Step:
        match step:
            case Ask() if step.template:
                return replace(step, template=other(step.template))
            case Repeat():
                return replace(step, steps=_with_templates(step.steps, other))
            case Branch():
                cases = {on: _with_templates(of, other) for on, of in step.cases.items()}
                return replace(step, cases=cases, otherwise=_with_templates(step.otherwise, other))
        return step

    return tuple(changed(step) for step in steps)
