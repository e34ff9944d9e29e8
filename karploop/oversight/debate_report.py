"""Tables and plots of debates about digits, over seeds."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from karploop.files import write_atomic
from karploop.oversight.debate_study import (
    CLAIMS,
    CONSULTANCY,
    DEBATE,
    HONEST_FIRST,
    HONEST_LAST,
    LARGEST,
    PROTOCOLS,
    RANDOM,
)
from karploop.reporting.plots import ArmResult, comparison_plot
from karploop.reporting.statistics import Estimate, compare_paired, mean_interval
from karploop.reporting.tables import markdown_table, text_table

CLAIM_NAMES = {
    "random": "lie drawn beforehand",
    "first": "lie chosen beforehand",
    "last": "lie chosen at the end",
}
AS_IN_PAPER = "debate, lie chosen beforehand − random pixels, ten classes (as in the paper)"
_COLOURS = ("#1f77b4", "#d1581c")  # honesty, the liar

# pixels -> seed -> what `debate_study.measure` found
Results = Mapping[int, Mapping[int, Mapping[str, Any]]]


def write(output: pathlib.Path, results: Results) -> str:
    """Writes table.md, table.csv, table.png and debates.png; returns the tables as plain text."""
    values = {
        (pixels, protocol, claim): {
            seed: result["accuracy"][protocol][claim] for seed, result in by_seed.items()
        }
        for pixels, by_seed in results.items()
        for protocol in PROTOCOLS
        for claim in CLAIMS
    }
    means = {key: mean_interval(list(by_seed.values())) for key, by_seed in values.items()}
    parts = [_mean_rows(means, list(results)), _difference_rows(values, list(results))]
    note = _note(results)
    markdown = ["# Debates about digits", *(markdown_table(*part) for part in parts), note]
    write_atomic(output / "table.md", ("\n\n".join(markdown) + "\n").encode())
    write_atomic(output / "table.csv", _csv(values, means).encode())
    _plot(output / "table.png", values, means, list(results))
    by_seed = results[max(results)]
    figure = debates_figure(by_seed[min(by_seed)]["examples"])
    figure.savefig(output / "debates.png", dpi=130, facecolor="white")
    return "\n\n".join([*(text_table(*part) for part in parts), note])


def _mean_rows(means: Mapping, counts: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [f"{pixels} pixels: {protocol}", *(_percent(means[pixels, protocol, c]) for c in CLAIMS)]
        for pixels in counts
        for protocol in PROTOCOLS
    ]
    return ["judge is right, %", *CLAIM_NAMES.values()], rows


def _difference_rows(values: Mapping, counts: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, arm, baseline in _differences():
        cells = [compare_paired(values[n, *arm], values[n, *baseline]).difference for n in counts]
        rows.append([name, *(_percent(cell, "+") for cell in cells)])
    return ["points", *(f"{pixels} pixels" for pixels in counts)], rows


def _differences() -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """Name, and what is compared with what, each a protocol and a claim."""
    for baseline in (RANDOM, CONSULTANCY):
        for claim in CLAIMS:
            name = f"debate − {baseline}, {CLAIM_NAMES[claim]}"
            yield name, (DEBATE, claim), (baseline, claim)
    yield AS_IN_PAPER, (DEBATE, "first"), (RANDOM, "last")


def _note(results: Results) -> str:
    found = [result for by_seed in results.values() for result in by_seed.values()]
    seeds = len(next(iter(results.values())))
    spread = f"mean and 95% t interval of {seeds} seeds" if seeds > 1 else "of one seed"
    ends = ", ".join(
        f"{np.mean([r['ends'] for r in by_seed.values()]):,.0f} of {pixels}"
        for pixels, by_seed in results.items()
    )
    return (
        f"Share of held-out images whose judge is right, and paired differences: {spread}. "
        f"'debate' is the mean of both orders. An image has "
        f"{np.mean([r['nonzero'] for r in found]):.1f} nonzero pixels on average, and as many sets "
        f"of pixels were judged: {ends}."
    )


def _percent(estimate: Estimate, sign: str = "") -> str:
    # Adding 0.0 makes the −0.0 of a small negative number 0.0.
    mean, low, high = (
        None if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f}"
        for share in (estimate.mean, estimate.low, estimate.high)
    )
    return mean if low is None else f"{mean} [{low}, {high}]"


def _csv(values: Mapping, means: Mapping) -> str:
    """The means for programs: shares at full precision, empty where unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    seeds = [f"seed_{seed}" for seed in next(iter(values.values()))]
    writer.writerow(["pixels", "protocol", "lie", "mean", "low", "high", *seeds])
    for key, by_seed in values.items():
        mean = means[key]
        writer.writerow([*key, mean.mean, mean.low, mean.high, *by_seed.values()])
    return out.getvalue()


def _plot(path: pathlib.Path, values: Mapping, means: Mapping, counts: Sequence[int]) -> None:
    panels: dict[str, list[ArmResult]] = {}
    for pixels in counts:
        for claim, claim_name in CLAIM_NAMES.items():
            arms = panels.setdefault(f"{pixels} pixels, {claim_name}", [])
            for protocol in (RANDOM, CONSULTANCY, HONEST_FIRST, HONEST_LAST):
                key = (pixels, protocol, claim)
                mean = means[key]
                shares = (mean.mean, mean.low, mean.high)
                in_percent = Estimate(mean.n, *(s if s is None else 100 * s for s in shares))
                points = [100 * value for value in values[key].values()]
                arms.append(ArmResult(protocol, points, in_percent))
    comparison_plot(panels, path, "Held-out digits whose judge is right, %", RANDOM)


def debates_figure(examples: Sequence[Mapping[str, Any]]) -> Figure:
    """Images with what each player reveals, numbered by turn: honesty is odd, the liar even."""
    figure = Figure(figsize=(2.1 * max(len(examples), 1), 2.6), layout="constrained")
    panels = figure.subplots(1, max(len(examples), 1), squeeze=False)[0]
    for panel, example in zip(panels, examples, strict=False):
        side = round(len(example["image"]) ** 0.5)
        image = np.reshape(example["image"], (side, side))
        panel.imshow(image, cmap="gray_r", vmin=0, vmax=2 * LARGEST)  # pale, to be written on
        for turn, pixel in enumerate(example["moves"]):
            row, column = divmod(pixel, side)
            place = {"ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold"}
            box = {"boxstyle": "square,pad=0.2", "facecolor": _COLOURS[turn % 2], "lw": 0}
            panel.text(column, row, str(turn + 1), color="white", bbox=box, **place)
        winner = "honesty wins" if example["honest_wins"] else "the liar wins"
        claims = f"“{example['label']}” against “{example['lie']}”"
        panel.set_title(f"{claims}\n{winner}", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure
