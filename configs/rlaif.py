"""Reinforcement learning from AI feedback (RLAIF, arXiv 2309.00267), on a small world.

    python -m experiments.run --config=configs/rlaif.py

A decoder of 160,000 parameters learns from labelled rows to answer requests, useful replies that
break each of three principles half of the time, and to say which of two replies keeps a principle
(`karploop/data/tasks/manners.py`). Then

  round 0     of two replies the base says, in both orders, which agrees more with the principles,
              and a reward model learns what it says
  rounds 1–3  the policy learns from its samples by their rewards (policy gradient), held to the
              base by a divergence in the loss

No stage counts faults: `manners/1/violations`, principles broken a reply on held-out requests, is
measured beside. Seeds 0, 1, 2, on 128 of them and one draw of two replies each:

                              base               after round 3      the same, `random`
    violations a reply        1.54 1.43 1.43     0.75 0.80 0.72     1.20 1.15 1.06
    … shouts                  0.55 0.51 0.43     0.33 0.42 0.29     0.29 0.53 0.39
    useful replies, %         97   98   98       92   91   90       94   95   98
    right revisions, %        80   87   82       70   72   62       78   87   76    (greedy)

The argument `random` is the control, in which scores are drawn and nobody judges. A reward model of
drawn scores still has likings, and the policy follows them: about half of the fall is not the
judge's. With smaller steps and a round less (`--config.phases.1.train.optimizer.learning_rate=2e-4
--config.rounds=3`, seed 0) the control ended where it began, and the recipe at 0.89. What is left
is the reward model's: it hardly sees a shout, and rewards some. Replies do not become empty.

Unlike in the paper, who judges is no larger than who learns, the reward model learns which reply
the judge prefers and not how sure it was (a soft label), and samples are compared with others of
their prompt (RLOO), without a value model.

`tiny` runs the same code in seconds and learns nothing. Two minutes and a half on 2 CPU cores.
"""

from ml_collections import ConfigDict

OPTIONS = ("random", "tiny")


def get_config(arg: str | None = None) -> ConfigDict:
    wanted = set(arg.split(",")) if arg else set()
    if wanted - set(OPTIONS):
        raise ValueError(f"the arguments are {', '.join(OPTIONS)}, or both of them")
    muon = dict(name="muon", b2=0.95, weight_decay=0.0)
    shape = dict(rows=8, row_length=112)
    c = ConfigDict(
        dict(
            name="rlaif",
            rounds=4,
            task=dict(
                name="karploop.data.tasks.manners:MANNERS", seed_difficulty=4, seed_problems=20_000
            ),
            # What gives feedback is not what is trained; `judge` is the reward model.
            roles=dict(feedback=dict(weights="base"), judge=dict(weights="reward")),
            model=dict(
                **dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
                **dict(max_length=128, positions="rope", alphabet="ascii"),
            ),
            warmup=dict(steps=1500, optimizer=dict(muon, learning_rate=3e-3, decay=0.4), **shape),
            train=dict(steps=100, optimizer=dict(muon, learning_rate=5e-4, decay=0.6), **shape),
            generate=dict(prompts=512, samples=2, difficulty_step=0, max_difficulty=1),
            judge=dict(
                name="constitution",
                templates="short",
                constitution="manners.txt",
                principles=3,
                batch=128,
                fitness="off",
                role="feedback",
            ),
            filter=dict(name="none"),
            preference=dict(margin=0.15),  # that one principle of three makes is about 0.3
            objective=dict(name="reward"),
            phases={
                "1": dict(
                    generate=dict(prompts=128, samples=8),
                    judge=dict(name="reward", role="judge"),
                    objective=dict(name="policy_gradient", reward="raw", reference="base", kl=0.05),
                    train=dict(steps=60, optimizer=dict(learning_rate=5e-4)),
                )
            },
            regime=dict(data="replace"),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4), samples=2, batch=128),
        )
    )
    if "random" in wanted:
        del c.roles.feedback  # nobody is asked
        c.judge = dict(name="random", fitness="off")
    if "tiny" in wanted:
        _shrink(c)
    return c


def _shrink(c: ConfigDict) -> None:
    optimizer = dict(name="adamw", learning_rate=1e-2)
    c.rounds = 2
    c.task.seed_problems = 400
    c.model.update(dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32))
    c.warmup.update(dict(steps=20, optimizer=optimizer))  # until it has learnt to stop
    c.train.update(dict(steps=4, optimizer=optimizer))
    c.generate.update(dict(prompts=16, batch=16))
    c.judge.batch = 32
    c.preference.margin = 0.0
    c.evaluate.update(dict(problems=8, samples=0, difficulties=(1,), batch=32))
