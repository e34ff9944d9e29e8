"""What the bindings of a run's stages share: machinery, settings, and how a stage is run."""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict, dataclass
from typing import Self

from karploop.data.sources import held_out_sets, seed_data
from karploop.data.tasks import home_module
from karploop.machinery import Machinery
from karploop.roles.in_loop import LoopRoles
from karploop.roles.on_mesh import MeshRole
from karploop.roles.remote import RemoteRole
from karploop.stages import Artifact, Rng, Stages

BASE = -1  # the round before the first
ROLES = (LoopRoles.__module__, MeshRole.__module__, RemoteRole.__module__)


@dataclass
class Round:
    """What one round (or the base) left behind."""

    index: int
    stages: dict[str, Artifact]
    evals: dict[str, float]
    metrics: dict[str, float | None]
    stopped: str = ""  # why the loop ends here, where it does


class Shared:
    """The machinery and the settings that several stages take."""

    def __init__(self, machinery: Machinery, stages: Stages):
        self.m, self.stages, self.config = machinery, stages, machinery.config
        config, task = machinery.config, asdict(machinery.config.task)
        home = home_module(config.task.name)
        self.task_modules = (type(machinery.task).__module__, *([home] if home else []))
        task["name"] = machinery.task.identity  # with the content, where that is in a file
        policy = machinery.policy
        self.model = {"model": asdict(policy.config), "prompting": policy.prompting.identity}
        # How long a completion may get is the task's choice, or else a setting.
        self.asked = self.model | ({"new": policy.completion_length} if policy.role else {})
        # What every stage takes that samples from the policy.
        self.sampling = dict(
            sampler=machinery.sampler,
            weights=machinery.weights,
            prompting=policy.prompting,
            limit=functools.partial(policy.limit, machinery.task),
        )
        self.where = {"name": task["name"], "held_out": task["held_out"]}
        measured = {
            "difficulties": config.evaluate.difficulties,
            "problems": config.evaluate.problems,
        }
        self.held_out = self._run(
            "held_out",
            functools.partial(held_out_sets, task=machinery.task, config=config),
            config=self.where | measured,
            inputs={},
            rng=self._rng(BASE),
            keyed=False,
        )
        self.seed = self._run(
            "seed",
            functools.partial(
                seed_data,
                task=machinery.task,
                config=config,
                prompting=policy.prompting,
                labelled=policy.labelled,
            ),
            # What is held out decides what is left.
            config=task
            | measured
            | ({"prompting": policy.prompting.identity} if policy.role else {}),
            inputs={},
            rng=self._rng(BASE),
            keyed=policy.labelled is None,
        )

    def at(self, index: int) -> Self:
        """The same stages by the settings of a round's phase."""
        there = copy.copy(self)
        there.m = self.m.at(index)
        there.config = there.m.config
        return there

    def _rng(self, index: int, member: int = 0) -> Rng:
        return Rng(self.config.seed, member, index)

    def _run(self, *args, more: tuple[str, ...] = (), **kwargs) -> Artifact:
        return self.stages.run(*args, modules=(*self.task_modules, *more), **kwargs)


def inputs_of(samples: dict[int, Artifact]) -> dict[str, Artifact]:
    return {f"samples_{member}": artifact for member, artifact in samples.items()}


def home_of(name: str) -> tuple[str, ...]:
    """The user's module in a "package.module:ATTRIBUTE": the values in it decide a result too."""
    return (name.partition(":")[0],) if ":" in name else ()
