"""What a filter is, and those that are known by a name.

A filter is a pure function from samples, and the verdicts of the one judge that it declares, to a
selection. It never sees a gold answer; the filter that keeps what is right by gold is called
`verifier`, after the judge it reads, and `oracle`, a diagnostic, has to be allowed by the config.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from karploop.config import FilterConfig
from karploop.errors import UserError
from karploop.records import Samples, Selection, Verdicts
from karploop.schema import nearest

SCORES = "scores"
GOLD = "gold"
NO_VERDICT = "no verdict"  # the reason for which every filter drops what has none

Function = Callable[[Samples, Verdicts | None, FilterConfig, np.random.Generator], Selection]

_KEYS = tuple(field.name for field in dataclasses.fields(FilterConfig))
_NOBODYS = ("name", "match", "on_empty", "allow_gold")  # decide what runs, not what it selects


@dataclass(frozen=True)
class Said:
    """What judges said of the samples.

    Attributes:
      verdicts: of the judge that the filters of a run read, if they read one.
      gold: of the verifier, for the filters that are allowed to see gold labels.
    """

    verdicts: Verdicts | None = None
    gold: Verdicts | None = None

    def take(self, rows: np.ndarray) -> Said:
        """What was said of these rows."""
        return Said(
            self.verdicts and self.verdicts.take(rows),
            self.gold and self.gold.take(rows),
        )


@dataclass(frozen=True)
class Filter:
    """A filter, the judge whose verdicts it reads, and the settings that it reads.

    Attributes:
      judge: None: it reads none; SCORES: those of whichever `config.judge.name` says; GOLD: those
        of the verifier, beside what the other filters of a run read.
      keys: of FilterConfig, those that decide what it selects, which are all that it sees: others
        have their defaults for it. None: it may read any.

    Raises:
      UserError: `keys` has one that the config has not.
    """

    name: str
    function: Function
    judge: str | None = None
    keys: tuple[str, ...] | None = None

    def __post_init__(self):
        for key in self.keys or ():
            if key not in _KEYS:
                raise UserError(
                    f"the filter '{self.name}' reads 'config.filter.{key}': {nearest(key, _KEYS)}"
                )

    @property
    def parts(self) -> tuple[Filter, ...]:
        """The filters that it is made of: itself alone, where it is no composition."""
        return (self,)

    @property
    def judges(self) -> frozenset[str]:
        """The judges that its parts declare, GOLD aside."""
        return frozenset(part.judge for part in self.parts if part.judge) - {GOLD}

    @property
    def reads_gold(self) -> bool:
        return any(part.judge == GOLD for part in self.parts)

    @property
    def modules(self) -> tuple[str, ...]:
        """Where its code is, and where the values of a "package.module:ATTRIBUTE" are."""
        home, _, attribute = self.name.partition(":")
        return (self.function.__module__, *([home] if attribute else ()))

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of FilterConfig that decide its selection, in their order there."""
        if any(part.keys is None for part in self.parts):
            return tuple(key for key in _KEYS if key not in _NOBODYS)
        read = {key for part in self.parts for key in part.keys}
        # Whether a missing verdict stops the run; so found in the store, it must not have passed.
        read |= {"missing"} if self.judges or self.reads_gold else set()
        return tuple(key for key in _KEYS if key in read)

    def settings(self, config: FilterConfig) -> dict[str, Any]:
        """The name, and what of the config decides the selection."""
        given = asdict(config)
        return {"name": self.name} | {key: given[key] for key in self.reads}

    def select(
        self, samples: Samples, said: Said, config: FilterConfig, rng: np.random.Generator
    ) -> Selection:
        """The function's selection, from what the filter declares to read.

        Raises:
          UserError: it does not speak of each row.
        """
        if self.keys is not None:
            given = asdict(config)
            config = dataclasses.replace(FilterConfig(), **{key: given[key] for key in self.keys})
        verdicts = said.gold if self.judge == GOLD else said.verdicts if self.judge else None
        selection = self.function(samples, verdicts, config, rng)
        if len(selection) != len(samples):
            raise UserError(
                f"the filter '{self.name}' gave a selection of {len(selection)} rows for "
                f"{len(samples)} samples: it wants a decision and a reason for every one"
            )
        return selection


_FILTERS: dict[str, Filter] = {}


def register(
    name: str, judge: str | None = None, keys: Collection[str] | None = None
) -> Callable[[Function], Filter]:
    """Decorator that makes a function a filter known by `name`; the rest as in `Filter`.

    With `keys`, runs that differ in other keys of the filter share its stage in the store. Without,
    every key may change what the filter does, and any of them makes another stage.
    """

    def wrap(function: Function) -> Filter:
        _FILTERS[name] = Filter(name, function, judge, None if keys is None else tuple(keys))
        return _FILTERS[name]

    return wrap


def named(name: str, key: str, others: Collection[str] = ()) -> Filter:
    """The filter called `name`, or the one that "package.module:ATTRIBUTE" names.

    Args:
      key: where the name is from, for errors.
      others: further names that may have been meant.

    Raises:
      UserError: there is none; the message has the nearest name.
    """
    if name in _FILTERS:
        return _FILTERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UserError(f"'{key}' is '{name}': {nearest(name, [*_FILTERS, *others])}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"'{key}' is '{name}', which cannot be imported ({error}): check that "
            "the module is on PYTHONPATH and has that attribute"
        ) from error
    if not isinstance(found, Filter):
        raise UserError(f"'{name}' is not a filter: decorate its function with filters.register")
    return dataclasses.replace(found, name=name)


def decide(samples: Samples, *tests: tuple[np.ndarray, str], kept: str) -> Selection:
    """Drops each row for the first test that it fails; the rest are kept for the reason `kept`.

    Completions that did not reach the stop token are dropped by every filter: a row that never
    ends is not a text to train on.

    Args:
      tests: (passed_S, reason for dropping where false).
    """
    reasons = np.full(len(samples), kept, dtype=object)
    for passed_S, reason in reversed([(samples.finished_S, "did not end"), *tests]):
        reasons = np.where(passed_S, reasons, reason)
    kept_S = np.logical_and.reduce([samples.finished_S, *(passed for passed, _ in tests)])
    return Selection(kept_S=kept_S, reasons=reasons.tolist())


def wanted(config: FilterConfig, samples: Samples) -> int:
    """How many rows to keep, by `count`, or else as the share `rate` of all samples."""
    return config.count if config.count >= 0 else round(config.rate * len(samples))


def chosen_rows(samples: Samples, rows) -> np.ndarray:
    """True for these rows: chosen_S."""
    chosen_S = np.zeros(len(samples), bool)
    chosen_S[rows] = True
    return chosen_S


def best_first(samples: Samples, score_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows that ended and have a verdict, the highest score first; who of equals, is drawn."""
    eligible = rng.permutation(np.flatnonzero(samples.finished_S & ~np.isnan(score_S)))
    return eligible[np.argsort(-score_S[eligible], kind="stable")]


def rows_by_prompt(samples: Samples, rows: np.ndarray) -> dict[int, list[int]]:
    """Prompt id → its rows among `rows`, in their order."""
    found: dict[int, list[int]] = {}
    for row in rows.tolist():
        found.setdefault(int(samples.prompt_id_S[row]), []).append(row)
    return found
