"""A model that judges itself, round after round (arXiv 2401.10020), on a small world.

    python -m experiments.run --config=configs/self_rewarding.py

A decoder of 160,000 parameters learns from labelled rows to answer requests, useful replies that
break each of three principles half of the time, and to say which of two replies keeps a principle
(`karploop/data/tasks/manners.py`). Each of three rounds it writes four replies to 256 new requests,
says itself, by the parameters that wrote them, which of two agrees more with the principles, and
learns the best and the worst of each request by DPO, held to the round's first parameters. No stage
counts faults: `manners/1/violations`, principles broken a reply on held-out requests, is measured
beside.

Seeds 0, 1, 2, on 128 held-out requests and one draw of two replies each:

                              base               after 3 rounds     the same, `random`
    violations a reply        1.54 1.43 1.43     0.00 0.03 0.00     1.22 1.43 1.36
    useful replies, %         97   98   98       95   99   96       95   94   98
    right revisions, %        80   87   82       30   55   27       82   88   77    (greedy)

The argument `random` is the control, in which scores are drawn and nobody judges. So the judge
makes the fall in violations, and hardly any of that in usefulness; replies do not become empty. The
price is paid by a skill that is no longer practised, to revise a reply. Without the likelihood of
the better reply in the loss (`--config.objective.sft=0`) usefulness is 69% after the last round
(seed 0), when few pairs are left that differ by what the judge knows.

Unlike the paper's, the judge does not get better with the rounds, and hardly worse: it compares
pairs by the probability of a letter, where the paper's writes reasons and a mark of 0 … 5, and
nothing that is learnt here exercises it. The paper's rounds make new requests by the model itself;
here the task draws them. The better one's likelihood is no part of the paper's loss.

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
            train=dict(steps=100, optimizer=dict(muon, learning_rate=1e-4, decay=0.6), **shape),
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
            preference=dict(margin=0.15),  # that one principle of three makes is about 0.3
            objective=dict(name="dpo", reference="round", sft=1.0),
            regime=dict(data="replace"),
            evaluate=dict(problems=128, difficulties=(1, 2, 3, 4), samples=2, batch=128),
        )
    )
    if "random" in wanted:
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
