"""Plots for the README and for papers; figures are built without pyplot and its global state."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from karploop.reporting.statistics import Estimate
from karploop.reporting.tables import curves, is_by_round, measured, round_label

_BASE_COLOUR = "#555555"
_ARM_COLOUR = "#2a6f97"
_SHADE = "#f6f0e0"
_SHADE_TEXT = "#8a7340"
_MISSING = {
    "color": _BASE_COLOUR,
    "fontsize": 8,
    "style": "italic",
    "bbox": {"facecolor": "white", "lw": 0, "pad": 2},
    "zorder": 5,
}
_BLIND = {"majority_answer": "--", "random_answer": ":"}
_LEGEND_ROUNDS = 12  # with more rounds the legend names only some
_DIFFICULTY_TICKS = 20  # with more difficulties the axis names only some
_PANELS_ACROSS = 3
_DPI = 160


def run_plot(
    summary: dict[str, Any], path: pathlib.Path | str, title: str, trained_up_to: float
) -> bool:
    """Writes a PNG of a run's held-out accuracy; whether there was any to draw.

    Against difficulty, or against the round where there is one difficulty alone. The arguments are
    those of `accuracy_plot`.
    """
    if is_by_round(summary):
        figure = rounds_figure(summary, title)
        if figure is None:
            return False
        save(figure, path)
        return True
    if not curves(summary):
        return False
    accuracy_plot(summary, path, title, trained_up_to)
    return True


def rounds_figure(summary: dict[str, Any], title: str) -> Figure | None:
    """Accuracies against the round, a panel a task; dashed is what a blind answer gets.

    None where nothing was judged.
    """
    metrics = measured(summary)
    judged = [m for m in metrics if m == "exact_match" or m.startswith("pass@")]
    if not judged:
        return None
    tasks = list(curves(summary, judged[0]))
    figure = Figure(figsize=(5.4 * len(tasks) + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    shades = matplotlib.colormaps["viridis"]
    for panel, task in zip(panels, tasks, strict=True):
        for metric in [*judged, *(m for m in _BLIND if m in metrics)]:
            [values] = curves(summary, metric).get(task, {"": {}}).values()
            if metric in _BLIND:
                look = {"color": _BASE_COLOUR, "ls": _BLIND[metric], "lw": 1.2}
            else:
                colour = shades(0.8 * judged.index(metric) / max(len(judged) - 1, 1))
                look = {"color": colour, "marker": "o", "ms": 4, "lw": 1.8, "clip_on": False}
            panel.plot(list(values), list(values.values()), label=metric.replace("_", " "), **look)
        _style(panel)
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        rounds = [entry["round"] for entry in summary["rounds"]]
        panel.set_xticks(rounds, [round_label(r) for r in rounds])
        panel.set_xlabel("round")
        if len(tasks) > 1:
            panel.set_title(task.replace("_", " "), fontsize=10)
    panels[0].set_ylabel("held-out problems")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def accuracy_plot(
    summary: dict[str, Any],
    path: pathlib.Path | str,
    title: str,
    trained_up_to: float | None = None,
    metric: str = "exact_match",
) -> None:
    """Writes a PNG of held-out accuracy against difficulty, one line a round, a panel a task.

    Args:
      summary: a run's `summary.json`.
      path: the PNG; its parent directories are made.
      title: heading of the figure.
      trained_up_to: largest difficulty in the base's training data; up to it the plot is shaded.
      metric: the eval to show, a share between 0 and 1.

    Raises:
      ValueError: the summary holds no value of the metric.
    """
    save(accuracy_figure(summary, title, trained_up_to, metric), path)


def accuracy_figure(
    summary: dict[str, Any],
    title: str,
    trained_up_to: float | None = None,
    metric: str = "exact_match",
) -> Figure:
    """The figure that `accuracy_plot` writes; same arguments and errors."""
    tasks = curves(summary, metric)
    if not tasks:
        raise ValueError(f"no eval of {metric!r} in the summary: nothing to plot")
    figure = Figure(figsize=(5.4 * len(tasks) + 1.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    rounds = sorted({r for t in tasks.values() for values in t.values() for r in values})
    colours = _round_colours(rounds)
    for panel, (task, by_difficulty) in zip(panels, tasks.items(), strict=True):
        _draw_rounds(panel, by_difficulty, rounds, colours)
        _style(panel)
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel("problem difficulty")
        if len(tasks) > 1:
            panel.set_title(task.replace("_", " "), fontsize=10)
        if trained_up_to is not None:
            _shade(panel, trained_up_to)
    panels[0].set_ylabel(f"held-out accuracy ({metric.replace('_', ' ')})")
    handles, labels = _legend_entries(panels)
    figure.legend(
        handles, labels, title="round", loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What a comparison plot shows of one group of arms for one metric."""

    name: str
    values: Sequence[float]  # one a seed
    estimate: Estimate


def comparison_plot(
    results: Mapping[str, Sequence[ArmResult]], path: pathlib.Path | str, title: str, baseline: str
) -> None:
    """Writes a PNG of arms side by side: a panel a metric, means with 95% intervals, seeds as dots.

    Args:
      results: metric -> the groups of arms, the same in each; a group without values keeps its
        place and is marked as missing.
      path: the PNG; its parent directories are made.
      title: heading of the figure.
      baseline: the group whose mean is drawn as a vertical line.
    """
    save(comparison_figure(results, title, baseline), path)


def comparison_figure(
    results: Mapping[str, Sequence[ArmResult]], title: str, baseline: str
) -> Figure:
    """The figure that `comparison_plot` writes; same arguments."""
    names = [result.name for result in next(iter(results.values()))]
    labels = [name.replace("__", "\n") for name in names]
    lines = max(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    across = min(len(results), _PANELS_ACROSS)
    down = math.ceil(len(results) / across)
    size = (
        3.6 * across + 0.07 * longest + 0.6,
        0.8 + down * (0.7 + len(names) * (0.2 + 0.15 * lines)),
    )
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for unused in panels[len(results) :]:
        unused.remove()
    panels = panels[: len(results)]
    for panel, (metric, arms) in zip(panels, results.items(), strict=True):
        for row, arm in enumerate(arms):
            _draw_arm(panel, row, arm)
            if arm.name == baseline and arm.estimate.mean is not None:
                panel.axvline(arm.estimate.mean, color=_BASE_COLOUR, lw=1, ls="--", zorder=1)
        _style(panel)
        panel.tick_params(labelsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_xlabel(metric)
    panels[0].set_yticks(range(len(names)), labels)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _draw_rounds(
    panel: Axes,
    by_difficulty: Mapping[str, Mapping[int, float]],
    rounds: Sequence[int],
    colours: Mapping[int, Any],
) -> None:
    positions = _positions(list(by_difficulty))
    for round in rounds:
        points = [
            (x, values[round])
            for x, values in zip(positions, by_difficulty.values(), strict=True)
            if round in values
        ]
        if not points:
            continue
        look = {"ls": "--", "marker": "s"} if round < 0 else {"ls": "-", "marker": "o"}
        panel.plot(
            *zip(*points, strict=True),
            color=colours[round],
            lw=1.8,
            ms=4,
            clip_on=False,
            label=round_label(round),
            zorder=3 + round * 1e-3,
            **look,
        )
    if len(positions) <= _DIFFICULTY_TICKS or _numbers(list(by_difficulty)) is None:
        panel.set_xticks(positions, list(by_difficulty))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_arm(panel: Axes, row: int, arm: ArmResult) -> None:
    estimate = arm.estimate
    if estimate.mean is None:
        middle = {"transform": panel.get_yaxis_transform(), "ha": "center", "va": "center"}
        panel.text(0.5, row, "missing", **middle, **_MISSING)
        return
    below = [row + 0.22] * len(arm.values)
    panel.plot(arm.values, below, "o", ms=4, mew=0, color=_ARM_COLOUR, alpha=0.45)
    if estimate.low is not None:
        panel.plot([estimate.low, estimate.high], [row, row], color=_ARM_COLOUR, lw=2)
    panel.plot([estimate.mean], [row], "D", ms=6, color=_ARM_COLOUR, zorder=4)


def reliability_plot(
    judges: Mapping[str, Sequence[tuple[float, float, int]]], path: pathlib.Path | str
) -> None:
    """Writes a PNG: of verdicts of about the same score, the share that is good.

    Args:
      judges: bins of each, (mean score, share of gold, count); a marker's area is its count.
    """
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    panel = figure.subplots()
    _style(panel)
    panel.plot([0, 1], [0, 1], color=_BASE_COLOUR, lw=1, ls="--", label="calibrated")
    for name, bins in judges.items():
        scores, gold, counts = zip(*bins, strict=True)
        (line,) = panel.plot(scores, gold, lw=1.2, label=name)
        areas = [12 + 120 * count / max(counts) for count in counts]
        panel.scatter(scores, gold, s=areas, color=line.get_color(), alpha=0.7, lw=0)
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="score", ylabel="share that is good")
    panel.legend(fontsize=8, frameon=False)
    save(figure, path)


def _shade(panel: Axes, trained_up_to: float) -> None:
    left, right = panel.get_xlim()
    edge = trained_up_to + 0.5
    panel.axvspan(left, edge, color=_SHADE, lw=0, zorder=0)
    # At the left edge, half-way up, few curves pass: easy problems are solved or they are not.
    place = {"xytext": (4, 0), "textcoords": "offset points", "rotation": 90, "va": "center"}
    at_left = {"xy": (left, 0.5), "xycoords": panel.get_xaxis_transform()}
    text = f"base trained up to {trained_up_to:g}"
    panel.annotate(text, **at_left, **place, fontsize=8, color=_SHADE_TEXT)
    panel.set_xlim(left, max(right, edge))


def _style(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)


def _round_colours(rounds: Sequence[int]) -> dict[int, Any]:
    """Grey for the base, then light to dark with the rounds."""
    loop_rounds = [r for r in rounds if r >= 0]
    # The palest end of the map would vanish on white.
    shades = ListedColormap(matplotlib.colormaps["viridis_r"].colors[40:])
    steps = max(len(loop_rounds) - 1, 1)
    return {-1: _BASE_COLOUR} | {r: shades(i / steps) for i, r in enumerate(loop_rounds)}


def _legend_entries(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """A handle for each round met in any panel; evenly thinned, ends kept, where there are many."""
    handles = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: -1 if label == "base" else int(label))
    if len(labels) > _LEGEND_ROUNDS:
        last = len(labels) - 1
        picked = {round(i * last / (_LEGEND_ROUNDS - 1)) for i in range(_LEGEND_ROUNDS)}
        labels = [label for i, label in enumerate(labels) if i in picked]
    return [handles[label] for label in labels], labels


def _numbers(difficulties: Sequence[str]) -> list[float] | None:
    try:
        return [float(d) for d in difficulties]
    except ValueError:
        return None


def _positions(difficulties: Sequence[str]) -> list[float]:
    """Numbers stand at their value; where any is a name, all stand one apart."""
    return _numbers(difficulties) or [float(i) for i in range(len(difficulties))]


def save(figure: Figure, path: pathlib.Path | str) -> None:
    """Writes a figure as PNG; folders that are missing are made."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, facecolor="white")
