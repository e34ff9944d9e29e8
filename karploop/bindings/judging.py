"""Stages of verdicts, and the selection by them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from karploop.bindings.shared import ROLES, Shared, inputs_of
from karploop.filtering.choice import at_round
from karploop.filtering.choice import settings as filter_settings
from karploop.filtering.select import select
from karploop.judging.by_model import judge_by_model
from karploop.judging.equivalence import identity
from karploop.judging.judge import judge
from karploop.manifest import digest
from karploop.oversight.fitness import FITNESS_FILE, Fitness, fitness
from karploop.records import EXAMPLES_FILE
from karploop.stages import Artifact


class Judging(Shared):
    """Stages of verdicts, and the selection by them."""

    def judge(
        self,
        index: int,
        samples: dict[int, Artifact],
        history: list[Artifact],
        rewards: Sequence[Artifact] = (),
    ) -> Artifact | None:
        """The verdicts that the filter reads (or the one it is matched with), if any.

        Args:
          history: the first member's base, and its parameters after each round so far.
          rewards: the reward models that rounds have trained so far.
        """
        if self.m.judge:
            return self._judge_by_model(index, samples, history, rewards)
        return self._tally(self.m.tally, index, samples) if self.m.tally else None

    def _tally(self, name: str, index: int, samples: dict[int, Artifact]) -> Artifact:
        """The verdicts of 'verifier' or 'vote'."""
        config = self.config.judge
        counted = {"voters": config.voters} | identity(config.equivalence) if name == "vote" else {}
        return self._run(
            "judge",
            functools.partial(judge, name=name, task=self.m.task, config=config),
            config={"judge": name, "task": self.where["name"]} | counted,
            inputs=inputs_of(samples),
            rng=self._rng(index),
            keyed=False,
        )

    def _judge_by_model(self, index, samples, history, rewards) -> Artifact:
        settings, asked = self._asked_judge()
        inputs = self.m.roles.inputs(self.m.judge.seats, history, rewards)
        decides = digest([settings, [inputs[name].content for name in sorted(inputs)]])
        return self._run(
            "judge",
            functools.partial(judge_by_model, name=f"{self.m.judge.name}-{decides[:8]}", **asked),
            config=settings,
            inputs=inputs_of(samples) | inputs,
            rng=self._rng(index),
            keyed=False,
            more=ROLES,
        )

    def _asked_judge(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides a model's verdicts but for the loop's own weights; how it is called."""
        judge, roles, ranking = self.m.judge, self.m.roles, self.config.judge.ranking
        settings = {"judge": judge.name, "ranking": ranking} | judge.settings
        settings |= {
            "seed": self.config.seed,
            "roles": roles.identity(judge.seats),
            "files": judge.files,
        }
        load = functools.partial(roles.load, self.m.weights, self.m.weights.mesh)
        return settings, dict(judge=judge, load=load, ranking=ranking, seed=self.config.seed)

    def fitness(
        self, index: int, history: list[Artifact], rewards: Sequence[Artifact] = ()
    ) -> tuple[dict[str, Artifact], str]:
        """What judge and policy make of labelled problems, where a model judges and there are any;
        and why the loop ends for it, if it does. Of the members, only the first is asked; of
        an ensemble, who neither reads gold nor counts votes. Arguments as of `judge`.
        """
        config, task = self.config.judge, self.m.task
        judge = self.m.judge and self.m.judge.by_itself
        if not judge or config.fitness == "off":
            return {}, ""
        labelled = self.seed.table(EXAMPLES_FILE).num_rows - len(self.m.policy.prompting.shown)
        if labelled < 2 or not (task.answered and task.verifiable):
            if index == 0:
                self.stages.progress.say(
                    "nobody knows how good the judge is: there are no labelled problems "
                    "('config.task.seed_problems') but those that are shown as examples"
                )
            return {}, ""
        settings, asked = self._asked_judge()
        asked["judge"] = judge
        answered = {"problems": config.fitness_problems}
        answered |= {"temperature": self.config.generate.temperature, "task": self.where["name"]}
        found = self._run(
            "fitness",
            functools.partial(
                fitness,
                **self.sampling,
                task=task,
                count=config.fitness_problems,
                temperature=self.config.generate.temperature,
                batch=self.config.generate.batch,
                **asked,
            ),
            config={"asked": settings} | self.asked | answered,
            inputs=self.m.roles.inputs(self.m.judge.seats, history, rewards)
            | {"seed": self.seed, "params": history[-1]},
            rng=self._rng(index),
            more=ROLES,
        )
        objection = read_fitness(found).objection
        if objection:
            objection = f"round {index}: {objection}"
            self.stages.progress.say(objection)
        return {"fitness": found}, objection if config.fitness == "stop" else ""

    def filter(self, index: int, samples: dict[int, Artifact], verdicts) -> Artifact:
        """The selection, by the settings of the round that the filter declares to read."""
        chosen, matched = self.m.chosen, self.m.matched
        config = at_round(self.config, index)
        reads = verdicts and self.m.filter_reads
        inputs = inputs_of(samples) | ({"verdicts": verdicts} if reads else {})
        if self.m.reads_gold:
            inputs["gold"] = self._tally("verifier", index, samples)
        return self.stages.run(
            "filter",
            functools.partial(select, chosen=chosen, matched=matched, config=config),
            config=filter_settings(chosen, matched, config),
            inputs=inputs,
            rng=self._rng(index),
            modules=(*chosen.modules, *(matched.modules if matched else ())),
        )


def read_fitness(artifact: Artifact) -> Fitness:
    return Fitness(**json.loads(artifact.path(FITNESS_FILE).read_text()))
