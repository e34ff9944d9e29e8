"""What a loop will ask of endpoints, before its first round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karploop.asking import Asked
from karploop.chains.rehearsal import Rehearsal
from karploop.chains.rendering import load_templates
from karploop.chains.run import Run, Settings
from karploop.endpoints.calls import CHARACTERS
from karploop.endpoints.forecast import Tally
from karploop.judging.ranking import Group
from karploop.machinery import Machinery
from karploop.roles.rehearsal import rehearse


def loop_forecast(machinery: Machinery) -> list[str]:
    """Lines to say: what endpoints will be asked at most in all rounds, and what caps allow of it.

    One prompt as long as any goes through chain and judge, with samples as long as they may be, and
    stands for all. Samples that do not end, or are the same, and stages that are found in the store
    make it less, and nobody knows how much.
    """
    config, roles = machinery.config, machinery.roles
    rounds, samples = config.rounds, config.generate.samples * config.members

    def go(stand_ins: Mapping[str, Any], tally: Tally) -> None:
        if not tally.longest:
            return  # all of it may be in the store
        whole = Tally(longest=True)
        for times, walk in (
            (rounds * config.generate.prompts * samples, _chain),
            (rounds * config.generate.prompts, lambda *it: _judge(*it, samples)),
            (rounds * _labelled(machinery), lambda *it: _judge(*it, 2)),
        ):
            if times:
                tally.loads = {}
                walk(machinery, stand_ins, tally)
                whole.add({key: load * times for key, load in tally.loads.items()})
        tally.loads = whole.loads

    lines = rehearse(roles.seats, roles.remote, go)
    return [f"all rounds: {line}" for line in lines]


def _chain(machinery: Machinery, stand_ins: Mapping[str, Any], tally: Tally) -> None:
    """A prompt to a sample."""
    chain, policy = machinery.chain, machinery.policy
    if not chain:
        return
    templates = load_templates(ask.template for ask in chain.asks() if ask.template)
    settings = Settings(max_new_tokens=policy.completion_length + 1)
    text = _filler(machinery, policy.prompt_length)
    asked: Asked = policy.prompting.asked(text)
    run = Run(0, asked, {"prompt": text})
    Rehearsal(chain, stand_ins, settings, templates, tally).run([run])


def _judge(machinery: Machinery, stand_ins: Mapping[str, Any], tally: Tally, count: int) -> None:
    """Samples of one prompt, which differ."""
    policy, config = machinery.policy, machinery.config
    if machinery.judge:
        text = _filler(machinery, policy.completion_length)
        completions = tuple(f"{text}{i}" for i in range(count))
        group = Group(0, _filler(machinery, policy.prompt_length), completions)
        machinery.judge.judge([group], stand_ins, config.judge.ranking, config.seed)


def _labelled(machinery: Machinery) -> int:
    """Labelled problems, at most, that tell each round how good the judge is."""
    config, task = machinery.config, machinery.task
    if config.judge.fitness == "off" or not (task.answered and task.verifiable):
        return 0
    known = config.task.seed_problems - len(machinery.policy.prompting.shown)
    return min(config.judge.fitness_problems, known) if known > 1 else 0


def _filler(machinery: Machinery, tokens: int) -> str:
    """A text of so many tokens, about."""
    return "x" * tokens * (CHARACTERS if machinery.policy.role else 1)
