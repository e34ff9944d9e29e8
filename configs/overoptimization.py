"""What a policy wins of a known gold reward by optimising a proxy of it (arXiv 2210.10760).

    python -m experiments.overoptimization --workdir=DIR

runs this config for all sizes of reward model and seeds. Here

  base          a decoder of 100,000 parameters learns replies (`karploop/data/tasks/praise.py`)
  round 0       of two replies of the base to a prompt `judge.review`, a file, says which is better,
                and a reward model learns it; the policy stays as it is
  round 1       2,048 replies of the base to each of 32 prompts, and their rewards: for best-of-n
  rounds 2–14   the policy learns from its samples by their rewards (policy gradient); with
                --config.phases.2.objective.kl=0.3 less what it costs to leave the base

With the argument `tiny` it runs the same code in seconds and learns nothing.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "", "tiny"):
        raise ValueError("the argument is tiny, or none")
    muon = dict(name="muon", learning_rate=3e-3, b2=0.95, weight_decay=0.0)
    shape = dict(rows=8, row_length=128)
    c = ConfigDict(
        dict(
            name="overoptimization",
            rounds=15,
            task=dict(
                name="karploop.data.tasks.praise:PRAISE", seed_difficulty=1, seed_problems=8000
            ),
            roles=dict(judge=dict(weights="reward")),
            model=dict(
                **dict(layers=2, width=64, heads=4, head_width=16, mlp_width=256),
                positions="rope",
            ),
            warmup=dict(steps=600, optimizer=dict(muon, warmup=0.033, decay=0.4), **shape),
            train=dict(steps=200, optimizer=dict(muon, learning_rate=1e-3, decay=0.6), **shape),
            generate=dict(prompts=5400, samples=2, difficulty_step=0, batch=512),
            judge=dict(name="person", batch=512, fitness="off"),
            filter=dict(name="none", on_empty="skip"),
            objective=dict(name="reward"),
            regime=dict(data="replace"),
            evaluate=dict(problems=256, difficulties=(1,), samples=1),
            phases={"1": _best_of_n(), "2": _reinforcement()},
        )
    )
    if arg == "tiny":
        _shrink(c)
    return c


def _best_of_n() -> dict:
    """A round that samples and scores, and learns nothing."""
    return dict(
        generate=dict(prompts=32, samples=2048, batch=2),
        judge=dict(name="reward"),
        filter=dict(name="quantile", count=0),
        objective=dict(name="sft"),
    )


def _reinforcement() -> dict:
    """Rounds that learn from rewards."""
    return dict(
        generate=dict(prompts=64, samples=8, batch=64),
        filter=dict(name="none"),
        objective=dict(name="policy_gradient", reward="raw", kl=0.0, kl_in="reward"),
        train=dict(epochs=1.0, optimizer=dict(learning_rate=3e-4)),
    )


def _shrink(c: ConfigDict) -> None:
    optimizer = dict(name="adamw", learning_rate=1e-2)
    c.rounds = 4
    c.mesh = dict(data=1)  # batches are too small for more
    c.task.seed_problems = 400
    c.model.update(dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32))
    c.warmup.update(dict(steps=30, optimizer=optimizer))
    c.train.update(dict(steps=4, optimizer=optimizer))
    c.generate.update(dict(prompts=32, batch=32))
    c.phases["1"].generate.update(dict(prompts=2, samples=64))
    c.phases["2"].generate.update(dict(prompts=8, batch=8))
    c.evaluate.problems = 16
    c.evaluate.batch = 16
