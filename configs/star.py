"""STaR."""

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
        c.rounds = 2
    return c
