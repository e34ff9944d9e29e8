"""The loop: a base, then generate → judge → filter → train → evaluate, round after round.

`run` reads top to bottom. Each line of a round is one stage: a function of its own sub-config, its
inputs and a key, found in the store or computed (`bindings.py`, `stages.py`). There is no other
state: run the same thing again and it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from karploop import curriculum
from karploop.bindings import BASE, Bindings, Round, by_member
from karploop.catalogue import mean_exact_match
from karploop.config import RegimeConfig
from karploop.machinery import Machinery
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
    whole = Bindings(machinery, stages)
    loop = whole.at(BASE)
    base = {member: loop.base(member) for member in range(config.members)}
    finished = loop.finish(BASE, by_member(loop.origin, base), base[0], base[0])
    after_round(finished)
    params, scores = base, [mean_exact_match(finished.evals)]
    history = [base[0]]  # the first member's parameters, for roles that are bound to them
    rewards: list[Artifact] = []  # reward models, for roles that are bound to the newest
    kept: list[Artifact] = []
    reach = curriculum.first(config)
    for index in range(config.rounds):
        loop, config = whole.at(index), machinery.at(index).config
        done, unfit = loop.fitness(index, history, rewards)
        if unfit:
            after_round(loop.finish(index, done, params[0], base[0], unfit))
            break
        prompts = loop.prompts(index, reach)
        samples = {m: loop.generate(index, m, prompts, params[m], history) for m in params}
        verdicts = loop.judge(index, samples, history, rewards)
        selection = loop.filter(index, samples, verdicts)
        done |= {"prompts": prompts, "filter": selection} | by_member("generate", samples)
        if verdicts:
            done["judge"] = verdicts
        done["watch"] = loop.watch(index, samples, selection)
        lesson, rows = loop.lesson(index, samples, verdicts, selection, history)
        if lesson is not selection:
            done[lesson.manifest.stage] = lesson
        if not rows:
            decision = config.filter.on_empty
            if decision == "train" and not loop.anything_to_train_on([*kept, lesson]):
                decision = "skip"
            reason = f"round {index}: {loop.kept_nothing(selection)}"
            stages.progress.say(f"{reason}: {EMPTY[decision]}")
            if decision != "train":
                stopped = reason if decision == "stop" else ""
                after_round(loop.finish(index, done, params[0], base[0], stopped))
                if stopped:
                    break
                history.append(params[0])
                continue
        kept.append(lesson)
        if loop.rewards:  # the policy stays as it is
            rewards.append(loop.train(index, 0, params[0], base[0], kept, history))
            history.append(params[0])
            after_round(loop.finish(index, done | {"reward": rewards[-1]}, params[0], base[0]))
            continue
        reach = loop.next_reach(reach, samples, selection)
        params = {m: loop.train(index, m, params[m], base[m], kept, history) for m in params}
        history.append(params[0])
        finished = loop.finish(index, done | by_member("train", params), params[0], base[0])
        if finished.evals:  # the round was measured
            scores.append(mean_exact_match(finished.evals))
            finished.stopped = plateau(scores, config.regime)
        after_round(finished)
        if finished.stopped:
            break
    return params


def plateau(scores: Sequence[float | None], regime: RegimeConfig) -> str:
    """Why the loop ends, if the last `patience` mean held-out scores rose by too little; else "".

    Scores are those of the rounds that were measured. Each is compared with the best one before
    these, the base's among them.
    """
    recent, before = scores[-regime.patience :], scores[: -regime.patience]
    known = [[score for score in some if score is not None] for some in (recent, before)]
    if not regime.patience or not all(known) or max(known[0]) > max(known[1]) + regime.min_gain:
        return ""
    return (
        f"the mean held-out score has not risen by more than {regime.min_gain:g} in "
        f"{regime.patience} rounds, from {max(known[1]):.3f} ('config.regime.patience')"
    )
