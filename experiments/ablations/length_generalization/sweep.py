"""Which filter lets a model teach itself longer problems?

`length_generalization:TASK` with TASK one of reverse, addition. Every filter, and the control that
trains for the same steps on the seed data alone, under three seeds. The warm-up of a seed is shared
by all its arms. A round in which a filter keeps nothing is passed over.
"""

from karploop.sweeps import Sweep, label_arms

TASKS = {
    "reverse": ("configs/reversal.py", "reverse"),
    "addition": ("configs/addition.py", "interleaved_addition"),
}
SEEDS = 3
ARMS = {
    "verifier": {"filter.name": "verifier"},
    "vote": {
        "filter.name": "vote",
        "filter.agreement": 0.75,
        "generate.samples": 8,
        "generate.temperature": 1.0,
    },
    "length": {"filter.name": "length"},
    "random": {"filter.name": "random", "filter.match": "verifier"},
    "none": {"filter.name": "none"},
}
CONTROL = {"no-new-data": {"filter.name": "discard", "filter.on_empty": "train"}}


def get_sweep(arg: str | None) -> Sweep:
    if arg not in TASKS:
        raise ValueError(f"name a task, as in length_generalization:reverse; known: {[*TASKS]}")
    config, task = TASKS[arg]
    arms = {name: arm | {"filter.on_empty": "skip"} for name, arm in ARMS.items()}
    return Sweep(
        config=config,
        arms=label_arms(arms | CONTROL, SEEDS),
        title=f"Length generalization by filter: {task}",
        metrics=[
            *(f"{task}/{n}/exact_match" for n in (6, 8, 10)),
            *("label_precision@0", "sample_accuracy@0", "label_precision", "yield"),
        ],
        baseline="no-new-data",
    )
