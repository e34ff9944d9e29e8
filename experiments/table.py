"""Tabulates the arms of a sweep: means over seeds and paired tests against a baseline.

python -m experiments.table --workdir=DIR [--sweep=NAME[:ARG]] [--metric=M,…] [--baseline=ARM]
    [--output=DIR]

Writes table.md, table.tex (booktabs), table.csv and table.png. Runs that differ by seed alone make
one row. Without --sweep all runs of the workdir are compared, by the settings they differ in.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from karploop import cli
from karploop.errors import UserError
from karploop.reporting import tables
from karploop.reporting.arms import read_arms, read_summary
from karploop.reporting.comparison import (
    DIAGNOSTIC,
    Group,
    Results,
    compare,
    csv_text,
    default_metrics,
    difference_rows,
    footnote,
    marked,
    mean_rows,
)
from karploop.reporting.plots import ArmResult, comparison_plot
from karploop.schema import flatten
from karploop.store import is_local
from karploop.sweeps import SEED, name_overrides, sweep_name

# Settings that tell no experiment apart.
_IDLE = ("name", SEED, "mesh", "retention")


def sweep_groups(workdir: pathlib.Path, arms: Sequence) -> list[Group]:
    """The arms of a sweep by group; what is not done is missing, whatever its run left."""
    found: dict[str, dict] = {}
    for arm in arms:
        summary = read_summary(workdir, arm.run) if arm.status == "done" else None
        found.setdefault(arm.group, {})[arm.overrides.get(SEED)] = summary
    return [Group(marked(name, of.values()), of) for name, of in found.items()]


def run_groups(workdir: pathlib.Path) -> list[Group]:
    """All runs of a workdir by group, each named after the settings that are not the same in all.

    Raises:
      UserError: there are no runs.
    """
    paths = sorted((workdir / "runs").glob("*/config.json"))
    if not paths:
        raise UserError(f"no runs in '{workdir}': --workdir wants the one given to experiments.run")
    configs = {path.parent.name: flatten(json.loads(path.read_text())) for path in paths}
    keys = sorted({key for config in configs.values() for key in config})
    varying = [
        key
        for key in keys
        if key.split(".")[0] not in _IDLE
        and len({json.dumps(config.get(key)) for config in configs.values()}) > 1
    ]
    found: dict[str, dict] = {}
    for run, config in configs.items():
        name = name_overrides({key: config.get(key) for key in varying})
        summary = read_summary(workdir, run)
        summaries = found.setdefault(name, {})
        # Two runs of one config and seed have one result, if either has it.
        summaries[config.get(SEED)] = summary or summaries.get(config.get(SEED))
    return [Group(marked(name, of.values()), of) for name, of in found.items()]


def write_tables(
    groups: Sequence[Group], results: Results, baseline: str, title: str, output: pathlib.Path
) -> str:
    """Writes all four files; returns the tables as plain text."""
    output.mkdir(parents=True, exist_ok=True)
    parts = {"means": mean_rows(groups, results)}
    if len(groups) > 1:
        parts["differences"] = difference_rows(groups, results, baseline)
    note = footnote(results, baseline)
    markdown = [f"# {tables.escape_markdown(title)}"]
    markdown += [tables.markdown_table(*part) for part in parts.values()]
    markdown += [tables.escape_markdown(note)]
    (output / "table.md").write_text("\n\n".join(markdown) + "\n", "utf-8")
    latex = [
        tables.latex_table(*part, f"{title}: {name}. {note}", f"tab:{output.name}:{name}")
        for name, part in parts.items()
    ]
    (output / "table.tex").write_text("\n\n".join(latex) + "\n", "utf-8")
    (output / "table.csv").write_text(csv_text(groups, results), "utf-8")
    plotted = {
        metric: [ArmResult(n, list(c.values.values()), c.estimate) for n, c in cells.items()]
        for metric, cells in results.items()
    }
    comparison_plot(plotted, output / "table.png", title, baseline)
    texts = [text for part in parts.values() for text in tables.folded_tables(*part, 120)]
    return "\n\n".join([title, *texts, note])


def define_flags() -> None:
    flags.DEFINE_string("workdir", "workdir", "Where the runs are.")
    flags.DEFINE_string("sweep", None, "Sweep as given to experiments.sweep; default: all runs.")
    flags.DEFINE_list("metric", None, "Columns; default: the sweep's, else each task's accuracy.")
    flags.DEFINE_string("baseline", None, "Row to compare with; default: the sweep's, else first.")
    flags.DEFINE_string("output", None, "Default: WORKDIR/sweeps/NAME, or WORKDIR/tables.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': flags are --NAME=VALUE, see --help")
    args = flags.FLAGS
    if not is_local(args.workdir):
        raise UserError(f"--workdir={args.workdir}: a table needs a directory of this machine")
    workdir = pathlib.Path(args.workdir)
    if args.sweep:
        name = sweep_name(args.sweep)
        sweep = read_arms(workdir, name)
        groups, title = sweep_groups(workdir, sweep["arms"]), sweep["title"]
        metrics, baseline = sweep["metrics"], sweep["baseline"]
        output = workdir / "sweeps" / name
    else:
        groups, title, metrics, baseline = run_groups(workdir), "All runs", [], ""
        output = workdir / "tables"
    summaries = [s for group in groups for s in group.summaries.values() if s is not None]
    metrics = args.metric or metrics or default_metrics(summaries)
    baseline = args.baseline or baseline or groups[0].name
    if baseline + DIAGNOSTIC in {group.name for group in groups}:
        baseline += DIAGNOSTIC
    results = compare(groups, metrics, baseline)
    output = pathlib.Path(args.output) if args.output else output
    print(write_tables(groups, results, baseline, title, output))
    print(f"\nwritten to {output}: table.md, table.tex, table.csv, table.png")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
