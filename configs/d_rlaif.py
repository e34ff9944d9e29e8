"""AI feedback as the reward itself, without a reward model (d-RLAIF, arXiv 2309.00267).

    python -m experiments.run --config=configs/d_rlaif.py

A decoder of 160,000 parameters learns from labelled rows to answer requests, useful replies that
break each of three principles half of the time, and to rate a reply from 1, which breaks them all,
to 4 (`karploop/data/tasks/manners.py`). Each of four rounds the policy writes eight replies to 128
new requests, the base rates each, and the policy learns by the ratings (policy gradient), held to
the base by a divergence in the loss. As in the paper, a rating is the expectation over the marks,
from their probabilities, moved to 0 … 1. No stage counts faults: `manners/1/violations`, principles
broken a reply on held-out requests, is measured beside.

Seeds 0, 1, 2, on 128 of them and one draw of two replies each:

                              base               after 4 rounds     the same, `random`
    violations a reply        1.54 1.48 1.50     0.45 0.40 0.50     1.39 1.52 1.47
    useful replies, %         98   97   98       96   91   96       95   93   95
    right revisions, %        63   66   52       59   55   46       59   69   52    (greedy)

The argument `random` is the control, in which scores are drawn and nobody judges. The base, which
stays the judge, rates 99% and more of held-out replies rightly. Replies do not become empty.

Unlike in the paper, who judges is no larger than who learns, marks go to 4 and not to 10, and
samples are compared with others of their prompt (RLOO), without a value model. A judge that
compares (`judge.name=constitution`) would give a sample the mean probability to beat the other
texts of its prompt, by up to 28 pairs for 8 samples, each in both orders and by each principle.

`tiny` runs the same code in seconds and learns nothing. Two minutes on 2 CPU cores.
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
            name="d_rlaif",
            rounds=4,
            task=dict(
                name="karploop.data.tasks.manners:MANNERS", seed_difficulty=5, seed_problems=20_000
            ),
            # What gives feedback is not what is trained.
            roles=dict(feedback=dict(weights="base")),
            model=dict(
                **dict(layers=3, width=64, heads=4, head_width=16, mlp_width=256),
                **dict(max_length=128, positions="rope", alphabet="ascii"),
            ),
            warmup=dict(steps=1500, optimizer=dict(muon, learning_rate=3e-3, decay=0.4), **shape),
            train=dict(steps=60, optimizer=dict(muon, learning_rate=5e-4, decay=0.6), **shape),
            generate=dict(prompts=128, samples=8, difficulty_step=0, max_difficulty=1),
            judge=dict(
                name="rubric",
                templates="short",
                criteria="manners.txt",
                levels=4,
                batch=128,
                fitness="off",
                role="feedback",
            ),
            filter=dict(name="none"),
            objective=dict(name="policy_gradient", reference="base", kl=0.05),
            regime=dict(data="replace"),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4, 5), samples=2, batch=128),
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
    c.evaluate.update(dict(problems=8, samples=0, difficulties=(1,), batch=32))
