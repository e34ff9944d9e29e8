"""How harmless each step of Constitutional AI makes a small model, and what it costs (2212.08073).

python -m experiments.constitution --workdir=DIR [--output=DIR] [--seeds=3]

For every seed it runs `configs/constitutional.py` both ways, by a reward model and by DPO, or finds
what was run before, and tabulates replies after each revision, and the policies after each stage.
The output, by default WORKDIR too, gets table.md, table.tex, table.csv and table.png.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from karploop import cli
from karploop.data.tasks.manners import CRITIQUE, PREFERENCE, REQUEST, broken, useful
from karploop.errors import RunFailed, UserError
from karploop.files import is_local
from karploop.reporting.comparison import Group, compare
from karploop.sweeps import ROOT

FLAGS = flags.FLAGS
CONFIG = ROOT / "configs" / "constitutional.py"
WAYS = {"reward model": "", "DPO": "dpo"}
VIOLATIONS, HARMLESS, USEFUL, LOSS = METRICS = (
    *("violations a reply", "share harmless", "share useful", "loss of other skills"),
)
BASE = "base"

Measured = dict[str, dict[str, float]]  # arm → metric → value


def define_flags() -> None:
    flags.DEFINE_string("workdir", "workdir/constitution", "Where the runs are.")
    flags.DEFINE_string("output", None, "Folder for tables and plot; default: the workdir.")
    flags.DEFINE_integer("seeds", 3, "How many, from 0 on.")


def study(workdir: str, output: str, seeds: int, options: str = "") -> str:
    """Runs what was not run yet, writes tables and plot; returns the tables.

    Args:
      options: further arguments of the config, such as `tiny`.

    Raises:
      UserError: folders or numbers that make no sense.
      RunFailed: a run was stopped; the same command goes on.
    """
    from experiments.table import write_tables

    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    for name, folder in {"workdir": workdir, "output": output}.items():
        if not is_local(folder):
            raise UserError(f"--{name}={folder}: wants a directory of this machine")
    found = {seed: _measured(workdir, seed, options) for seed in range(seeds)}
    groups = [
        Group(arm, {seed: _summary(of[arm]) for seed, of in found.items()}) for arm in found[0]
    ]
    results = compare(groups, METRICS, BASE)
    return write_tables(groups, results, BASE, "Constitutional AI", pathlib.Path(output))


def _measured(workdir: str, seed: int, options: str) -> Measured:
    """All arms of a seed."""
    arms: Measured = {}
    for way, argument in WAYS.items():
        rounds = _run(workdir, f"{argument or 'reward'}-{seed}", f"{argument},{options}", seed)
        base, supervised, *_, last = rounds
        arms[BASE] = policy_metrics(base["evals"])
        key = supervised["stages"]["generate"]
        arms |= revision_metrics(pathlib.Path(workdir) / f"store/generate/{key}/samples.parquet")
        arms["supervised on the last"] = policy_metrics(supervised["evals"])
        arms[f"… then by {way}"] = policy_metrics(last["evals"])
    return arms


def _run(workdir: str, name: str, argument: str, seed: int) -> Sequence[Mapping[str, Any]]:
    """The rounds of a run, the base first."""
    from karploop import launch

    argument = argument.strip(",")
    config = cli.load_config(
        f"{CONFIG}:{argument}" if argument else str(CONFIG), {"seed": f"{seed}"}
    )
    launch.launch(config, workdir, name)
    summary = json.loads((pathlib.Path(workdir) / f"runs/{name}/summary.json").read_text())
    if len(summary["rounds"]) != config.rounds + 1:
        raise RunFailed(f"the run '{name}' was stopped: the same command goes on")
    return summary["rounds"]


def policy_metrics(evals: Mapping[str, float]) -> dict[str, float]:
    """Of sampled replies to held-out requests; and the likelihood of held-out labelled faults,
    revisions and choices."""
    others = [evals[f"manners/{kind}/nll"] for kind in range(CRITIQUE, PREFERENCE + 1)]
    return {
        VIOLATIONS: evals[f"manners/{REQUEST}/violations"],
        HARMLESS: evals[f"manners/{REQUEST}/harmless"],
        USEFUL: evals[f"manners/{REQUEST}/pass@1"],
        LOSS: float(np.mean(others)),
    }


def revision_metrics(path: pathlib.Path) -> Measured:
    """Of a reply by the chain `critique_revise`, after each of its revisions."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["prompts", "steps"]).to_pylist()
    replies = [
        (row["prompts"], [step["text"].strip() for step in steps if step["step"] == "output"])
        for row in rows
        for steps in [json.loads(row["steps"])]
    ]
    most = max(len(texts) for _, texts in replies)
    arms = {}
    for turn in range(most):
        now = [(prompt, texts[turn]) for prompt, texts in replies if len(texts) == most]
        counts = np.array([len(broken(text)) for _, text in now])
        arms[f"replies, revised {turn} times"] = {
            VIOLATIONS: float(counts.mean()),
            HARMLESS: float(np.mean(counts == 0)),
            USEFUL: float(np.mean([useful(prompt, text) for prompt, text in now])),
        }
    return arms


def _summary(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {"rounds": [{"round": 0, "evals": {}, "metrics": dict(metrics)}]}


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    output = FLAGS.output or FLAGS.workdir
    print(study(FLAGS.workdir, output, FLAGS.seeds))
    print(f"\nwritten to {output}: table.md, table.tex, table.csv, table.png")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
