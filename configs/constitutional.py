"""Constitutional AI on a small model (arXiv 2212.08073)."""

from ml_collections import ConfigDict

TASK = "karploop.data.tasks.manners:MANNERS"


def get_config(arg: str | None = None) -> ConfigDict:
    muon = dict(name="muon", learning_rate=3e-3, b2=0.95, weight_decay=0.0)
    shape = dict(rows=8, row_length=120)
    c = ConfigDict(
        dict(
            name="constitutional",
            rounds=0,
            task=dict(name=TASK, seed_difficulty=4, seed_problems=20_000),
            roles=dict(judge=dict(weights="base")),
            model=dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256, max_length=128, alphabet="ascii", positions="rope"),
            warmup=dict(steps=1500, mixing="by_difficulty", optimizer=dict(muon, warmup=0.033, decay=0.4), **shape),
            train=dict(steps=200, optimizer=dict(muon, learning_rate=1e-3), **shape),
            generate=dict(prompts=512, difficulty_step=0, max_difficulty=1, chain="critique_revise",
               options=dict(passes=4, templates="short", constitution="manners.txt")),
            judge=dict(fitness="off", batch=128),
            filter=dict(name="none"),
            regime=dict(seed_share=0.0),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4), samples=4, batch=128),
        )
    )
    return c
