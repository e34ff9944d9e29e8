"""Stages that measure and decide nothing."""

from __future__ import annotations

import functools
import json

from karploop.bindings.judging import read_fitness
from karploop.bindings.shared import BASE, Round, Shared, inputs_of
from karploop.data.sources import OVERLAPS_FILE
from karploop.oversight.evaluate import EVALS_FILE, evaluate
from karploop.oversight.watch import WATCH_FILE, watch
from karploop.stages import Artifact


class Measuring(Shared):
    """Stages that measure and decide nothing."""

    def watch(self, index: int, samples: dict[int, Artifact], selection: Artifact) -> Artifact:
        return self._run(
            "watch",
            functools.partial(watch, task=self.m.task),
            config={"task": self.where["name"]},
            inputs=inputs_of(samples) | {"selection": selection},
            rng=self._rng(index),
            keyed=False,
        )

    def finish(
        self,
        index: int,
        done: dict[str, Artifact],
        params: Artifact,
        base: Artifact,
        stopped: str = "",
    ) -> Round:
        """Closes the round. The base, every so many rounds and the last one are measured."""
        every, last = self.config.evaluate.every, index == self.config.rounds - 1
        evals = {}
        if stopped or last or index == BASE or (index + 1) % every == 0:
            done = done | {"evaluate": self._evaluate(index, params, base)}
            evals = json.loads(done["evaluate"].path(EVALS_FILE).read_text())
        metrics = {}
        if "fitness" in done:
            metrics = read_fitness(done["fitness"]).metrics()
        if self.m.reads_gold:
            metrics["selected_by_gold"] = float("filter" in done)
        if "watch" in done:
            metrics |= json.loads(done["watch"].path(WATCH_FILE).read_text())
            overlaps = json.loads(done["prompts"].path(OVERLAPS_FILE).read_text())
            metrics |= {f"overlap/{kind}": float(count) for kind, count in overlaps.items()}
        shared = {"seed": self.seed, "held_out": self.held_out} if index == BASE else {}
        return Round(index, shared | done, evals, metrics, stopped)

    def _evaluate(self, index: int, params: Artifact, base: Artifact) -> Artifact:
        """The first member's parameters, against those it began with."""
        inputs, sampled = {"params": params, "held_out": self.held_out}, {}
        if self.config.evaluate.samples:
            sampled = {
                "samples": self.config.evaluate.samples,
                "temperature": self.config.evaluate.temperature,
            }
            inputs |= {} if index == BASE else {"base": base}
        return self._run(
            "evaluate",
            functools.partial(
                evaluate,
                **self.sampling,
                task=self.m.task,
                config=self.config.evaluate,
            ),
            config=self.asked | {"task": self.where["name"]} | sampled,
            inputs=inputs,
            rng=self._rng(index),
            keyed=False,
        )
