"""Self-play fine-tuning on labelled sums (SPIN, arXiv 2401.01335).

python -m experiments.run --config=configs/spin.py


"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    shape = dict(rows=16, row_length=64, mixing="by_difficulty")
    muon = dict(name="muon", b2=0.95, weight_decay=0.0)
    c = ConfigDict(
        dict(
            name="spin",
            rounds=2,
            task=dict(name="scratchpad_addition", seed_difficulty=4, seed_problems=4000),
            model=dict(layers=2, width=64, heads=4, head_width=16, mlp_width=256, positions="rope"),
            # Not long enough for the labelled rows to be known by heart: what is said of them is
            # wrong often enough to be told from gold.
            warmup=dict(
                steps=200,
                optimizer=dict(muon, learning_rate=6e-3, warmup=0.033, decay=0.4),
                **shape,
            ),
            train=dict(steps=60, optimizer=dict(muon, learning_rate=2e-4, decay=0.6), **shape),
            generate=dict(problems="labelled", prompts=1024, difficulty_step=0),
            filter=dict(name="none"),
            preference=dict(pairing="labelled"),
            objective=dict(name="dpo", beta=1.0, reference="round", sft=1.0),
            regime=dict(data="replace"),
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
        c.generate.update(batch=32, prompts=32)
        c.evaluate.update(problems=32, difficulties=(1,), batch=32)
    return c
