"""Rows of results: JSON lines, a table, a plot against what the machine could do."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from karploop.benchmark.names import WORKLOADS
from karploop.files import write_atomic
from karploop.reporting.plots import save
from karploop.reporting.tables import markdown_table, text_table

FIELDS = {  # of a row; a loop's and a start's have fewer
    "workload": "its name",
    "machine": "as --machine has it",
    "repeats": "calls that were timed",
    "model": "the config's name, or that of the checkpoint",
    "parameters": "how many",
    "random_weights": "whether they are; published ones are as fast",
    "dtype": "what the model computes in",
    "device": "what JAX calls it",
    "platform": "cpu, gpu or tpu",
    "devices": "how many there are",
    "cores": "of the host, that this process may use",
    "jax": "its version",
    "load": "processes that wanted a core in the minute before: above 0.5, others were at work",
    "seconds": "median of all_seconds; of a start, without compiled programs to find",
    "all_seconds": "of each repeat",
    "cpu_seconds": "median, of all cores together",
    "compile_seconds": "what the first call took longer than the median",
    "tokens": "new ones of sampling (w1-w4, grpo, in_loop), else of texts, each with its prompt",
    "tokens_per_second": "of the median",
    "flops": "that the mathematics needs (karploop/benchmark/costs.py)",
    "bytes": "of parameters, caches and optimiser that have to be moved",
    "flops_per_second": "of the median",
    "bytes_per_second": "of the median",
    "limit_seconds": "what flops and bytes take at the rates measured in the same run",
    "of_limit": "limit_seconds / seconds",
    "parts": "seconds of parts of a repeat, medians; of a loop, by stage",
    "peak_host_bytes": "resident, of the workload's own process",
    "peak_device_bytes": "of an accelerator; null on a CPU",
    "program_bytes": "of the largest program: arguments, results, temporaries",
    "rates": "FLOPs a second by product, bytes a second copied and read, in the same run",
}
Row = dict[str, Any]
_HEADER = (
    *("workload", "seconds", "tokens/s", "CPU s", "compile s", "GFLOP/s", "GB/s", "of limit"),
    *("peak GB", "parts"),
)


def line(row: Row) -> str:
    """A row as one line of JSON, numbers to five digits."""
    return json.dumps(_rounded(row))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """A line for each workload."""
    cells = [_cells(row) for row in rows]
    return (markdown_table if markdown else text_table)(_HEADER, cells)


def _cells(row: Row) -> list[str]:
    def shown(name: str, scale: float = 1.0, form: str = ".3g") -> str:
        value = row.get(name)
        return "" if value is None else format(value / scale, form)

    parts = [f"{name} {seconds:.3g}" for name, seconds in row.get("parts", {}).items()]
    shares = (
        ("outside_share", "of a round outside"),
        ("run_outside_share", "of the run outside"),
        ("of_alone", "of the sampler alone"),
    )
    parts += [f"{row[name]:.1%} {what}" for name, what in shares if name in row]
    device = "peak_device_bytes" if row.get("peak_device_bytes") else "peak_host_bytes"
    return [
        row["workload"],
        shown("seconds"),
        shown("tokens_per_second", form=".4g"),
        shown("cpu_seconds"),
        shown("compile_seconds"),
        shown("flops_per_second", 1e9),
        shown("bytes_per_second", 1e9),
        shown("of_limit", form=".0%"),
        shown(device, 1e9),
        ", ".join(parts),
    ]


def write(rows: Sequence[Row], rates: Row, folder: pathlib.Path, machine: str) -> pathlib.Path:
    """Adds rows to those of a machine, and makes its table and plot anew.

    A row takes the place of an earlier one of the same workload, model and dtype.

    Returns:
      FOLDER/MACHINE, with results.jsonl, README.md and limit.png.
    """
    place = place_of(folder, machine)
    file = place / "results.jsonl"
    earlier = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    found = {_identity(row): row for row in (*earlier, *map(_rounded, rows))}
    kept = sorted(
        found.values(), key=lambda row: (row["model"], list(WORKLOADS).index(row["workload"]))
    )
    write_atomic(file, "".join(json.dumps(row) + "\n" for row in kept).encode())
    write_atomic(place / "README.md", _page(kept, rates, machine).encode())
    save(limit_figure(kept, machine), place / "limit.png")
    return place


def place_of(folder: pathlib.Path, machine: str) -> pathlib.Path:
    """Where the results of a machine lie, by its name in words."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") or "machine")


def _identity(row: Row) -> tuple[str, str, str]:
    return row["workload"], row["model"], row["dtype"]


def _page(rows: Sequence[Row], rates: Row, machine: str) -> str:
    text = [f"# {machine}", rates_line(rates)]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        of_model = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        text += [f"## {model}, {dtype}", table(of_model, markdown=True)]
        loads = [row["load"] for row in of_model if row.get("load") is not None]
        if loads:
            text.append(f"Processes at work before a workload began: {max(loads):g} at most.")
    text.append("![Share of what the machine could do](limit.png)")
    return "\n\n".join(text) + "\n"


def rates_line(rates: Row) -> str:
    """What the machine can do, in a sentence."""
    products = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in rates["flops"].items())
    return (
        f"{rates['devices']} × {rates['device']} ({rates['platform']}), {rates['cores']} cores, "
        f"jax {rates['jax']}. Measured in the last run: matrix products of {products} GFLOP/s, "
        f"{rates['copied'] / 1e9:.3g} GB/s copied, {rates['read'] / 1e9:.3g} GB/s read."
    )


def limit_figure(rows: Sequence[Row], title: str) -> Figure:
    """For each workload, the share of the limit that it reaches."""
    shown = [row for row in rows if "of_limit" in row]
    names = [f"{row['workload']}  {row['model']}" for row in shown]
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(shown)), layout="constrained")
    panel = figure.add_subplot()
    panel.barh(range(len(shown)), [100 * row["of_limit"] for row in shown], color="#2a6f97")
    panel.axvline(100, color="#555555", lw=1)
    for place, row in enumerate(shown):
        speed = f" {row['tokens_per_second']:,.0f} tokens/s"
        panel.text(100 * row["of_limit"], place, speed, va="center", fontsize=8)
    panel.set_yticks(range(len(shown)), names)
    panel.invert_yaxis()
    panel.set_xlim(0, max([115.0, *(130 * row["of_limit"] for row in shown)]))
    panel.set_xlabel("% of what products and memory would allow")
    panel.set_title(title, loc="left", fontsize=10)
    return figure
