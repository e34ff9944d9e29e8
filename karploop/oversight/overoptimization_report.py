"""Tables and plots of what is won and lost by optimising a proxy, over sizes and seeds."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karploop.files import write_atomic
from karploop.oversight.overoptimization import BEST_OF_N, LEARNING, Fit, fall, fit
from karploop.oversight.overoptimization_study import Curve, Found
from karploop.reporting.statistics import Estimate, mean_interval
from karploop.reporting.tables import latex_table, markdown_table, text_table

TITLE = "Over-optimisation of a reward model"
GAIN, PLACE, LOST, ALPHA, BETA, TOP, R2, AGREES = SUMMARY = (
    *("largest gain", "at √KL", "lost by the end, %", "α", "β", "peak of the form, √KL", "R²"),
    "agrees with gold, %",
)
_COLOURS = ("#c1442d", "#c98a1b", "#2a6f97", "#4c7a34", "#7a4c8f")

Results = Mapping[int, Mapping[int, Found]]  # comparisons → seed
Table = tuple[list[str], list[list[str]]]


def write(output: pathlib.Path, results: Results, ns: Sequence[int]) -> str:
    """Writes table.md, table.tex, table.csv and table.png; returns the tables as plain text."""
    parts = {"summary": summary_rows(results), **dict(_point_rows(results, ns))}
    note = _note(results)
    markdown = [f"# {TITLE}", *(markdown_table(*part) for part in parts.values()), note]
    latex = [
        latex_table(*part, f"{TITLE}: {name}. {note}", f"tab:overoptimization:{name}")
        for name, part in parts.items()
    ]
    write_atomic(output / "table.md", ("\n\n".join(markdown) + "\n").encode())
    write_atomic(output / "table.tex", ("\n\n".join(latex) + "\n").encode())
    write_atomic(output / "table.csv", _csv(results).encode())
    figure(results).savefig(output / "table.png", dpi=130, facecolor="white")
    return "\n\n".join([*(text_table(*part) for part in parts.values()), note])


def ways(results: Results) -> list[str]:
    """Best-of-n, and how policies learnt."""
    some = next(iter(next(iter(results.values())).values()))
    return [BEST_OF_N, *some.policies]


def curves(results: Results, way: str, size: int) -> dict[int, Curve]:
    """By seed."""
    return {
        seed: found.proxy.best if way == BEST_OF_N else found.policies[way]
        for seed, found in results[size].items()
    }


def fitted(way: str, curve: Curve) -> Fit | None:
    """The published form of a way, fitted to the gold reward of one curve."""
    return fit(BEST_OF_N if way == BEST_OF_N else LEARNING, curve.distance, curve.gold)


def summary(results: Results, way: str, size: int) -> dict[str, dict[int, float]]:
    """Each of SUMMARY by seed; NaN where there is no such number."""
    found: dict[str, dict[int, float]] = {name: {} for name in SUMMARY}
    for seed, curve in curves(results, way, size).items():
        end, form = fall(curve.gold), fitted(way, curve)
        top = form.peak if form else None
        values = {
            GAIN: curve.gold[end.peak],
            PLACE: curve.distance[end.peak],
            LOST: 100 * end.share,
            ALPHA: form.alpha if form else math.nan,
            BETA: form.beta if form else math.nan,
            TOP: math.nan if top is None else top,
            R2: form.r2 if form else math.nan,
            AGREES: 100 * results[size][seed].proxy.accuracy,
        }
        for name, value in values.items():
            found[name][seed] = value
    return found


def summary_rows(results: Results) -> Table:
    """A row for each way and size; of R², also the lowest of a seed, and peak and R² of the form
    fitted to the mean over seeds: a curve of one seed is noisy where few samples decide."""
    forms = dict.fromkeys(SUMMARY, ".2f") | {LOST: ".0f", R2: ".3f", AGREES: ".1f"}
    rows = []
    for way in ways(results):
        for size in results:
            values = summary(results, way, size)
            cells = [_text(_mean(values[name]), forms[name]) for name in SUMMARY]
            lowest = min((v for v in values[R2].values() if not math.isnan(v)), default=None)
            low = "–" if lowest is None else f"{lowest:.3f}"
            rows.append([way, f"{size:,}", *cells, low, *_of_mean(results, way, size)])
    return ["way", "comparisons", *SUMMARY, "R², lowest", "peak, of the mean", "R²"], rows


def _of_mean(results: Results, way: str, size: int) -> tuple[str, str]:
    """Peak and R² of the form, fitted to the mean over seeds."""
    of = curves(results, way, size)
    points = (_by_point(of, measure) for measure in ("distance", "proxy", "gold"))
    form = fitted(way, Curve(*([e.mean for e in each] for each in points)))
    if form is None:
        return "–", "–"
    return "–" if form.peak is None else f"{form.peak:.2f}", f"{form.r2:.3f}"


def _point_rows(results: Results, ns: Sequence[int]) -> Iterator[tuple[str, Table]]:
    """Gold and proxy at each n, and at each round."""
    for way in ways(results):
        labels = [f"n = {n:,}" for n in ns] if way == BEST_OF_N else None
        for measure in ("gold", "proxy"):
            rows = []
            for size in results:
                of = curves(results, way, size)
                means = _by_point(of, measure)
                if way != BEST_OF_N and measure == "gold":
                    far = _by_point(of, "distance")
                    rows.append([f"{size:,}: √KL", *(f"{e.mean:.2f}" for e in far)])
                rows.append([f"{size:,}", *(_text(e, "+.2f") for e in means)])
            points = len(rows[0]) - 1
            header = labels or [str(point) for point in range(points)]
            unit = "" if way == BEST_OF_N else ", by rounds learnt"
            yield f"{way}, {measure}", ([f"{way}: {measure} over the base{unit}", *header], rows)


def _by_point(of: Mapping[int, Curve], measure: str) -> list[Estimate]:
    """Over seeds, as far as all of them go."""
    columns = zip(*(getattr(curve, measure) for curve in of.values()), strict=False)
    return [mean_interval(list(column)) for column in columns]


def _note(results: Results) -> str:
    seeds = len(next(iter(results.values())))
    spread = f"Means and 95% t intervals of {seeds} seeds" if seeds > 1 else "One seed"
    return (
        f"{spread}. Gains are over the base. The forms, d(α − βd) for best-of-n and "
        "d(α − β log d) for policies with d = √KL, are fitted to the gold reward of each seed, "
        "and at last to the mean of seeds; a form that never falls has no peak."
    )


def _csv(results: Results) -> str:
    """All means for programs, at full precision; a point is a place in the order of a curve."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["way", "comparisons", "measure", "point", "mean", "low", "high", "by_seed"]
    writer.writerow(header)

    def line(place: Sequence[object], by_seed: Mapping[int, float]) -> None:
        e = _mean(by_seed)
        text = " ".join(f"{seed}={value!r}" for seed, value in by_seed.items())
        writer.writerow([*place, e.mean, e.low, e.high, text])

    for way in ways(results):
        for size in results:
            for name, by_seed in summary(results, way, size).items():
                line([way, size, name, ""], by_seed)
            of = curves(results, way, size)
            for measure in ("distance", "proxy", "gold"):
                for point in range(min(len(curve.gold) for curve in of.values())):
                    at = {seed: getattr(curve, measure)[point] for seed, curve in of.items()}
                    line([way, size, measure, point], at)
    return out.getvalue()


def figure(results: Results) -> Figure:
    """Gold above proxy: best-of-n on the left, policies on the right, against √KL."""
    drawn = Figure(figsize=(10.4, 7.2), layout="constrained")
    panels = drawn.subplots(2, 2, sharex="col")
    for row, measure in enumerate(("gold", "proxy")):
        for column, title in enumerate(("best-of-n", "policy gradient")):
            panel = panels[row][column]
            for colour, size in zip(_COLOURS, results, strict=False):
                for way in ways(results):
                    if (way == BEST_OF_N) == (column == 0):
                        _line(panel, results, way, size, measure, colour)
            panel.axhline(0, color="#999999", lw=0.8)
            panel.set_title(f"{title}: {measure} over the base", fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(True, color="#dddddd", lw=0.6)
            panel.set_axisbelow(True)
    for panel in panels[1]:
        panel.set_xlabel("√KL to the base")
    panels[0][0].legend(frameon=False, fontsize=8, title="comparisons", title_fontsize=8)
    for panel in panels[0]:
        panel.plot([], [], color="#555555", ls=":", lw=1.2, label="published form")
    panels[0][1].legend(frameon=False, fontsize=8)
    return drawn


def _line(panel: Axes, results: Results, way: str, size: int, measure: str, colour: str) -> None:
    """Means over seeds with intervals, and of gold the form with the mean of α and β."""
    of = curves(results, way, size)
    far = np.array([e.mean for e in _by_point(of, "distance")])
    found = _by_point(of, measure)
    penalised = way not in ways(results)[:2]
    style = dict(marker="s", ls="none", mfc="white") if penalised else dict(marker="o", ls="-")
    errors = [(e.mean - e.low, e.high - e.mean) if e.low is not None else (0, 0) for e in found]
    label = f"{size:,}" if way == BEST_OF_N else f"{size:,}{', ' + way if penalised else ''}"
    panel.errorbar(
        far,
        [e.mean for e in found],
        yerr=np.array(errors).T,
        color=colour,
        ms=4,
        lw=1.4,
        elinewidth=0.7,
        label=label,
        **style,
    )
    forms = [form for form in (fitted(way, curve) for curve in of.values()) if form]
    if measure == "gold" and forms and not penalised:
        alpha, beta = (float(np.mean([getattr(f, k) for f in forms])) for k in ("alpha", "beta"))
        along = np.linspace(0.02, far.max(), 100)
        mean = Fit(forms[0].form, alpha, beta, math.nan)
        panel.plot(along, mean.gain(along), color=colour, ls=":", lw=1.2)


def _mean(by_seed: Mapping[int, float]) -> Estimate:
    return mean_interval(list(by_seed.values()))


def _text(e: Estimate, form: str) -> str:
    if e.mean is None:
        return "–"
    interval = "" if e.low is None else f" [{e.low:{form}}, {e.high:{form}}]"
    return f"{e.mean:{form}}{interval}".replace("-", "−")
