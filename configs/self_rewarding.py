"""A model that judges itself, better each round (arXiv 2401.10020), scaled down.

python -m experiments.run --config=configs/self_rewarding.py


"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "tiny"):
        raise ValueError("the only argument is 'tiny'")
    muon = dict(name="muon", b2=0.95, weight_decay=0.0)
    shape = dict(rows=8, row_length=112)
    c = ConfigDict(
        dict(
            name="self_rewarding",
            rounds=3,
            task=dict(
                name="karploop.data.tasks.manners:MANNERS", seed_difficulty=4, seed_problems=20_000
            ),
            model=dict(
                **dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
                **dict(max_length=128, positions="rope", alphabet="ascii"),
            ),
            warmup=dict(steps=1500, optimizer=dict(muon, learning_rate=3e-3, decay=0.4), **shape),
            train=dict(steps=100, optimizer=dict(muon, learning_rate=3e-4, decay=0.6), **shape),
            generate=dict(prompts=256, samples=4, difficulty_step=0, max_difficulty=1),
            judge=dict(
                name="constitution",
                templates="short",
                constitution="manners.txt",
                principles=3,
                batch=128,
                fitness="off",
            ),
            filter=dict(name="none"),
            objective=dict(name="dpo", reference="round"),
            regime=dict(data="replace"),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4), samples=4, batch=128),
        )
    )
    if arg == "tiny":
        _shrink(c)
    return c


def _shrink(c: ConfigDict) -> None:
    optimizer = dict(name="adamw", learning_rate=1e-2)
    c.task.seed_problems = 400
    c.model.update(dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32))
    c.warmup.update(dict(steps=20, optimizer=optimizer))  # until it has learnt to stop
    c.train.update(dict(steps=4, optimizer=optimizer))
    c.generate.update(dict(prompts=16, batch=16))
    c.judge.batch = 32
    c.evaluate.update(dict(problems=8, samples=2, batch=32))
