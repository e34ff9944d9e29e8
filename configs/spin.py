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
            rounds=3,
            task=dict(name="interleaved_addition", seed_difficulty=4, seed_problems=4000),
            model=dict(layers=2, width=64, heads=4, head_width=16, mlp_width=256),
            warmup=dict(steps=1500, optimizer=dict(muon, learning_rate=3e-3, decay=0.4), **shape),
            train=dict(
                shape, mixing="union", steps=50, optimizer=dict(muon, learning_rate=5e-5, decay=0.6)
            ),
            generate=dict(problems="labelled", prompts=1024, difficulty_step=0),
            filter=dict(name="none"),
            preference=dict(pairing="labelled"),
            objective=dict(name="dpo", beta=0.1, reference="round"),
            regime=dict(data="replace"),
            evaluate=dict(difficulties=(1, 2, 3, 4)),
        )
    )
    if arg not in (None, "tiny"):
        raise ValueError("the only argument is 'tiny'")
    if arg == "tiny":
        c.rounds, c.task.seed_difficulty = 1, 1
        c.warmup.steps = 150
        c.train.steps = 20
        c.generate.prompts, c.generate.spread = 32, 1
        c.evaluate = dict(problems=32, difficulties=(1,))
    return c
