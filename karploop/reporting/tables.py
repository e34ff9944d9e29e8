"""Tables of results: plain text for the terminal, Markdown and LaTeX for documents."""

import math
import re
from collections.abc import Sequence
from typing import Any

_GAP = "  "

# task -> difficulty -> round -> value
Curves = dict[str, dict[str, dict[int, float]]]


def round_label(round: int) -> str:
    """The name of a round in tables and legends; "base" for -1, before the first round."""
    return "base" if round < 0 else str(round)


def difficulty_order(difficulty: str) -> tuple[bool, float, str]:
    """Sorts difficulties: numbers by value, then names by alphabet."""
    try:
        return (False, float(difficulty), "")
    except ValueError:
        return (True, 0.0, difficulty)


def curves(summary: dict[str, Any], metric: str = "exact_match") -> Curves:
    """Takes the evals `TASK/DIFFICULTY/METRIC` of one metric out of a run's summary.

    Values that were not measured (null) are left out; difficulties come in their order.
    """
    found: Curves = {}
    for entry in summary["rounds"]:
        for name, value in entry.get("evals", {}).items():
            task, difficulty, measured = split_eval(name)
            if measured == metric and value is not None:
                found.setdefault(task, {}).setdefault(difficulty, {})[entry["round"]] = value
    return {
        task: {d: found[task][d] for d in sorted(found[task], key=difficulty_order)}
        for task in sorted(found)
    }


def split_eval(name: str) -> tuple[str, str, str]:
    """Splits `TASK/DIFFICULTY/METRIC`; a task may itself contain slashes.

    Raises:
      ValueError: the name has fewer than three parts.
    """
    parts = name.rsplit("/", 2)
    if len(parts) != 3:
        raise ValueError(f"eval name {name!r} is not TASK/DIFFICULTY/METRIC")
    return parts[0], parts[1], parts[2]


def is_by_round(summary: dict[str, Any]) -> bool:
    """Whether no task was measured at more than one difficulty: then rounds are compared alone."""
    names = {split_eval(n)[:2] for e in summary["rounds"] for n in e.get("evals", {})}
    return len({task for task, _ in names}) == len(names)


def measured(summary: dict[str, Any]) -> list[str]:
    """The metrics among a run's evals, each once, in the order in which they come up."""
    names = (name for entry in summary["rounds"] for name in entry.get("evals", {}))
    return list(dict.fromkeys(split_eval(name)[2] for name in names))


def run_table(summary: dict[str, Any], width: int = 100) -> str:
    """All that was measured of a run, as text: by difficulty, or metric by metric.

    What makes the run a diagnostic, if it is one, stands behind it.
    """
    if is_by_round(summary):
        tables = [metrics_table(summary, width)]
    else:
        shown = [m for m in measured(summary) if m.startswith("pass@")]
        tables = [accuracy_table(summary, m, width) for m in ("exact_match", *shown)]
    return "\n\n".join([*tables, *([summary["diagnostic"]] if "diagnostic" in summary else [])])


_SHARES = ("exact_match", "distinct", "majority_answer", "random_answer")


def is_share(metric: str) -> bool:
    """Whether an eval lies between 0 and 1, and is shown in per cent."""
    return metric in _SHARES or metric.startswith("pass@")


def metrics_table(summary: dict[str, Any], width: int = 100) -> str:
    """Held-out measurements of tasks of one difficulty: a row a round, a column a metric."""
    blocks = []
    found: dict[str, dict[str, dict[int, float]]] = {}  # task → metric → round → value
    for entry in summary["rounds"]:
        for name, value in entry.get("evals", {}).items():
            task, _, metric = split_eval(name)
            if value is not None:
                found.setdefault(task, {}).setdefault(metric, {})[entry["round"]] = value
    for task, by_metric in sorted(found.items()):
        rounds = sorted({r for values in by_metric.values() for r in values})
        metrics = sorted(by_metric, key=lambda m: not is_share(m))
        header = ["round", *(f"{m}, %" if is_share(m) else m for m in metrics)]
        rows = [[round_label(r), *(_cell(m, by_metric[m].get(r)) for m in metrics)] for r in rounds]
        blocks.append("\n\n".join([f"{task}: held out", *folded_tables(header, rows, width)]))
    return "\n\n".join(blocks) or "nothing was measured in this run"


def _cell(metric: str, value: float | None) -> str:
    if is_share(metric):
        return _percent(value)
    return "-" if value is None else f"{value:.4g}"


def accuracy_table(summary: dict[str, Any], metric: str = "exact_match", width: int = 100) -> str:
    """Held-out accuracy in per cent: a block a task, a row a round, a column a difficulty.

    Args:
      summary: a run's `summary.json`.
      metric: the eval to show, a share between 0 and 1.
      width: characters a line may have; more columns go into a further group of rows.

    Returns:
      Lines without a newline at the end; what was not measured is shown as "-".
    """
    blocks = []
    for task, by_difficulty in curves(summary, metric).items():
        rounds = sorted({r for values in by_difficulty.values() for r in values})
        header = ["round", *by_difficulty]
        rows = [
            [round_label(r), *(_percent(values.get(r)) for values in by_difficulty.values())]
            for r in rounds
        ]
        title = f"{task}: {metric} by difficulty, held out, %"
        blocks.append("\n\n".join([title, *folded_tables(header, rows, width)]))
    return "\n\n".join(blocks) or f"no eval of {metric} in this run"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns cells in plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return _GAP.join([first, *rest]).rstrip()

    rule = _GAP.join("-" * w for w in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def folded_tables(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 100
) -> list[str]:
    """Splits a wide text table into several, each with the first column, of `width` at most."""
    first, *others = (max(map(len, column)) for column in zip(header, *rows, strict=True))
    fitting = max((width - first) // (len(_GAP) + max(others)), 1)
    tables = math.ceil(len(others) / fitting)
    size = math.ceil(len(others) / tables)  # tables of equal width, not a last one of one column
    groups = [
        [0, *range(start, min(start + size, len(header)))] for start in range(1, len(header), size)
    ]
    return [
        text_table([header[i] for i in group], [[row[i] for i in group] for row in rows])
        for group in groups
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured Markdown table; cells are plain text and get escaped."""
    align = [":---", *["---:"] * (len(header) - 1)]
    lines = [map(escape_markdown, header), align, *(map(escape_markdown, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def latex_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str
) -> str:
    """A LaTeX table for the booktabs package; cells and caption are plain text and get escaped."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escape_latex, cells)) + r" \\"

    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\label{{{re.sub(r'[^A-Za-z0-9:.-]', '-', label)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def escape_markdown(text: str) -> str:
    """Escapes what Markdown, or HTML inside it, would read as markup; newlines become spaces."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&$])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # A bracket right after \\ or at the start of a row would be read as an optional argument.
    "[": "{[}",
    "]": "{]}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": r"\textendash{}",
    "Δ": r"$\Delta$",
}


def escape_latex(text: str) -> str:
    """Escapes what LaTeX would read as markup; newlines become spaces."""
    escaped = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", escaped)  # else two hyphens print as one dash


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
