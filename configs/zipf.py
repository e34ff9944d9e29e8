"""A language with long tails, learnt from its own samples (arXiv 2404.01413, scaled down).

    python -m experiments.run --config=configs/zipf.py --config.regime.data=replace \
        --config.regime.seed_share=0

Each round trains a new model on documents that the one before sampled. `experiments.collapse` runs
this config under all regimes and seeds. Half a minute on 2 CPU cores. With the options above expect
a held-out loss of about 2.89 nats a token for the base, which rises by about 0.2 in five rounds;
the language itself has 2.785.
"""

from ml_collections import ConfigDict

DOCUMENTS = 1024


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError("this config takes no argument")
    stage = dict(steps=120, rows=8, row_length=128, optimizer=dict(learning_rate=5e-3))
    return ConfigDict(
        dict(
            name="zipf",
            rounds=5,
            task=dict(
                name="karploop.data.tasks.zipf:LANGUAGE",
                seed_difficulty=1,
                seed_problems=DOCUMENTS,
            ),
            model=dict(layers=1, width=64, heads=2, head_width=32, mlp_width=256),
            warmup=stage,
            train=stage,
            generate=dict(prompts=DOCUMENTS, difficulty_step=0),
            filter=dict(name="none"),
            regime=dict(start="scratch", budget=DOCUMENTS),
            evaluate=dict(problems=256, samples=8, difficulties=(1,)),
        )
    )
