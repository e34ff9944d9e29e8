"""Which filter lets a model teach itself longer problems?

`length_generalization:TASK` with TASK one of reverse, addition, forward_addition. Every filter, and
the control that trains for the same steps on the seed data alone, under three seeds. The warm-up of
a seed is shared by all its arms. A round in which a filter keeps nothing is passed over.

`vote` lets the samples of one model vote. `vote-models` lets five models vote that differ by seed
alone and learn from what they agree on, which is five times the sampling and training of the other
arms; `none-models` is its control at equal compute, five models that learn from each other's
answers unseen. These two are on `reverse` alone.
"""

from karploop.sweeps import Sweep, label_arms

TASKS = {
    "reverse": ("configs/reversal.py", "reverse"),
    "addition": ("configs/addition.py", "interleaved_addition"),
    "forward_addition": ("configs/addition.py", "forward_addition"),
}
SEEDS = 3
MODELS = {"members": 5, "generate.temperature": 0.0}
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
OF_MODELS = {
    "vote-models": MODELS
    | {"filter.name": "vote", "filter.agreement": 0.8, "judge.voters": "members"},
    "none-models": MODELS | {"filter.name": "none"},
}
CONTROL = {"no-new-data": {"filter.name": "discard", "filter.on_empty": "train"}}


def get_sweep(arg: str | None) -> Sweep:
    if arg not in TASKS:
        raise ValueError(f"name a task, as in length_generalization:reverse; known: {[*TASKS]}")
    config, task = TASKS[arg]
    chosen = ARMS | (OF_MODELS if arg == "reverse" else {}) | CONTROL
    arms = {name: {"filter.on_empty": "skip"} | arm for name, arm in chosen.items()}
    arms = {name: {"task.name": task} | arm for name, arm in arms.items()}
    return Sweep(
        config=config,
        arms=label_arms(arms, SEEDS),
        title=f"Length generalization by filter: {task}",
        metrics=[
            *(f"{task}/{n}/exact_match" for n in (6, 8, 10)),
            *(f"{name}@{n}" for n in (0, 1) for name in ("label_precision", "sample_accuracy")),
            *("label_precision", "yield"),
        ],
        baseline="no-new-data",
    )
