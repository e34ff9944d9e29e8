"""AI feedback against human feedback against a verifier, by how often the labels are wrong.

python -m experiments.feedback --workdir=DIR [--output=DIR] [--seeds=3]

Every arm learns from as many labels, each of which says which of two replies of one base is better
(`configs/rlhf.py:dpo`), in as many steps. Who labels differs: the gold verifier, simulated
annotators who err at a known rate, or the base itself by a constitution. How often labels were
wrong is counted afterwards, with the same gold for all. Runs that are done are not repeated.

The output, by default WORKDIR too, gets table.md, table.tex, table.csv and table.png, and
curve.png: the worth of replies against the error of labels.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from karploop import cli
from karploop.config import Config
from karploop.data.tasks import Task
from karploop.data.tasks.manners import CRITIQUE, POLITE, PREFERENCE, REQUEST
from karploop.errors import RunFailed, UserError
from karploop.files import is_local
from karploop.reporting.comparison import Group, Results, compare
from karploop.sweeps import ROOT

FLAGS = flags.FLAGS
CONFIG = ROOT / "configs" / "rlhf.py"
COMMON = {
    # Where a verifier can tell a rude reply from a good one.
    "task.name": "karploop.data.tasks.manners:POLITE",
    # Of one pair in six, the verifier calls one reply right and the other wrong.
    "generate.prompts": "2048",
    "preference.count": "256",
}
RATES = (0, 10, 20, 30, 40, 50)  # percent
CONSTITUTION = {
    "judge.name": "constitution",
    "judge.templates": "short",
    "judge.constitution": "manners.txt",
    "judge.principles": "3",
}
VERIFIER, RLAIF, SURE, BASE = "verifier", "RLAIF", "RLAIF, where it is sure", "base"
ARMS = {
    VERIFIER: {"judge.name": "verifier"},
    **{
        f"annotators, {rate}% wrong": {
            "judge.name": "simulated_annotators",
            "judge.error": f"{rate / 100}",
        }
        for rate in RATES
    },
    RLAIF: CONSTITUTION,
    SURE: CONSTITUTION | {"preference.margin": "0.15"},
}
ERROR, TIED, WORTH, RIGHT, VIOLATIONS, LOSS = METRICS = (
    *("label error", "labels on ties", "worth", "share right", "violations a reply"),
    *("loss of other skills",),
)

Summary = dict[str, Any]


def define_flags() -> None:
    flags.DEFINE_string("workdir", "workdir/feedback", "Where the runs are.")
    flags.DEFINE_string("output", None, "Folder for tables and plots; default: the workdir.")
    flags.DEFINE_integer("seeds", 3, "How many, from 0 on.")


def study(workdir: str, output: str, seeds: int) -> str:
    """Runs what was not run yet, writes tables and plots; returns the tables.

    Raises:
      UserError: folders or numbers that make no sense.
      RunFailed: a run was stopped, and the same command goes on; or it had too few labels.
    """
    from experiments.table import write_tables

    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    for name, folder in {"workdir": workdir, "output": output}.items():
        if not is_local(folder):
            raise UserError(f"--{name}={folder}: wants a directory of this machine")
    found: dict[str, dict[int, Summary | None]] = {name: {} for name in (BASE, *ARMS)}
    for seed in range(seeds):
        for arm in ARMS:
            before, after = _measured(workdir, arm, seed)
            found[BASE][seed], found[arm][seed] = before, after
    groups = [Group(name, of) for name, of in found.items()]
    results = compare(groups, METRICS, VERIFIER)
    folder = pathlib.Path(output)
    text = write_tables(groups, results, VERIFIER, "Feedback by its error", folder)
    curve(results).savefig(folder / "curve.png", dpi=160, facecolor="white")
    return text


def _measured(workdir: str, arm: str, seed: int) -> tuple[Summary, Summary]:
    """What is known of the base, and of the arm's policy and its labels."""
    import pyarrow.parquet as pq

    from karploop import launch

    config = config_of(arm, seed)
    name = f"{arm.replace(', ', '-').replace(' ', '-').replace('%', '')}-{seed}"
    launch.launch(config, workdir, name)
    summary = json.loads((pathlib.Path(workdir) / f"runs/{name}/summary.json").read_text())
    if not summary["complete"]:
        raise RunFailed(f"the run '{name}' was stopped: the same command goes on")
    base, last = summary["rounds"]
    key = last["stages"]["pairs"]
    pairs = pq.read_table(pathlib.Path(workdir) / f"store/pairs/{key}/pairs.parquet").to_pylist()
    if len(pairs) != config.preference.count:
        raise RunFailed(
            f"the run '{name}' has {len(pairs)} labels, and others have "
            f"{config.preference.count}: raise 'generate.prompts'"
        )
    labelled = label_metrics(POLITE, [(p["prompts"], p["chosen"], p["rejected"]) for p in pairs])
    return _summary(policy_metrics(base["evals"])), _summary(
        policy_metrics(last["evals"]) | labelled
    )


def config_of(arm: str, seed: int) -> Config:
    return cli.load_config(f"{CONFIG}:dpo", COMMON | ARMS[arm] | {"seed": f"{seed}"})


def label_metrics(task: Task, pairs: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Of pairs whose two texts differ in worth, how often the worse was chosen; and of all pairs,
    how many do not differ.

    Args:
      pairs: prompt, chosen text, rejected text.
    """
    worths_Px2 = np.array([[task.worth(p, one), task.worth(p, two)] for p, one, two in pairs])
    lead_P = worths_Px2[:, 0] - worths_Px2[:, 1]
    decided_P = lead_P != 0
    error = {ERROR: float(np.mean(lead_P[decided_P] < 0))} if decided_P.any() else {}
    return error | {TIED: float(np.mean(~decided_P))}


def policy_metrics(evals: Mapping[str, float]) -> dict[str, float]:
    """Of sampled replies to held-out requests; and the likelihood of held-out labelled faults,
    revisions and choices."""
    others = [evals[f"polite/{kind}/nll"] for kind in range(CRITIQUE, PREFERENCE + 1)]
    names = {WORTH: "worth", RIGHT: "pass@1", VIOLATIONS: "violations"}
    found = {name: evals[f"polite/{REQUEST}/{metric}"] for name, metric in names.items()}
    return found | {LOSS: float(np.mean(others))}


def _summary(metrics: Mapping[str, float]) -> Summary:
    return {"rounds": [{"round": 0, "evals": {}, "metrics": dict(metrics)}]}


def curve(results: Results) -> Figure:
    """The worth of a policy's replies against the error of its labels, with 95% intervals."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)
    by_rate = [name for name in ARMS if name.startswith("annotators")]
    errors, worths = results[ERROR], results[WORTH]
    looks = {
        "simulated annotators": (by_rate, dict(color="#2a6f97", marker="o", ls="-")),
        VERIFIER: ([VERIFIER], dict(color="#3a7d44", marker="s", ls="")),
        RLAIF: ([RLAIF], dict(color="#c1442d", marker="D", ls="")),
        SURE: ([SURE], dict(color="#c98a1b", marker="^", ls="")),
    }
    for label, (arms, look) in looks.items():
        means = [worths[arm].estimate for arm in arms]
        bars = [
            [0.0 if e.low is None else e.mean - e.low for e in means],
            [0.0 if e.high is None else e.high - e.mean for e in means],
        ]
        place = [100 * errors[arm].estimate.mean for arm in arms]
        panel.errorbar(place, [e.mean for e in means], yerr=bars, label=label, capsize=3, **look)
        for arm in arms:
            seeds = [
                (100 * errors[arm].values[s], worth) for s, worth in worths[arm].values.items()
            ]
            panel.scatter(*zip(*seeds, strict=True), s=9, color=look["color"], alpha=0.45, lw=0)
    base = worths[BASE].estimate.mean
    panel.axhline(base, color="#555555", lw=1, ls="--", label="the base, which all start from")
    panel.set(
        xlabel="labels that are wrong, % of those on unequal replies", ylabel="worth of replies"
    )
    # Intervals of two seeds may be wider than all there is between arms.
    seen = [worth for cell in worths.values() for worth in cell.values.values()]
    panel.set_ylim(min(seen) - 0.1, max(seen) + 0.1)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return figure


def main(argv: list[str]) -> int:
    cli.no_arguments(argv)
    output = FLAGS.output or FLAGS.workdir
    print(study(FLAGS.workdir, output, FLAGS.seeds))
    print(f"\nwritten to {output}: table.md, table.tex, table.csv, table.png, curve.png")
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
