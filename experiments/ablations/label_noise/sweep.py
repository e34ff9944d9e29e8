"""How much label noise does the loop withstand, of which kind, and when?

The kept rows are right by the gold verifier; then a share of them is made wrong. Rate × structure
× first noisy round, three seeds; noise that starts early feeds every later round.
"""

from karploop.sweeps import Sweep, chain, name_arms, over, product, seeds

SEEDS = 3


def get_sweep(arg: str | None) -> Sweep:
    if arg:
        raise ValueError("this sweep takes no argument")
    noisy = product(
        over("noise.rate", [0.05, 0.2, 0.5]),
        over("noise.structure", ["digit", "swap", "drop"]),
        over("noise.first_round", [0, 3]),
    )
    clean = over("noise.rate", [0.0])
    arms = product(chain(clean, noisy), over("filter.on_empty", ["skip"]))
    return Sweep(
        config="configs/reversal.py",
        arms=name_arms(seeds(arms, SEEDS)),
        title="Label noise: rate, structure, round of injection",
        metrics=["reverse/8/exact_match", "reverse/10/exact_match"],
        baseline="filter.on_empty=skip__noise.rate=0.0",
    )
