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
        """Measures the first member's parameters, against those it began with, and closes the
        round."""
        inputs, sampled = {"params": params, "held_out": self.held_out}, {}
        if self.config.evaluate.samples:
            sampled = {
                "samples": self.config.evaluate.samples,
                "temperature": self.config.evaluate.temperature,
            }
            inputs |= {} if index == BASE else {"base": base}
        evaluated = self._run(
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
        metrics = {}
        if "fitness" in done:
            metrics = read_fitness(done["fitness"]).metrics()
        if self.m.reads_gold:
            metrics["selected_by_gold"] = float("filter" in done)
        if "watch" in done:
            metrics |= json.loads(done["watch"].path(WATCH_FILE).read_text())
            overlaps = json.loads(done["prompts"].path(OVERLAPS_FILE).read_text())
            metrics |= {f"overlap/{kind}": float(count) for kind, count in overlaps.items()}
        evals = json.loads(evaluated.path(EVALS_FILE).read_text())
        shared = {"seed": self.seed, "held_out": self.held_out} if index == BASE else {}
        return Round(index, shared | done | {"evaluate": evaluated}, evals, metrics, stopped)
