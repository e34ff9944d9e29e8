"""Does STaR need its verifier, and what do hints add?

Addition with a scratchpad (`configs/star.py`), every arm under six seeds; arms of a seed start
from the same base, which has seen hints. `correct-only` keeps what is right by gold, and
`rationalised` asks again with a hint where nothing was. The controls: everything that ended
(`none`), as many rows as the verifier would keep but drawn blindly (`random`), the majority of
eight samples (`vote`), and the same steps on the labelled problems alone (`no-new-data`).
"""

from karploop.sweeps import Sweep, label_arms

SEEDS = 6
ARMS = {
    "correct-only": {"filter.name": "verifier"},
    "rationalised": {"filter.name": "verifier", "generate.rationalise": True},
    "random": {"filter.name": "random", "filter.match": "verifier"},
    "none": {"filter.name": "none"},
    "vote": {
        "filter.name": "vote",
        "filter.agreement": 0.5,
        "generate.samples": 8,
        "generate.temperature": 1.0,
    },
    "no-new-data": {"filter.name": "discard", "filter.on_empty": "train"},
}


def get_sweep(arg: str | None) -> Sweep:
    if arg:
        raise ValueError("this sweep takes no argument")
    task = "scratchpad_addition"
    return Sweep(
        config="configs/star.py",
        arms=label_arms(ARMS, SEEDS),
        title="STaR on addition with a scratchpad",
        metrics=[
            *(f"{task}/{n}/exact_match" for n in (2, 3, 4)),
            *(f"{task}/4/exact_match@{n}" for n in (-1, 0, 1)),
            *("label_precision@0", "label_precision", "yield"),
        ],
        baseline="correct-only",
    )
