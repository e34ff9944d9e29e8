"""The loop on a published model in small: its settings, and runs that share what they compile."""

import dataclasses
import functools
import json
import pathlib
from unittest import mock

from karploop import launch
from karploop.config import Config
from karploop.data.sources import labelled_prompts
from karploop.filtering.filters import get_filter
from karploop.machinery import Machinery, prepare
from karploop.resolve import resolve

STAGE = dict(steps=3, checkpoint_every=2, rows=2, row_length=64)


def sums(folder: pathlib.Path) -> str:
    """Sums of two numbers as a file; the task's name."""
    rows = [{"prompt": f"{a} + {b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
    path = folder / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}?name=sums"


def settings(model: str, task: str, **overrides) -> dict:
    nested = dict(
        name="published",
        rounds=2,
        mesh=dict(data=1),
        roles=dict(policy=dict(path=model)),
        task=dict(name=task, seed_difficulty=1, seed_problems=4, held_out=0.2),
        prompt=dict(
            shots=2, question="Q: {prompt}\nA:", answer=" {answer}", stop="e", max_new_tokens=6
        ),
        generate=dict(prompts=8, samples=2, difficulty_step=0, batch=4),
        filter=dict(name="none", on_empty="train"),
        train=STAGE | dict(lora=dict(rank=2)),
        evaluate=dict(problems=6, difficulties=(1,), batch=4, samples=3),
    )
    for path, value in overrides.items():
        *groups, name = path.split("__")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return nested


@functools.cache
def compiled(model: str, task: str, shots: int) -> Machinery:
    return prepare(resolve(settings(model, task, prompt__shots=shots)))


def run(workdir: pathlib.Path, name: str = "run", *, fresh: bool = False, **kwargs) -> dict:
    """A run's summary; unless `fresh`, with the programs that other runs compiled."""

    def prepared(config: Config) -> Machinery:
        shared = compiled(kwargs["model"], kwargs["task"], config.prompt.shots)
        shared.weights._live = {}
        chosen = get_filter(config.filter.name)
        policy = dataclasses.replace(shared.policy, labelled=labelled_prompts(shared.task, config))
        return dataclasses.replace(shared, config=config, chosen=chosen, policy=policy)

    config = resolve(settings(**kwargs))
    with mock.patch.object(launch, "prepare", prepare if fresh else prepared):
        assert launch.launch(config, str(workdir), name) == 0
    return json.loads((workdir / "runs" / name / "summary.json").read_text())
