"""The loop: a base, then generate → judge → filter → train → evaluate, round after round.

`run` reads top to bottom. Each line of a round is one stage: a function of its own sub-config, its
inputs and a key, found in the store or computed (`bindings.py`, `stages.py`). There is no other
state: run the same thing again and it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable

from karploop import curriculum
from karploop.bindings import BASE, Bindings, Round, by_member
from karploop.machinery import Machinery
from karploop.records import EXAMPLES_FILE
from karploop.stages import Artifact, Stages

EMPTY = {
    "stop": "the loop stops here",
    "skip": "training is skipped",
    "train": "training on the data there was before",
}


def run(
    machinery: Machinery, stages: Stages, after_round: Callable[[Round], None]
) -> dict[int, Artifact]:
    """Runs or resumes the loop; returns each member's last parameters.

    Args:
      after_round: called with the base (index −1) and then with each round, as it is complete.
    """
    config = machinery.config
    loop = Bindings(machinery, stages)
    base = {member: loop.base(member) for member in range(config.members)}
    after_round(loop.finish(BASE, by_member(loop.origin, base), base[0], base[0]))
    params = base
    history = [base[0]]  # the first member's parameters, for roles that are bound to them
    kept: list[Artifact] = []
    newest = curriculum.first(config)
    for index in range(config.rounds):
        done, unfit = loop.fitness(index, history)
        if unfit:
            after_round(loop.finish(index, done, params[0], base[0], unfit))
            break
        prompts = loop.prompts(index, newest)
        samples = {m: loop.generate(index, m, prompts, params[m], history) for m in params}
        verdicts = loop.judge(index, samples, history)
        selection = loop.filter(index, samples, verdicts)
        done |= {"prompts": prompts, "filter": selection} | by_member("generate", samples)
        if verdicts:
            done["judge"] = verdicts
        done["watch"] = loop.watch(index, samples, selection)
        if selection.table(EXAMPLES_FILE).num_rows == 0:
            decision = config.filter.on_empty
            if decision == "train" and not loop.anything_to_train_on(kept):
                decision = "skip"
            reason = f"round {index}: the filter '{config.filter.name}' kept nothing"
            stages.progress.say(f"{reason}: {EMPTY[decision]}")
            if decision != "train":
                stopped = reason if decision == "stop" else ""
                after_round(loop.finish(index, done, params[0], base[0], stopped))
                if stopped:
                    break
                history.append(params[0])
                continue
        kept.append(loop.corrupt(index, selection))
        newest = loop.next_difficulty(newest, samples, selection)
        params = {m: loop.train(index, m, params[m], kept) for m in params}
        history.append(params[0])
        after_round(loop.finish(index, done | by_member("train", params), params[0], base[0]))
    return params
