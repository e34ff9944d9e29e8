"""What a loop will ask of endpoints, before its first round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    phases = _rounds(machinery)

    def go(stand_ins: Mapping[str, Any], tally: Tally) -> None:
        if not tally.longest:
            return  # all of it may be in the store
        whole = Tally(longest=True)
        for phase, rounds in phases:
            for times, walk in _walks(phase):
                if times and rounds:
                    tally.loads = {}
                    walk(phase, stand_ins, tally)
                    times *= rounds
                    whole.add({key: load * times for key, load in tally.loads.items()})
        tally.loads = whole.loads

    lines = rehearse(machinery.roles.seats, machinery.roles.remote, go)
    return [f"all rounds: {line}" for line in lines]


def _rounds(machinery: Machinery) -> list[tuple[Machinery, int]]:
    """Each phase, and how many rounds it has."""
    ends = [*machinery.later, machinery.config.rounds]
    return [
        (phase, max(min(end, machinery.config.rounds) - start, 0))
        for (start, phase), end in zip(machinery.phases.items(), ends, strict=True)
    ]


def _walks(machinery: Machinery) -> Iterator[tuple[int, Callable[..., None]]]:
    """What one round asks, and how often."""
    generate = machinery.config.generate
    samples = generate.samples * machinery.config.members
    yield generate.prompts * samples, _chain
    yield generate.prompts, lambda *it: _judge(*it, samples)
    yield _labelled(machinery), lambda *it: _judge(*it, 2)


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
