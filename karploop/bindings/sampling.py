"""Stages of prompts and samples."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from karploop.bindings.shared import ROLES, Shared, home_of, inputs_of
from karploop.chains.rendering import load_templates, read_text
from karploop.curriculum import Reach, following, window
from karploop.data.sources import labelled_again, round_prompts
from karploop.records import SELECTION_FILE, Samples, Selection
from karploop.sampling.by_chain import generate_by_chain
from karploop.sampling.generate import generate
from karploop.sampling.rationalise import rationalise
from karploop.stages import Artifact

# Settings of `generate` that are in its prompts already, and those that change no sample
_IN_PROMPTS = (
    *("problems", "prompts", "curriculum", "difficulty_step", "max_difficulty", "spread"),
    "advance",
)
_WITHOUT_EFFECT = ("batch", "slots", "fused_steps", "rationalise")


class Sampling(Shared):
    """Stages of prompts and samples."""

    def prompts(self, index: int, reach: Reach) -> Artifact:
        difficulties = window(self.config, reach)
        count = self.config.generate.prompts
        shown = list(self.m.policy.prompting.shown)
        if self.config.generate.problems == "labelled":
            return self._run(
                "prompts",
                functools.partial(labelled_again, count=count, shown=shown),
                config=self.where | {"problems": "labelled", "prompts": count, "shown": shown},
                inputs={"seed": self.seed},
                rng=self._rng(index),
            )
        return self._run(
            "prompts",
            functools.partial(
                round_prompts,
                task=self.m.task,
                held_out=self.config.task.held_out,
                difficulties=difficulties,
                count=count,
                shown=shown,
            ),
            config=self.where
            | {"difficulties": difficulties, "prompts": count}
            | ({"shown": shown} if shown else {}),
            inputs={"held_out": self.held_out},
            rng=self._rng(index),
        )

    def generate(
        self,
        index: int,
        member: int,
        prompts: Artifact,
        params: Artifact,
        history: list[Artifact],
    ) -> Artifact:
        """Samples of one member; `history` as in `judge`, where a chain asks other roles."""
        settings = self._settings()
        if self.m.chain:
            return self._generate_by_chain(index, member, prompts, params, history, settings)
        del settings["chain"], settings["options"]
        return self._run(
            "generate",
            functools.partial(
                generate,
                **self.sampling,
                config=self.config.generate,
            ),
            config=settings | self.asked | {"task": self.where["name"]},
            inputs={"prompts": prompts, "params": params},
            rng=self._rng(index, member),
        )

    def rationalise(
        self,
        index: int,
        prompts: Artifact,
        samples: dict[int, Artifact],
        gold: Artifact,
        params: Artifact,
    ) -> Artifact:
        """Samples with the gold answer as a hint, of prompts without a right one among these."""
        settings = self._settings()
        del settings["chain"], settings["options"]
        return self._run(
            "rationalise",
            functools.partial(
                rationalise, **self.sampling, task=self.m.task, config=self.config.generate
            ),
            config=settings | self.asked | {"task": self.where["name"]},
            inputs={"prompts": prompts, "params": params, "gold": gold} | inputs_of(samples),
            rng=self._rng(index),
        )

    def _settings(self) -> dict[str, Any]:
        """What decides a sample besides prompt and parameters."""
        settings = asdict(self.config.generate)
        for name in _IN_PROMPTS + _WITHOUT_EFFECT:
            del settings[name]
        return settings

    def _generate_by_chain(self, index, member, prompts, params, history, settings) -> Artifact:
        chain, roles = self.m.chain, self.m.roles
        seats = {ask.role for ask in chain.asks()}
        names = sorted({ask.template for ask in chain.asks() if ask.template})
        settings |= {"roles": roles.identity(seats), "files": {n: read_text(n) for n in names}}
        settings["drawn"] = [draw.options for draw in chain.draws()]  # from files, too
        stop = self.config.prompt.stop
        return self._run(
            "generate",
            functools.partial(
                generate_by_chain,
                chain=chain,
                templates=load_templates(names),
                load=functools.partial(roles.load, self.m.weights, self.m.weights.mesh),
                prompting=self.m.policy.prompting,
                longest=self.m.policy.completion_length,
                config=self.config.generate,
                stop=(stop,) if stop else (),
            ),
            config=settings | self.asked | {"task": self.where["name"]},
            inputs={"prompts": prompts} | roles.inputs(seats, [*history[:-1], params]),
            rng=self._rng(index, member),
            more=(*ROLES, "karploop.chains.library", *home_of(self.config.generate.chain)),
        )

    def next_reach(self, reach: Reach, samples: dict[int, Artifact], selection: Artifact) -> Reach:
        """The difficulties of the next round, by what this round kept of samples without a hint."""
        inputs = inputs_of(samples)
        difficulty_S, own_S = Samples.difficulties(inputs), ~Samples.by_hint(inputs)
        kept_S = Selection.from_table(selection.table(SELECTION_FILE)).kept_S
        return following(self.config, reach, difficulty_S[own_S], kept_S[own_S])
