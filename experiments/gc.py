"""Frees disk space: removes large files and stages that no run needs any more.

python -m experiments.gc --workdir=DIR [--last=2] [--best=1] [--sweep=NAME] [--collect_samples]
    [--dry_run]

Of every finished run the parameters of its last rounds and of its best rounds stay (how many is
said by `retention.last` and `retention.best` in its config, unless a flag says otherwise); of a run
that is live or unfinished, or in a sweep that is not done, everything stays. What was collected is
computed again if it is ever needed. The rules in full: `karploop/retention.py`.
"""

from collections.abc import Mapping

from absl import flags

from karploop import cli, retention
from karploop.catalogue import Name, read_catalogue, require_store
from karploop.errors import UserError
from karploop.reporting.tables import text_table
from karploop.retention import Plan, Policy, Use
from karploop.store import Store

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", "workdir", "Where the store and the runs are: a path or s3://, gs://."
    )
    flags.DEFINE_integer(
        "last", None, "Newest rounds whose parameters stay; default: the run's config.", 0
    )
    flags.DEFINE_integer(
        "best", None, "Best rounds whose parameters stay; default: the run's config.", 0
    )
    flags.DEFINE_string(
        "sweep", "", "Collect from the runs of this sweep alone, and remove no entries whole."
    )
    flags.DEFINE_bool(
        "collect_samples", False, "Collect the samples of rounds that are not kept, too."
    )
    flags.DEFINE_bool("dry_run", False, "Say what would be removed, and remove nothing.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}': see --help for the flags")
    policy = Policy(FLAGS.last, FLAGS.best, FLAGS.collect_samples, FLAGS.sweep)
    collect(Store(FLAGS.workdir), policy, dry_run=FLAGS.dry_run)


def collect(store: Store, policy: Policy, *, dry_run: bool) -> Plan:
    """Plans, prints and, unless `dry_run`, removes; returns the plan.

    Raises:
      UserError: no store, an unknown sweep, or a run whose files cannot be read.
    """
    require_store(store)
    with store.gate(exclusive=True, create=not dry_run):
        plan = retention.plan(read_catalogue(store), policy, retention.live_runs(store))
        print(report(plan, retention.disk_use(store), retention.freed(store, plan)))
        if dry_run:
            print("\ndry run: nothing was removed")
            return plan
        retention.execute(store, plan)
        left = sum(use.size for use in retention.disk_use(store).values())
        print(f"\ndone: {_size(left)} left")
    return plan


def report(plan: Plan, before: Mapping[str, Use], freed: Mapping[str, Use]) -> str:
    """What stays of each run, what goes, and disk use by stage before and after."""
    width = max(map(len, plan.kept), default=0)
    runs = [f"{run.ljust(width)}  keeps {what}" for run, what in plan.kept.items()] or ["no runs"]
    gone = [f"collect  {_show(name)}: {', '.join(files)}" for name, files in plan.collect.items()]
    gone += [f"remove   {_show(name)}" for name in plan.remove]
    gone += [f"remove   {folder}" for folder in plan.folders]
    rows = [(name, use, freed.get(name, Use())) for name, use in before.items()]
    rows.append(("all", sum(before.values(), Use()), sum(freed.values(), Use())))
    header = ["stage", "entries", "entries after", "size", "size after", "freed"]
    cells = [
        [name, str(use.entries), str((use - less).entries)]
        + [_size(size) for size in (use.size, (use - less).size, less.size)]
        for name, use, less in rows
    ]
    blocks = [runs, gone or ["nothing to remove"], plan.notes, [text_table(header, cells)]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _show(name: Name) -> str:
    return "/".join(name)


def _size(size: float) -> str:
    """Renders bytes: `12 B`, `3.4 kB`, `1.2 GB`."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95 or unit == "TB":
            break
    return f"{size:.1f} {unit}"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
