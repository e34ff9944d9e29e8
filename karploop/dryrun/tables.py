"""Tables of what dry runs wrote into a folder."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from etils import epath

from karploop.dryrun.advice import GIB
from karploop.dryrun.programs import ROLLOUT, SCORE, STEP
from karploop.errors import UserError
from karploop.files import write_atomic

_MODEL = "| model | devices | data × fsdp × tensor | program |"
_MEMORY = f"{_MODEL} rows / parts | remat | GiB: arguments | temporaries | peak | of | fits |"
_TRAFFIC = f"{_MODEL} TFLOPs | GiB sent a chip | collectives | seconds | tokens/s | bound by |"
_ROUND = "| model | devices | generate, s | train, s | evaluate, s | h | tokens | chip-hours |"


def write(folder: pathlib.Path) -> str:
    """Makes `table.md` of the folder's *.json, and returns it.

    Raises:
      UserError: there are none.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"no *.json in '{folder}': write some with --output={folder}/NAME.json")
    found.sort(key=lambda one: (one["where"], one["devices"], one["parameters"]))
    parts = [
        "Bytes are per chip, as the compiler says; times are rooflines, from nothing overlapping to"
        " everything, and were not measured.",
        _table(_MEMORY, [row for one in found for row in _memory(one)]),
        _table(_TRAFFIC, [row for one in found for row in _traffic(one)]),
    ]
    if rounds := [_round(one) for one in found if one["fits"] and _whole(one)]:
        parts.append(_table(_ROUND, rounds))
    text = "\n\n".join(parts) + "\n"
    write_atomic(epath.Path(folder / "table.md"), text.encode())
    return text


def _table(head: str, rows: list[list[str]]) -> str:
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *map(_line, rows)])


def _line(row: list[str]) -> str:
    return f"| {' | '.join(row)} |"


def _named(one: dict[str, Any]) -> list[str]:
    slices = f" × {one['slices']}" if one["slices"] > 1 else ""
    shape = " × ".join(str(size) for size in one["mesh"].values())
    return [one["config"].removeprefix("shapes-"), one["where"] + slices, shape]


def _memory(one: dict[str, Any]) -> list[list[str]]:
    s, limit = one["settings"], one["memory_limit"]
    rows = {
        STEP: f"{s['rows']} / {s['accumulation']}",
        ROLLOUT: f"{s['batch']} · {s['samples']}",
        SCORE: "",
    }
    table = []
    for name, program in one["programs"].items():
        memory = program["memory"]
        peak = memory.get("peak", memory.get("needed"))
        sizes = (memory.get("arguments"), memory.get("temporaries"), peak, limit)
        shown = ["–" if size is None else f"{size / GIB:.2f}" for size in sizes]
        fits = "yes" if program["fits"] else "**no**"
        remat = s["remat"] if name == STEP else ""
        table.append([*_named(one), name, rows[name], remat, *shown, fits])
    return table


def _traffic(one: dict[str, Any]) -> list[list[str]]:
    table = []
    for name, program in one["programs"].items():
        if "collectives" not in program:
            continue
        sent: dict[str, float] = {}
        for each in program["collectives"]:
            sent[each["axes"]] = sent.get(each["axes"], 0.0) + each["bytes"]
        axes = ", ".join(f"{axis} {size / GIB:.2f}" for axis, size in sent.items() if size > 1e6)
        count = sum(each["count"] for each in program["collectives"])
        row = [*_named(one), name, f"{program['flops'] / 1e12:,.0f}", axes or "–", f"{count:,}"]
        if estimate := program.get("estimate"):
            low, high = estimate["tokens_per_second"]
            row += [
                f"{estimate['worst']:.3g} – {estimate['best']:.3g}",
                f"{low:,.0f} – {high:,.0f}",
                estimate["bound"],
            ]
        else:
            row += ["–"] * 3
        table.append(row)
    return table


def _whole(one: dict[str, Any]) -> bool:
    return {"generate", "train", "evaluate"} <= one.get("forecast", {}).get("stages", {}).keys()


def _round(one: dict[str, Any]) -> list[str]:
    stages, total = one["forecast"]["stages"], one["forecast"]["round"]
    seconds = [f"{stages[n]['seconds']:,.0f}" for n in ("generate", "train", "evaluate")]
    hours, tokens = total["seconds"] / 3600, total["tokens"]
    named = _named(one)[:2]
    return [
        *named,
        *seconds,
        f"{hours:.2f}",
        f"{tokens / 1e6:,.1f} M",
        f"{total['chip_hours']:.1f}",
    ]
