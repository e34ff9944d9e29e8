"""Filters made of filters: `chain(verifier, near_duplicates, cap)`, `all_of(threshold, length)`.

Members share the config: `rate` is the same for all of them, and is of the rows that one sees. They
read the verdicts of one judge at most, but for those that are allowed to see gold labels.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from karploop.config import FilterConfig
from karploop.errors import UserError
from karploop.filtering.registry import Filter, Said, named
from karploop.records import Samples, Selection
from karploop.schema import nearest

_FORM = "as in chain(verifier, near_duplicates, cap)"


@dataclass(frozen=True)
class Composition(Filter):
    """A filter whose function combines what its members select; it reads what they read."""

    members: tuple[Filter, ...] = ()

    @property
    def parts(self) -> tuple[Filter, ...]:
        return tuple(part for member in self.members for part in member.parts)

    @property
    def modules(self) -> tuple[str, ...]:
        inner = (module for member in self.members for module in member.modules)
        return tuple(dict.fromkeys((self.function.__module__, *inner)))

    def select(
        self, samples: Samples, said: Said, config: FilterConfig, rng: np.random.Generator
    ) -> Selection:
        return self.function(self.members, samples, said, config, rng)


def chain(
    members: Sequence[Filter],
    samples: Samples,
    said: Said,
    config: FilterConfig,
    rng: np.random.Generator,
) -> Selection:
    """Each member sees only what the former ones kept, with what was said of it.

    So shares, ranks and counts are of the rows that are left. A row has the reason of the member
    that dropped it, or those of all. A chain of one is that one.
    """
    reasons: list[list[str]] = [[] for _ in range(len(samples))]
    left = np.arange(len(samples))
    for member in members:
        found = member.select(samples.take(left), said.take(left), config, rng)
        for row, kept, reason in zip(left.tolist(), found.kept_S, found.reasons, strict=True):
            reasons[row] = [*reasons[row], reason] if kept else [reason]
        left = left[found.kept_S]
        if not len(left):
            break
    kept_S = np.zeros(len(samples), bool)
    kept_S[left] = True
    return Selection(kept_S, [_joined(of_row) for of_row in reasons])


def all_of(
    members: Sequence[Filter],
    samples: Samples,
    said: Said,
    config: FilterConfig,
    rng: np.random.Generator,
) -> Selection:
    """Keeps what every member keeps of all samples; others have the first reason to be dropped.

    What a member draws depends on its name and not on its place, so that their order decides the
    reasons alone.
    """
    seed = int(rng.integers(2**63))
    found = [
        member.select(
            samples, said, config, np.random.default_rng([seed, zlib.crc32(member.name.encode())])
        )
        for member in members
    ]
    reasons = []
    for row in range(len(samples)):
        dropped = [one.reasons[row] for one in found if not one.kept_S[row]]
        reasons.append(dropped[0] if dropped else _joined([one.reasons[row] for one in found]))
    return Selection(np.logical_and.reduce([one.kept_S for one in found]), reasons)


def _joined(reasons: Sequence[str]) -> str:
    """Every reason once, whether a member has it or a member of a member."""
    return "; ".join(dict.fromkeys(part for reason in reasons for part in reason.split("; ")))


_COMPOSITIONS: dict[str, Callable[..., Selection]] = {"chain": chain, "all_of": all_of}


def get_filter(name: str, key: str = "config.filter.name") -> Filter:
    """The filter called `name`, the one at "package.module:ATTRIBUTE", or a composition of such.

    Args:
      key: where the name is from, for errors.

    Raises:
      UserError: there is none; the message has the nearest name, or how to write a composition.
    """
    text = name.strip()
    if text in _COMPOSITIONS:
        raise UserError(f"'{key}' is '{name}', which combines filters: name them, {_FORM}")
    if not set("(),") & set(text):
        return named(text, key, _COMPOSITIONS)
    match = re.fullmatch(r"(\w+)\s*\((.*)\)", text, re.S)
    texts = _split(match[2]) if match else []
    if not texts or not all(texts):
        raise UserError(f"'{key}' is '{name}': write a name, or names in brackets, {_FORM}")
    if match[1] not in _COMPOSITIONS:
        raise UserError(f"'{key}' is '{name}': {nearest(match[1], _COMPOSITIONS)}")
    members = tuple(get_filter(part, key) for part in texts)
    names = [member.name for member in members]
    if match[1] == "all_of" and len(set(names)) < len(names):
        raise UserError(f"'{key}' is '{name}', which names a filter twice: keep one of them")
    whole = f"{match[1]}({', '.join(names)})"
    return Composition(whole, _COMPOSITIONS[match[1]], members=members)


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket; none where brackets do not match."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            return []
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [] if depth else [part.strip() for part in parts]
