"""String reversal that teaches itself longer strings (arXiv 2502.01612, scaled down).

    python -m experiments.run --config=configs/reversal.py

A minute and a half on 2 CPU cores. Expect held-out exact match on ten characters of about 1% for
the base and of 97% or more after the last round.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError("this config takes no argument")
    shape = dict(rows=16, row_length=64, mixing="by_difficulty")
    muon = dict(name="muon", learning_rate=3e-3, b2=0.95, weight_decay=0.0)
    return ConfigDict(
        dict(
            name="reversal",
            rounds=6,
            task=dict(name="reverse", seed_difficulty=5, seed_problems=20_000),
            model=dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
            warmup=dict(steps=400, optimizer=dict(muon, warmup=0.05, decay=0.4), **shape),
            train=dict(
                steps=100,
                newest_share=0.5,
                optimizer=dict(muon, learning_rate=1.5e-3, decay=0.6),
                **shape,
            ),
            generate=dict(prompts=1024, temperature=0.0, max_difficulty=10),
        )
    )
