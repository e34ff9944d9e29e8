"""How much label noise does the loop withstand, of which kind, and from which round on?

The kept rows are right by the gold verifier; then a share of them is made wrong. Rate × structure
× first noisy round, three seeds; noise that starts early feeds every later round.
"""

from karploop.sweeps import Sweep, label_arms

SEEDS = 3
RATES = (0.05, 0.2, 0.5)
STRUCTURES = ("digit", "swap", "drop")
FIRST_ROUNDS = (0, 3)


def get_sweep(arg: str | None) -> Sweep:
    if arg:
        raise ValueError("this sweep takes no argument")
    arms = {"clean": {"filter.on_empty": "skip"}} | {
        f"{structure}-{rate}-from-{first}": {
            "filter.on_empty": "skip",
            "noise.rate": rate,
            "noise.structure": structure,
            "noise.first_round": first,
        }
        for structure in STRUCTURES
        for rate in RATES
        for first in FIRST_ROUNDS
    }
    return Sweep(
        config="configs/reversal.py",
        arms=label_arms(arms, SEEDS),
        title="Label noise: structure, rate, first noisy round",
        metrics=["reverse/8/exact_match", "reverse/10/exact_match"],
        baseline="clean",
    )
