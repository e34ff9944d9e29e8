"""Which collectives a compiled program holds, how often they run and what they move.

Read from the text of the optimised program. The body of a loop stands there once: its collectives
count as often as the loop goes round, which is told by the constant that its condition compares
with, by `known_trip_count`, or, where it ends by what is computed, by the caller. A collective that
the compiler cut into a start, steps beside other work and an end keeps one channel and counts once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TO_APPLY = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
_KNOWN = re.compile(r'known_trip_count"?:?=?\{"?n"?[:=]"?(\d+)')
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((-?\d+)\)")
_COMPARE = re.compile(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=(\w+)")
_SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      axes: of the mesh, over which its groups go.
      group: devices in each.
      count: how often it runs.
      moved: bytes that each device sends when it runs once, on a ring.
      assumed: its loop's length was given by the caller, and is not in the program.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    moved: float
    assumed: bool = False

    @property
    def total(self) -> float:
        """Bytes that each device sends."""
        return self.count * self.moved


def collectives(text: str, mesh: Mapping[str, int], open_loops: int = 1) -> list[Collective]:
    """The collectives of a program for a mesh of named axes, as `Compiled.as_text()` shows it.

    Args:
      open_loops: rounds of a loop whose number the program does not say; inside such a loop, one.
    """
    computations = dict(_computations(text))
    entry = next(name for name, (first, _) in computations.items() if first)
    found: dict[object, Collective] = {}

    def visit(name: str, times: int, assumed: bool) -> None:
        for line in computations.get(name, (False, []))[1]:
            if match := _COLLECTIVE.search(line):
                one = _read(line, *match.groups(), name, mesh, times, assumed)
                channel = _CHANNEL.search(line)
                key = (one.kind, channel[1]) if channel else (name, line)
                if key not in found or found[key].count < times:
                    found[key] = one
            elif match := _WHILE.search(line):
                condition, body = match.groups()
                rounds = _rounds(line, computations[condition][1])
                known = rounds is not None
                rounds = rounds if known else 1 if assumed else open_loops
                for part in (body, condition):
                    visit(part, times * rounds, assumed or not known)
            else:
                for part in _parts(line):
                    visit(part, times, assumed)

    visit(entry, 1, False)
    return [one for one in found.values() if one.group > 1 and one.count]


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """Each computation's name, whether it is the entry, and its instructions."""
    name, lines, first = "", [], False
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            first, name, lines = bool(match[1]), match[2], []
        elif line.startswith("}") and name:
            yield name, (first, lines)
            name = ""
        elif name:
            lines.append(line)


def _parts(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    yield from _TO_APPLY.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _rounds(line: str, condition: list[str]) -> int | None:
    """How often a loop goes round that counts from 0; None: the program does not say."""
    if match := _KNOWN.search(line):
        return int(match[1])
    constants = dict(match.groups() for each in condition if (match := _CONSTANT.search(each)))
    for each in condition:
        match = _COMPARE.search(each)
        if match and match[2] in constants and match[3] in ("LT", "LE", "NE"):
            return int(constants[match[2]]) + (match[3] == "LE")
    return None


def _read(line, shape, kind, start, inside, mesh, times, assumed) -> Collective:
    ids = _group(line, math.prod(mesh.values()))
    at = np.array(np.unravel_index(ids, tuple(mesh.values())))
    axes = tuple(axis for axis, row in zip(mesh, at, strict=True) if len(set(row.tolist())) > 1)
    sizes = [_bytes(*one) for one in _SHAPE.findall(shape)]
    if start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # inputs stand before results
    elif kind == "collective-permute":
        sizes = sizes[:1]
    size, n = sum(sizes), len(ids)
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size / n  # of which each device keeps a part
    moved = {
        "all-reduce": 2 * size * (n - 1) / n,
        "reduce-scatter": size * (n - 1),
        "collective-permute": size,
    }.get(kind, size * (n - 1) / n)
    return Collective(kind, axes, n, times, moved, assumed)


def _bytes(dtype: str, shape: str) -> float:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return bits / 8 * math.prod(int(n) for n in shape.split(",") if n)


def _group(line: str, devices: int) -> np.ndarray:
    """The device numbers of a collective's first group, or of a permutation's first pair."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        pairs = re.findall(r"\{(\d+),(\d+)\}", line[match.start() :].split("}}")[0] + "}")
        pair = next((p for p in pairs if p[0] != p[1]), pairs[0])
        return np.array(pair, int)
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return np.array(match[1].split(","), int)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = (tuple(map(int, x.split(","))) if x else () for x in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)[0]
    if match := _NAMED.search(line):
        return _by_names(*match.groups())
    if "replica_groups=" not in line or "replica_groups={}" in line:
        return np.arange(devices)
    raise ValueError(f"replica groups in a form that is not known: {line.strip()[:400]}")


_NAMED = re.compile(
    r"replica_groups=@?mesh\w*\[([^\]]*)\]"
    r"(?:,?\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)


def _by_names(axes: str, dims: str | None, order: str | None, over: str) -> np.ndarray:
    """The first group, said by axes: whole as 'a', or cut as 'a':(2)4, the 4 behind 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if dims and order:
        ids = ids.reshape([*map(int, dims.split(","))]).transpose([*map(int, order.split(","))])
    ids = ids.reshape(tuple(sizes.values()))
    index: list = [np.zeros(1, int)] * len(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        whole = sizes[name]
        taken = np.arange(whole)
        if size:  # the axis as (before, size, rest), of which the middle goes
            taken = taken.reshape(int(before), int(size), -1)[0, :, 0]
        index[list(sizes).index(name)] = taken
    return ids[np.ix_(*index)].ravel()
