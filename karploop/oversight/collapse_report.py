"""Tables and plots of learning from one's own samples: linear regression, and a language model."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karploop.files import write_atomic
from karploop.oversight.collapse_study import HALF, MEASURES, NLL, REACH, TENTH, Language
from karploop.oversight.regression_collapse import REGIMES, Regression, bound, closed_form
from karploop.reporting.statistics import Estimate, compare_paired, mean_interval
from karploop.reporting.tables import markdown_table, text_table

NAMES = {
    NLL: "held-out loss, nats a token",
    HALF: "words sampled from the rare half, %",
    TENTH: "words sampled from the rarest tenth, %",
    REACH: "rare transitions that occur, %",
}
_COLOURS = dict(zip(REGIMES, ("#c1442d", "#2a6f97", "#c98a1b"), strict=True))
_GREY = "#555555"

Errors = Mapping[str, Sequence[Estimate]]  # regime → generation


def write(output: pathlib.Path, regression: Regression, errors: Errors, language: Language) -> str:
    """Writes table.md, table.csv and table.png; returns the tables as plain text."""
    tables = [_regression_rows(regression, errors), *_language_rows(language), _rises(language)]
    note = _note(regression, language)
    markdown = ["# Learning from one's own samples", *(markdown_table(*t) for t in tables), note]
    write_atomic(output / "table.md", ("\n\n".join(markdown) + "\n").encode())
    write_atomic(output / "table.csv", _csv(regression, errors, language).encode())
    figure(regression, errors, language).savefig(output / "table.png", dpi=130, facecolor="white")
    return "\n\n".join([*(text_table(*table) for table in tables), note])


def _regression_rows(regression: Regression, errors: Errors) -> tuple[list[str], list[list[str]]]:
    header = [
        "linear regression: test error over σ²d/(T−d−1), generation",
        *(str(g + 1) for g in range(regression.generations)),
    ]
    rows = []
    for regime in REGIMES:
        found = [_scaled(e, 1 / regression.unit) for e in errors[regime]]
        rows.append([f"{regime}, simulated", *(_text(e, ".2f") for e in found)])
        expected = closed_form(regression, regime)
        if expected:
            cells = (f"{value / regression.unit:.2f}" for value in expected)
            rows.append([f"{regime}, closed form", *cells])
    limit = f"{bound(regression) / regression.unit:.2f}"
    rows.append(["accumulate, bound", *[limit] * regression.generations])
    return header, rows


def _language_rows(language: Language) -> Iterator[tuple[list[str], list[list[str]]]]:
    for measure in MEASURES:
        factor, form = (1, ".3f") if measure == NLL else (100, ".1f")
        rows = [
            [
                regime,
                *(
                    _text(_scaled(_mean(language, regime, measure, g), factor), form)
                    for g in range(language.generations)
                ),
            ]
            for regime in REGIMES
        ]
        real = f"{factor * language.real[measure]:{form}}"
        rows.append(["the language itself", real, *["–"] * (language.generations - 1)])
        header = [f"language model: {NAMES[measure]}, generation"]
        yield [*header, *(str(g + 1) for g in range(language.generations))], rows


def _rises(language: Language) -> tuple[list[str], list[list[str]]]:
    """How held-out loss rises from generation to generation, paired by seed."""
    steps = [(g, g + 1) for g in range(language.generations - 1)]
    whole = (0, language.generations - 1)
    rows = []
    for regime in REGIMES:
        cells = [_text(rise(language, regime, *step), "+.3f") for step in [*steps, whole]]
        share = _scaled(share_of_rise(language, regime), 100)
        rows.append([regime, *cells, "–" if regime == REGIMES[0] else _text(share, ".0f")])
    header = ["rise of held-out loss, nats a token"]
    header += [f"{one + 1} → {other + 1}" for one, other in [*steps, whole]]
    return [*header, f"% of {REGIMES[0]}'s"], rows


def rise(language: Language, regime: str, one: int, other: int) -> Estimate:
    """Of held-out loss, from one generation to the other."""
    before, after = (language.at(regime, NLL, g) for g in (one, other))
    return compare_paired(after, before).difference


def share_of_rise(language: Language, regime: str) -> Estimate:
    """The whole rise of held-out loss over that of replacing, seed by seed."""
    last = language.generations - 1

    def rises(name: str) -> dict[int, float]:
        before, after = (language.at(name, NLL, g) for g in (0, last))
        return {seed: after[seed] - before[seed] for seed in before}

    whole = rises(REGIMES[0])
    return mean_interval([rises(regime)[seed] / whole[seed] for seed in whole if whole[seed]])


def _note(regression: Regression, language: Language) -> str:
    seeds = len(language.seeds)
    spread = f"means and 95% t intervals of {seeds} seeds" if seeds > 1 else "of one seed"
    return (
        f"Generation 1 learnt from real data, every later one from samples of those before. Linear "
        f"regression: d = {regression.features}, T = {regression.rows}, "
        f"{regression.repetitions:,} repetitions, means and 95% intervals. Language model: "
        f"{spread}; transitions are counted over {language.words:,} words; rises are paired by "
        f"seed."
    )


def _csv(regression: Regression, errors: Errors, language: Language) -> str:
    """All means for programs, at full precision; empty where unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["study", "regime", "measure", "generation", "mean", "low", "high", "expected", "by_seed"]
    )
    for regime in REGIMES:
        expected = closed_form(regression, regime) or [None] * regression.generations
        for g, (e, known) in enumerate(zip(errors[regime], expected, strict=True)):
            place = ["regression", regime, "test error", g + 1]
            writer.writerow([*place, e.mean, e.low, e.high, known, ""])
    for regime in REGIMES:
        for measure in MEASURES:
            for g in range(language.generations):
                e = _mean(language, regime, measure, g)
                seeds = " ".join(f"{s}={v!r}" for s, v in language.at(regime, measure, g).items())
                place = ["language", regime, measure, g + 1]
                writer.writerow([*place, e.mean, e.low, e.high, language.real[measure], seeds])
    return out.getvalue()


def figure(regression: Regression, errors: Errors, language: Language) -> Figure:
    """Four panels against the generation: regression, and three measures of language models."""
    drawn = Figure(figsize=(9.6, 7.0), layout="constrained")
    panels = drawn.subplots(2, 2).flatten()
    for regime in REGIMES:
        found = [_scaled(e, 1 / regression.unit) for e in errors[regime]]
        _line(panels[0], regime, found)
        expected = closed_form(regression, regime)
        if expected:
            over = [value / regression.unit for value in expected]
            panels[0].plot(range(1, len(over) + 1), over, ls="--", color=_COLOURS[regime], lw=1)
    panels[0].axhline(bound(regression) / regression.unit, color=_COLOURS["accumulate"], ls=":")
    panels[0].set_title(
        "linear regression: test error over σ²d/(T−d−1)\n"
        "(dashed: closed form; dotted: bound of accumulate)",
        fontsize=10,
    )
    for panel, measure in zip(panels[1:], (NLL, HALF, REACH), strict=True):
        factor = 1 if measure == NLL else 100
        for regime in REGIMES:
            means = [_mean(language, regime, measure, g) for g in range(language.generations)]
            _line(panel, regime, [_scaled(mean, factor) for mean in means])
        panel.axhline(factor * language.real[measure], color=_GREY, ls="--", lw=1)
        title = f"language model: {NAMES[measure]}\n(dashed: the language itself)"
        panel.set_title(title, fontsize=10)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, color="#dddddd", lw=0.6)
        panel.set_axisbelow(True)
        panel.set_xlabel("generation (1: learnt from real data)")
    panels[0].legend(frameon=False, fontsize=9)
    return drawn


def _line(panel: Axes, regime: str, means: Sequence[Estimate]) -> None:
    shift = 0.06 * (REGIMES.index(regime) - 1)  # that intervals do not hide one another
    place = [g + 1 + shift for g in range(len(means))]
    height = [e.mean for e in means]
    known = [e.low is not None for e in means]
    below = [e.mean - e.low if k else 0.0 for e, k in zip(means, known, strict=True)]
    above = [e.high - e.mean if k else 0.0 for e, k in zip(means, known, strict=True)]
    look = {"color": _COLOURS[regime], "marker": "o", "ms": 4, "lw": 1.6, "capsize": 2}
    panel.errorbar(place, height, yerr=[below, above], label=regime, **look)


def _mean(language: Language, regime: str, measure: str, generation: int) -> Estimate:
    return mean_interval(list(language.at(regime, measure, generation).values()))


def _scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(e.n, *(x if x is None else x * factor for x in (e.mean, e.low, e.high)))


def _text(e: Estimate, form: str) -> str:
    if e.mean is None:
        return "missing"
    if e.low is None:
        return format(e.mean, form)
    return f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"
