"""When does optimising a reward model make things worse by the gold reward? (arXiv 2210.10760)

python -m experiments.overoptimization --workdir=DIR [--output=DIR] [--seeds=3]

For every seed it runs `configs/overoptimization.py`, or finds what was run before: reward models
learn from 50, 500 and 5,000 comparisons of replies of the base, labelled by a known gold reward,
and are optimised by best-of-n and by policy gradient, with a penalty on the divergence from the
base and without. The output, by default WORKDIR too, gets table.md, table.tex, table.csv and
table.png.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from karploop import cli
from karploop.errors import RunFailed, UserError
from karploop.files import is_local, write_atomic, writing
from karploop.sweeps import ROOT

FLAGS = flags.FLAGS
CONFIG = ROOT / "configs" / "overoptimization.py"
# Comparisons of a reward model, and steps that it learns in: the more, the fewer times over.
SIZES = {50: 60, 500: 150, 5000: 500}
PENALTIES = {"policy gradient": 0.0, "with penalty": 0.3}  # on the divergence from the base
NS = tuple(2**k for k in range(11))  # of best-of-n
# Samples alone: what is to be compared is labelled before the loop reads it.
_UNLABELLED = {"rounds": "1", "judge.name": "", "filter.name": "discard", "objective.name": "sft"}


def define_flags() -> None:
    flags.DEFINE_string("workdir", "workdir/overoptimization", "Where the runs are.")
    flags.DEFINE_string("output", None, "Folder for tables and plot; default: the workdir.")
    flags.DEFINE_integer("seeds", 3, "How many, from 0 on.")


def study(
    workdir: str,
    output: str,
    seeds: int,
    options: str = "",
    sizes: Mapping[int, int] = SIZES,
    ns: Sequence[int] = NS,
    penalties: Mapping[str, float] = PENALTIES,
) -> str:
    """Runs what was not run yet, writes tables and plot; returns the tables.

    Args:
      options: the argument of the config, such as `tiny`.
      sizes: comparisons → steps of training, from few comparisons to many.
      ns: of best-of-n.
      penalties: way of learning → coefficient of the divergence from the base.

    Raises:
      UserError: folders or numbers that make no sense.
      RunFailed: a run was stopped; the same command goes on.
    """
    from karploop.oversight.overoptimization_report import write

    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    for name, folder in {"workdir": workdir, "output": output}.items():
        if not is_local(folder):
            raise UserError(f"--{name}={folder}: wants a directory of this machine")
    for folder in (workdir, output):
        with writing(folder, folder):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    spec = f"{CONFIG}:{options}" if options else str(CONFIG)
    found = {s: _measured(workdir, s, spec, sizes, ns, penalties) for s in range(seeds)}
    results = {size: {seed: of[size] for seed, of in found.items()} for size in sizes}
    with writing(output, output):
        return write(pathlib.Path(output), results, ns)


def _measured(
    workdir: str,
    seed: int,
    spec: str,
    sizes: Mapping[int, int],
    ns: Sequence[int],
    penalties: Mapping[str, float],
) -> dict[int, Any]:
    """By size, what was found under a seed."""
    from karploop.data.tasks import get_task
    from karploop.oversight.overoptimization_study import (
        Found,
        comparisons,
        read_policies,
        read_proxy,
    )
    from karploop.store import Store

    base = cli.load_config(spec, _UNLABELLED | {"seed": f"{seed}"})
    samples = _run(workdir, f"base__seed={seed}", base)
    store, task = Store(workdir), get_task(base.task.name)
    found = {}
    for size, steps in sizes.items():
        review = pathlib.Path(workdir) / "comparisons" / f"{size}__seed={seed}.jsonl"
        review.parent.mkdir(exist_ok=True)
        rows = comparisons(store, task, samples, size)
        write_atomic(review, "".join(json.dumps(row) + "\n" for row in rows).encode())
        given = {"seed": f"{seed}", "judge.review": str(review), "train.steps": f"{steps}"}
        runs = {}
        for way, penalty in penalties.items():
            config = cli.load_config(spec, given | {"phases.2.objective.kl": f"{penalty}"})
            runs[way] = _run(workdir, f"{size}__kl={penalty}__seed={seed}", config)
        proxy = read_proxy(store, task, next(iter(runs.values())), ns)
        policies = {way: read_policies(store, task, run, proxy) for way, run in runs.items()}
        found[size] = Found(proxy, policies)
    return found


def _run(workdir: str, name: str, config: Any) -> Mapping[str, Any]:
    """The summary of a run. Raises RunFailed: it was stopped."""
    from karploop import launch
    from karploop.reporting.arms import read_summary

    launch.launch(config, workdir, name)
    summary = read_summary(pathlib.Path(workdir), name)
    if summary is None:
        raise RunFailed(f"the run '{name}' was stopped: the same command goes on")
    return summary


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    output = FLAGS.output or FLAGS.workdir
    print(study(FLAGS.workdir, output, FLAGS.seeds))
    print(f"\nwritten to {output}: table.md, table.tex, table.csv, table.png")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
