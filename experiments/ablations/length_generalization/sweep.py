"""Which filter lets a model teach itself longer problems?

`length_generalization:TASK` with TASK one of reverse, addition, forward. Every filter, and the
control that trains for the same steps on the seed data alone, under three seeds. The warm-up of a
seed is shared by all its arms.
"""

from karploop.sweeps import Sweep, chain, name_arms, over, product, seeds

TASKS = {
    "reverse": ("configs/reversal.py", "reverse"),
    "addition": ("configs/addition.py", "interleaved_addition"),
    "forward": ("configs/forward_addition.py", "forward_addition"),
}
SEEDS = 3


def get_sweep(arg: str | None) -> Sweep:
    if arg not in TASKS:
        raise ValueError(f"name a task, as in length_generalization:reverse; known: {[*TASKS]}")
    config, task = TASKS[arg]
    one_sample = over("filter.name", ["verifier", "none", "length"])
    matched = [{"filter.name": "random", "filter.match": "verifier"}]
    control = [{"filter.name": "discard", "filter.on_empty": "train"}]
    vote = product(
        over("filter.name", ["vote"]),
        [{"generate.samples": 8, "generate.temperature": 1.0, "filter.agreement": 0.75}],
    )
    # A round in which a filter keeps nothing is passed over: the arm goes on to the last round.
    skipping = product(chain(one_sample, matched, vote), over("filter.on_empty", ["skip"]))
    return Sweep(
        config=config,
        arms=name_arms(seeds(chain(skipping, control), SEEDS)),
        title=f"Length generalization by filter: {task}",
        metrics=[
            f"{task}/{n}/exact_match" for n in (6, 8, 10)
        ] + ["label_precision", "sample_accuracy", "yield"],
        baseline="filter.name=discard__filter.on_empty=train",
    )
