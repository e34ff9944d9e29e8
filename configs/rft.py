"""Rejection-sampling fine-tuning on sums of up to four digits (arXiv 2308.01825).

    python -m experiments.run --config=configs/rft.py

A base learns 300 labelled sums with a scratchpad, and writes four replies to each of 2,048 new
ones. Different ones that are right by gold are learnt together with the labelled rows, from fresh
parameters. In the paper the samples are of the labelled problems themselves, which have many right
paths each; a sum has one scratchpad, so that nothing new is found there (last line).

Held-out exact match on sums of four digits, medians of seeds 0–2 and their values:

    base: as many steps on the labelled rows           29%   (8, 29, 53)
    with right samples                                 87%   (86, 87, 89)
    … of the labelled problems, 16 of each             34%   (5, 45, 34)

The last is `--config.generate.problems=labelled --config.generate.prompts=300
--config.generate.samples=16`. About one and a half minutes on 2 cores, by processor time. `tiny`
runs the same code on sums of one digit.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    shape = dict(rows=16, row_length=64, mixing="by_difficulty")
    muon = dict(name="muon", b2=0.95, weight_decay=0.0)
    c = ConfigDict(
        dict(
            name="rft",
            rounds=1,
            task=dict(name="scratchpad_addition", seed_difficulty=4, seed_problems=300),
            model=dict(layers=2, width=64, heads=4, head_width=16, mlp_width=256, positions="rope"),
            warmup=dict(
                steps=600,
                optimizer=dict(muon, learning_rate=6e-3, warmup=0.033, decay=0.4),
                **shape,
            ),
            train=dict(steps=600, optimizer=dict(muon, learning_rate=6e-3, decay=0.4), **shape),
            generate=dict(prompts=2048, samples=4, difficulty_step=0, spread=4),
            filter=dict(name="chain(verifier, duplicates)"),
            # Labelled rows and kept ones together, from where the base began.
            regime=dict(start="scratch"),
            evaluate=dict(problems=100, difficulties=(1, 2, 3, 4)),
        )
    )
    if arg not in (None, "tiny"):
        raise ValueError("the only argument is 'tiny'")
    if arg == "tiny":
        c.rounds = 1
        c.task.update(seed_difficulty=1, seed_problems=50)
        c.model.update(layers=1, width=32, heads=2, mlp_width=64)
        for stage in (c.warmup, c.train):
            stage.update(rows=8, row_length=32)
        c.warmup.steps, c.train.steps = 120, 10
        c.generate.update(batch=32, prompts=32, spread=1)
        c.filter.on_empty = "train"
        c.evaluate.update(problems=32, difficulties=(1,), batch=32)
    return c
