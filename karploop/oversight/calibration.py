"""From a file of verdicts with gold labels to a report on each judge in it."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from karploop.data.rows import located_rows
from karploop.errors import UserError
from karploop.judging.calibration import (
    COLUMNS,
    MEASURES,
    Judged,
    agreement,
    calibrate,
    judged,
    recalibrated,
    reliability,
)
from karploop.reporting.plots import reliability_plot
from karploop.reporting.statistics import Estimate

_METHODS = ("platt", "isotonic")


def report(source: str, output: pathlib.Path, threshold: float, resamples: int, seed: int) -> str:
    """Writes calibration.json, table.md and reliability.png into `output`; returns the table.

    Raises:
      UserError: rows that are no verdicts, or none with a gold label.
    """
    judges = read_verdicts(source)
    found, bins = {}, {}
    for name, rows in judges.items():
        measures = calibrate(rows, threshold, resamples, seed)
        mapped = {f"ece after {m}": _mapped_error(rows, m, threshold, seed) for m in _METHODS}
        found[name] = {
            "verdicts": len(rows),
            "missing": int(sum(math.isnan(score) for score in rows.score_N)),
            "measures": {key: dataclasses.asdict(value) for key, value in measures.items()},
            "recalibrated": {k: v for k, v in mapped.items() if v is not None},
            "agreement": {
                other: _number(agreement(rows, judges[other], threshold))
                for other in judges
                if other != name
            },
        }
        bins[name] = reliability(rows)
        found[name]["reliability"] = [dataclasses.asdict(b) for b in bins[name]]
    text = table(found)
    output.mkdir(parents=True, exist_ok=True)
    (output / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "table.md").write_text(text)
    plotted = {name: [(b.score, b.gold, b.count) for b in b_] for name, b_ in bins.items() if b_}
    if plotted:
        reliability_plot(plotted, output / "reliability.png")
    return text


def read_verdicts(source: str) -> dict[str, Judged]:
    """Rows of a file by judge.

    A row has `sample` (any text or number), `gold` (0 or 1) and `score` (a number, or null where
    there is no verdict); it may have `judge`, `length`, `own` (whether the judge wrote it), and for
    a pair `forward` and `backward`, the scores in both orders.

    Raises:
      UserError: a row without these, or a value that is none (with file and line).
    """
    numbers: dict[str, int] = {}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    samples: dict[str, list[int]] = defaultdict(list)
    for where, row in located_rows(source):
        for name in ("sample", "gold", "score"):
            if name not in row:
                raise UserError(f"{where}: a verdict has 'sample', 'gold' and 'score', no '{name}'")
        _check(row, where)
        judge = str(row.get("judge", "judge"))
        key = json.dumps(row["sample"], sort_keys=True)
        samples[judge].append(numbers.setdefault(key, len(numbers)))
        rows[judge].append(row)
    return {name: judged(rows[name], samples[name]) for name in rows}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row a measure, a column a judge."""
    lines = [["", *found], ["---", *["---:"] * len(found)]]
    lines.append(["verdicts, of them missing"])
    lines[-1] += [f"{entry['verdicts']}, {entry['missing']}" for entry in found.values()]
    for name in MEASURES:
        measured = [entry["measures"].get(name) for entry in found.values()]
        if any(measured):
            cells = [_cell(Estimate(**m)) if m else "–" for m in measured]
            lines.append([name.replace("_", " "), *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nWith 95% bootstrap intervals over samples.\n"


def _check(row: Mapping[str, Any], where: str) -> None:
    for name in COLUMNS:
        value = row.get(name)
        fine = value is None or (isinstance(value, (int, float)) and math.isfinite(value))
        if not fine or (name == "gold" and value not in (0, 1)):
            wanted = "0 or 1" if name == "gold" else "a number or null"
            raise UserError(f"{where}: '{name}' is {value!r}, and {wanted} is wanted")


def _mapped_error(rows: Judged, method: str, threshold: float, seed: int) -> float | None:
    mapped = recalibrated(rows, method, seed=seed)
    return _number(MEASURES["ece"](mapped, threshold))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _cell(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} \\[{estimate.low:.3f}, {estimate.high:.3f}\\]"
