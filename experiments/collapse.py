"""Does a model that learns from its own samples collapse? (arXiv 2404.01413, 2410.16713)

python -m experiments.collapse --workdir=DIR [--output=DIR] [--generations=5] [--seeds=3]
    [--config=configs/zipf.py] [--config.KEY=VALUE …]

Samples replace the data, are accumulated beside the real ones, or both are drawn from under a fixed
budget: for iterated linear regression against its closed form, and for a small language model by
runs of the loop, one for each regime and seed. WORKDIR keeps them as experiments.run does: the same
command goes on where it was stopped, and trains nothing twice. The output, by default WORKDIR too,
gets table.md, table.csv and table.png.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from karploop import cli
from karploop.errors import UserError
from karploop.files import is_local, writing

FLAGS = flags.FLAGS
# Replacing has no real data after the base, the others count them as any row.
ARMS = {
    "replace": {"regime.data": "replace", "regime.seed_share": "0"},
    "accumulate": {"regime.data": "accumulate", "regime.seed_share": "-1"},
    "budget": {"regime.data": "budget", "regime.seed_share": "-1"},
}


def define_flags() -> None:
    flags.DEFINE_string("config", "configs/zipf.py", "Of the language model's runs.")
    flags.DEFINE_string("workdir", "workdir/collapse", "Keeps the runs.")
    flags.DEFINE_string("output", None, "Folder for tables and plot; default: the workdir.")
    flags.DEFINE_integer(
        "generations", 5, "Trained on samples, after the one trained on real data."
    )
    flags.DEFINE_integer("seeds", 3, "How many, from 0 on.")
    flags.DEFINE_integer("repetitions", 2048, "Of linear regression.")


def study(
    spec: str,
    workdir: str,
    output: str,
    *,
    generations: int,
    seeds: int,
    repetitions: int,
    overrides: Mapping[str, str] | None = None,
) -> str | None:
    """Measures what is not measured yet, writes tables and plot.

    Args:
      spec: config file of the language model's runs.
      workdir: where these are.
      output: where tables and plot go.
      generations: that are trained on samples.
      seeds: how many.
      repetitions: of linear regression.
      overrides: keys of the config, as typed.

    Returns:
      The tables as plain text; None where the user asked to stop before they were complete.

    Raises:
      UserError: settings that make no sense, or folders that cannot be written to.
    """
    from karploop import launch
    from karploop.oversight import collapse_study
    from karploop.oversight.collapse_report import write
    from karploop.oversight.regression_collapse import Regression, measure
    from karploop.reporting.arms import read_summary
    from karploop.store import Store

    for name, value in {"generations": generations, "seeds": seeds}.items():
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    regression = Regression(generations=generations + 1, repetitions=repetitions)
    given = dict(overrides or {}) | {"rounds": str(generations)}
    configs = {
        (arm, seed): cli.load_config(spec, given | of_arm | {"seed": str(seed)})
        for arm, of_arm in ARMS.items()
        for seed in range(seeds)
    }
    task = _checked(configs["replace", 0])
    for name, folder in {"workdir": workdir, "output": output}.items():
        if not is_local(folder):
            raise UserError(f"--{name}={folder}: wants a directory of this machine")
        with writing(folder, folder):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    summaries = {}
    for (arm, seed), config in configs.items():
        name = f"{arm}__seed={seed}"
        launch.launch(config, workdir, name)
        summary = read_summary(pathlib.Path(workdir), name)
        if summary is None:
            return None
        summaries[arm, seed] = summary
    language = collapse_study.study(Store(workdir), task, summaries)
    with writing(output, output):
        return write(pathlib.Path(output), regression, measure(regression), language)


def _checked(config: Any) -> Any:
    """The language of the runs. Raises UserError: there is none, or nothing is sampled of it."""
    from karploop.data.tasks import get_task
    from karploop.data.tasks.zipf import Zipf

    task = get_task(config.task.name)
    if not isinstance(task, Zipf):
        raise UserError(
            f"task '{task.name}': tails are those of a language whose probabilities are known: set "
            "'config.task.name' to a karploop.data.tasks.zipf.Zipf"
        )
    if not config.evaluate.samples:
        raise UserError(
            "'config.evaluate.samples' is 0, and tails are told by samples: set it to at least 1"
        )
    return task


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    output = FLAGS.output or FLAGS.workdir
    settings = {name: FLAGS[name].value for name in ("generations", "seeds", "repetitions")}
    text = study(FLAGS.config, FLAGS.workdir, output, overrides=_OVERRIDES, **settings)
    if text is not None:
        print(f"\n{text}\n\nwritten to {output}: table.md, table.csv, table.png")
    return 0


if __name__ == "__main__":
    define_flags()
    sys.argv, _OVERRIDES = cli.split_overrides(sys.argv)
    cli.run(main)
