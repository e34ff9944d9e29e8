"""Constitutional AI on a small model (arXiv 2212.08073): it criticises, revises and judges itself.

    python -m experiments.run --config=configs/constitutional.py

A decoder of 160,000 parameters learns from labelled rows to answer requests, useful replies that
break each of three principles half of the time, and to find fault, revise and compare
(`karploop/data/tasks/manners.py`). Then

  round 0     supervised: it replies, finds fault by a principle and revises, four times over, and
              learns the last revisions
  round 1     of two replies the base says which agrees more with the principles, and a reward model
              learns what it says
  rounds 2–4  the policy learns from its samples by their rewards (policy gradient)

With the argument `dpo` it learns the pairs of round 1 itself (arXiv 2305.18290) and is done. No
stage reads gold or counts faults: `manners/1/violations`, principles broken a reply on held-out
requests, is measured beside. `tiny` runs the same code in seconds and learns nothing.
"""

from ml_collections import ConfigDict

OPTIONS = ("dpo", "tiny")


def get_config(arg: str | None = None) -> ConfigDict:
    wanted = set(arg.split(",")) if arg else set()
    if wanted - set(OPTIONS):
        raise ValueError(f"the arguments are {', '.join(OPTIONS)}, or several of them")
    muon = dict(name="muon", learning_rate=3e-3, b2=0.95, weight_decay=0.0)
    shape = dict(rows=8, row_length=112)
    c = ConfigDict(
        dict(
            name="constitutional",
            rounds=2 if "dpo" in wanted else 5,
            task=dict(
                name="karploop.data.tasks.manners:MANNERS", seed_difficulty=4, seed_problems=20_000
            ),
            # As in the paper, what gives feedback is not what is trained.
            roles=dict(feedback=dict(weights="base")),  # and a reward model, see below
            model=dict(
                **dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
                **dict(max_length=128, positions="rope", alphabet="ascii"),
            ),
            warmup=dict(
                steps=2000,
                optimizer=dict(muon, warmup=0.033, decay=0.4),
                **shape,
            ),
            train=dict(steps=100, optimizer=dict(muon, learning_rate=1e-3, decay=0.6), **shape),
            generate=dict(
                prompts=512,
                difficulty_step=0,
                max_difficulty=1,
                chain="critique_revise",
                options=dict(passes=4, templates="short", constitution="manners.txt"),
            ),
            judge=dict(
                templates="short",
                constitution="manners.txt",
                principles=3,
                batch=128,
                fitness="off",
            ),
            filter=dict(name="none"),
            regime=dict(data="replace", seed_share=0.0),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4), samples=4, batch=128),
        )
    )
    if "dpo" in wanted:
        c.phases = {"1": _feedback(dict(name="dpo", reference="round"))}
    else:
        c.roles.judge = dict(weights="reward")
        c.phases = {"1": _feedback(dict(name="reward")), "2": _reinforcement()}
    if "tiny" in wanted:
        _shrink(c)
    return c


def _feedback(objective: dict) -> dict:
    """A round that learns from which of two replies the base prefers."""
    return dict(
        generate=dict(chain="", prompts=1024, samples=2),
        judge=dict(name="constitution", role="feedback"),
        preference=dict(margin=0.15),  # that one principle of three makes is about 0.3
        objective=objective,
        train=dict(optimizer=dict(learning_rate=1e-4)),
        regime=dict(seed_share=-1.0),
    )


def _reinforcement() -> dict:
    """Rounds that learn from rewards."""
    return dict(
        generate=dict(prompts=128, samples=8),
        judge=dict(name="reward", role="judge"),
        objective=dict(name="policy_gradient", reward="raw", reference="round", kl=0.05),
        train=dict(steps=60),
    )


def _shrink(c: ConfigDict) -> None:
    optimizer = dict(name="adamw", learning_rate=1e-2)
    c.task.seed_problems = 400
    c.model.update(dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32))
    c.warmup.update(dict(steps=20, optimizer=optimizer))  # until it has learnt to stop
    c.train.update(dict(steps=4, optimizer=optimizer))
    c.generate.update(dict(prompts=16, batch=16))
    c.generate.options.passes = 1
    c.judge.batch = 32
    for phase in c.phases.values():
        phase.generate.prompts = 16
        phase.preference = dict(margin=0.0)
    c.evaluate.update(dict(problems=8, samples=2, batch=32))
