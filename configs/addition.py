"""Reverse addition that teaches itself longer numbers (arXiv 2502.01612, scaled down)."""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    optimizer = dict(name="muon", learning_rate=3e-3, muon_scale=6.7, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    c = ConfigDict(dict(
        name="addition", rounds=5,
        task=dict(name="interleaved_addition", seed_difficulty=5, seed_problems=40000),
        model=dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
        warmup=dict(steps=1200, rows=16, row_length=64, optimizer=optimizer),
        train=dict(steps=250, rows=16, row_length=64, optimizer=optimizer),
        generate=dict(prompts=2048, temperature=0.0),
    ))
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
