"""Reverse addition that teaches itself longer numbers (arXiv 2502.01612, scaled down).

    python -m experiments.run --config=configs/addition.py

Three minutes on 2 CPU cores. Expect held-out exact match on ten digits of 0% for the base and of
98% or more after the last round. The argument `tiny` runs the same code in seconds and learns
nothing.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    shape = dict(rows=16, row_length=64, mixing="by_difficulty")
    muon = dict(name="muon", learning_rate=3e-3, b2=0.95, weight_decay=0.0)
    c = ConfigDict(
        dict(
            name="addition",
            rounds=8,
            task=dict(name="interleaved_addition", seed_difficulty=5, seed_problems=40_000),
            model=dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
            warmup=dict(steps=1500, optimizer=dict(muon, warmup=0.033, decay=0.4), **shape),
            train=dict(
                steps=200,
                newest_share=0.5,
                optimizer=dict(muon, learning_rate=1.5e-3, decay=0.6),
                **shape,
            ),
            generate=dict(
                **dict(prompts=4096, batch=512, temperature=0.0),
                **dict(spread=2, max_difficulty=10, advance=0.01),
            ),
        )
    )
    if arg not in (None, "tiny"):
        raise ValueError("the only argument is 'tiny'")
    if arg == "tiny":
        c.rounds = 2
        c.warmup.steps = 30
        c.train.steps = 20
        c.train.checkpoint_every = c.warmup.checkpoint_every = 10
        c.generate.prompts = 64
        c.generate.batch = 32
        c.evaluate = dict(problems=16, difficulties=(1, 2, 3, 4), batch=32)
        c.task.seed_difficulty = 2
        c.task.seed_problems = 500
        c.filter = dict(name="none")
    return c
