"""STaR: a model that learns from its own steps to right answers (arXiv 2203.14465), on addition.

    python -m experiments.run --config=configs/star.py
    python -m experiments.run --config=configs/star.py:rationalise

A small model learns from 400 labelled sums of one to four digits to write a scratchpad and an
answer. Then each round it answers 1024 new problems, greedily; what ends in the right answer is
kept, whatever the scratchpad says, and the *base* is trained on this round's kept rows beside the
labelled ones. With the argument `rationalise`, problems it got wrong are asked again with the right
answer as a hint, and what is right then is learnt without the hint.

About a minute on 2 cores. Held-out exact match on sums of four digits, means of seeds 0–5, goes
from 30% (base) to 60%, and with `rationalise` to 78%; the same steps on the labelled problems alone
reach 47%. Seeds differ much, by how good their base is: seed 0, the weakest, goes from 3 to 14 and
28%. Of the answers that are right under a hint, 95% or more have a right scratchpad, though nobody
looks at it (experiments/ablations/star_addition/README.md).

The arguments `tiny` and `rationalise,tiny` run the same code on sums of one digit.

As in the paper, rounds start from the base, learn from this round's rows alone, and all lengths
are asked from the first round on. There the base is a published model that is shown ten scratchpads
(and for rationalisation ten with hints) of each length in its prompt; here it is trained on some,
both with and without hints, and they stay in the mixture so that it goes on reading hints. The
paper's rounds have ever more steps, and more problems; these are all alike.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    wanted = set(arg.split(",")) if arg else set()
    if not wanted <= {"rationalise", "tiny"}:
        raise ValueError("the arguments are 'rationalise', 'tiny' or 'rationalise,tiny'")
    shape = dict(rows=16, row_length=64, mixing="by_difficulty")
    muon = dict(name="muon", learning_rate=6e-3, b2=0.95, weight_decay=0.0)
    c = ConfigDict(
        dict(
            name="star",
            rounds=4,
            task=dict(name="scratchpad_addition", seed_difficulty=4, seed_problems=400, hints=True),
            model=dict(layers=2, width=64, heads=4, head_width=16, mlp_width=256, positions="rope"),
            warmup=dict(steps=600, optimizer=dict(muon, warmup=0.033, decay=0.4), **shape),
            train=dict(
                steps=250,
                newest_share=0.7,
                optimizer=dict(muon, learning_rate=3e-3, decay=0.6),
                **shape,
            ),
            generate=dict(
                prompts=1024,
                temperature=0.0,
                difficulty_step=0,
                spread=4,
                rationalise="rationalise" in wanted,
            ),
            regime=dict(data="replace", start="base"),
            evaluate=dict(problems=100, difficulties=(1, 2, 3, 4)),
        )
    )
    if "tiny" in wanted:
        c.rounds = 1
        c.model.update(dict(layers=1, width=32, heads=2))
        c.warmup.steps = 120
        c.train.steps = 30
        c.task.update(seed_difficulty=1, seed_problems=50)
        c.generate.update(prompts=64, spread=1)
        c.evaluate.update(problems=32, difficulties=(1,))
    return c
