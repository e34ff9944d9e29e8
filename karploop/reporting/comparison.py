"""Arms side by side: groups of runs that differ by seed alone, one metric at a time.

A metric is named as in a run's summary, with an optional round, the last one by default:

    reverse_addition/10/exact_match      an eval
    reverse_addition/*/exact_match       its mean over all difficulties
    label_precision@0                    a round's metric, of round 0
"""

import csv
import dataclasses
import io
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from karploop.errors import UserError
from karploop.reporting.statistics import Comparison, Estimate, compare_paired, mean_interval
from karploop.reporting.tables import split_eval
from karploop.schema import nearest

MISSING = "missing"
DIAGNOSTIC = " (selects by gold)"  # behind the name of a group whose runs are no results


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ by seed alone."""

    name: str
    summaries: Mapping[Hashable, dict[str, Any] | None]  # by seed; None: failed or not run

    @property
    def complete(self) -> int:
        return sum(summary is not None for summary in self.summaries.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """One group's result for one metric."""

    values: Mapping[Hashable, float]  # by seed, only those measured
    estimate: Estimate
    comparison: Comparison | None  # with the baseline; None for the baseline itself


def marked(name: str, summaries: Iterable[Mapping[str, Any] | None]) -> str:
    """The name of a group of these runs, which says if they are diagnostics."""
    return name + DIAGNOSTIC * any("diagnostic" in s for s in summaries if s is not None)


# metric -> group name -> cell
Results = dict[str, dict[str, Cell]]


def metric_value(summary: Mapping[str, Any], metric: str) -> float | None:
    """The metric's value in a run; None where the run did not measure it.

    Raises:
      UserError: the round after "@" is not a number.
    """
    name, at_round = split_metric(metric, known_metrics([summary]))
    rounds = {entry["round"]: entry for entry in summary["rounds"]}
    entry = rounds.get(max(rounds, default=None) if at_round is None else at_round)
    if entry is None:
        return None
    if "/*/" in name:
        return _mean([value for key, value in entry["evals"].items() if _any(key) == name])
    return entry["evals"].get(name, entry["metrics"].get(name))


def split_metric(metric: str, known: Collection[str]) -> tuple[str, int | None]:
    """A metric's name and the round behind its "@", if it says one; "pass@8" is a name.

    Raises:
      UserError: the round is not a number.
    """
    name, at, round_text = metric.rpartition("@")
    if metric in known or not at:
        return metric, None
    if round_text.removeprefix("-").isdecimal():
        return name, int(round_text)
    raise UserError(f"metric '{metric}': the round after @ must be a number, -1 for the base")


def known_metrics(summaries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every name that `metric_value` understands for one of these runs, sorted."""
    names = set()
    for summary in summaries:
        for entry in summary["rounds"]:
            names |= {*entry["evals"], *map(_any, entry["evals"]), *entry["metrics"]}
    return sorted(names)


def default_metrics(summaries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The accuracy of each task, averaged over difficulties."""
    return [m for m in known_metrics(summaries) if m.endswith("/*/exact_match")]


def compare(groups: Sequence[Group], metrics: Sequence[str], baseline: str) -> Results:
    """Reads the metrics of all groups and compares each group with the baseline, seed by seed.

    Raises:
      UserError: no run is complete, no metric is asked for, or one that no run has, or there is
        no such group.
    """
    summaries = [s for group in groups for s in group.summaries.values() if s is not None]
    if not summaries:
        raise UserError("no run is complete yet: there is nothing to tabulate")
    known = known_metrics(summaries)
    if not metrics:
        raise UserError(f"which metric? Give --metric one or more of: {', '.join(known)}")
    for metric in metrics:
        if split_metric(metric, known)[0] not in known:
            raise UserError(f"no run has the metric '{metric}': {nearest(metric, known)}")
    names = [group.name for group in groups]
    if baseline not in names:
        raise UserError(f"no group of arms '{baseline}': {nearest(baseline, names)}")
    return {metric: _compare_metric(groups, metric, baseline) for metric in metrics}


def _compare_metric(groups: Sequence[Group], metric: str, baseline: str) -> dict[str, Cell]:
    values = {group.name: _values(group, metric) for group in groups}
    return {
        name: Cell(
            values=found,
            estimate=mean_interval(list(found.values())),
            comparison=None if name == baseline else compare_paired(found, values[baseline]),
        )
        for name, found in values.items()
    }


def _values(group: Group, metric: str) -> dict[Hashable, float]:
    found = {seed: s and metric_value(s, metric) for seed, s in group.summaries.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def mean_rows(groups: Sequence[Group], results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the means: a row a group, a column a metric."""
    rows = [
        [
            group.name,
            f"{group.complete}/{len(group.summaries)}",
            *(_mean_text(cells[group.name].estimate, group.complete) for cells in results.values()),
        ]
        for group in groups
    ]
    return ["arm", "runs", *results], rows


def difference_rows(
    groups: Sequence[Group], results: Results, baseline: str
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences: a row a group but the baseline, a column a metric."""
    rows = [
        [
            group.name,
            *(_difference_text(cells[group.name].comparison) for cells in results.values()),
        ]
        for group in groups
        if group.name != baseline
    ]
    return ["arm", *(f"Δ {metric}" for metric in results)], rows


def footnote(results: Results, baseline: str) -> str:
    """How to read the two tables."""
    tests = sum(
        cell.comparison is not None and cell.comparison.sign_flip_p is not None
        for cells in results.values()
        for cell in cells.values()
    )
    return (
        "Means over seeds with 95% t-intervals, none for a single run. "
        f"Δ: difference to {baseline} over runs paired by seed, 95% t-interval (p of the paired "
        "t-test / of exact sign flips, two-sided"
        + (f", not corrected for {tests} comparisons)." if tests > 1 else ").")
    )


def _mean_text(estimate: Estimate, complete: int) -> str:
    text = _interval(estimate, ".3f")
    return f"{text} (n={estimate.n})" if 0 < estimate.n < complete else text


def _difference_text(found: Comparison | None) -> str:
    if found is None or found.difference.mean is None:
        return MISSING
    text = _interval(found.difference, "+.3f")
    if found.t_test_p is None and found.sign_flip_p is None:
        return text
    return f"{text} ({_p(found.t_test_p)} / {_p(found.sign_flip_p)})"


def csv_text(groups: Sequence[Group], results: Results) -> str:
    """The table for programs: a row a group and metric, full precision, empty where unknown."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "metric",
            "arm",
            "runs",
            "n",
            "mean",
            "low",
            "high",
            "pairs",
            "difference",
            "difference_low",
            "difference_high",
            "p_t",
            "p_sign_flip",
            "values_by_seed",
        ]
    )
    for metric, cells in results.items():
        for group in groups:
            cell = cells[group.name]
            e, found = cell.estimate, cell.comparison
            d = found and found.difference
            compared = (
                [d.n, d.mean, d.low, d.high, found.t_test_p, found.sign_flip_p]
                if found and d
                else [None] * 6
            )
            by_seed = " ".join(f"{seed}={value!r}" for seed, value in cell.values.items())
            writer.writerow(
                [metric, group.name, len(group.summaries), e.n, e.mean, e.low, e.high]
                + compared
                + [by_seed]
            )
    return out.getvalue()


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.mean is None:
        return MISSING
    if estimate.low is None:
        return format(estimate.mean, form)
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _p(p: float | None) -> str:
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _any(eval_name: str) -> str:
    """An eval's name with "*" for its difficulty."""
    task, _, metric = split_eval(eval_name)
    return f"{task}/*/{metric}"


def _mean(values: Sequence[float | None]) -> float | None:
    """None unless every value was measured: a mean over fewer would be of something else."""
    if not values or None in values:
        return None
    return statistics.fmean(values)
