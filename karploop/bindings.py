"""One method a stage: which function it runs, on which sub-config, from which inputs.

What is passed as `config` to a stage is what its result depends on, and nothing else; a key left
out (a batch size, how often to save) can change without computing anything again.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

from karploop.chains.rendering import load_templates, read_text
from karploop.config import RegimeConfig, TrainConfig
from karploop.curriculum import following, window
from karploop.data.sources import OVERLAPS_FILE, held_out_sets, round_prompts, seed_data
from karploop.data.tasks import home_module
from karploop.filtering.choice import at_round
from karploop.filtering.choice import settings as filter_settings
from karploop.filtering.noise import corrupt
from karploop.filtering.pairs import pairs
from karploop.filtering.select import select
from karploop.fingerprint import fingerprint
from karploop.judging.by_model import judge_by_model
from karploop.judging.equivalence import identity
from karploop.judging.judge import judge
from karploop.machinery import Machinery
from karploop.manifest import digest
from karploop.models.checkpoint import IMPORTING
from karploop.models.weights import take_in
from karploop.oversight.evaluate import EVALS_FILE, evaluate
from karploop.oversight.fitness import FITNESS_FILE, Fitness, fitness
from karploop.oversight.watch import WATCH_FILE, watch
from karploop.records import EXAMPLES_FILE, SELECTION_FILE, Samples, Selection
from karploop.roles.in_loop import LoopRoles
from karploop.roles.on_mesh import MeshRole
from karploop.roles.remote import RemoteRole
from karploop.sampling.by_chain import generate_by_chain
from karploop.sampling.generate import generate
from karploop.stages import Artifact, Rng, Stages
from karploop.training.experience import experience
from karploop.training.lessons import RECORDS
from karploop.training.objectives import EXAMPLES, PAIRS
from karploop.training.objectives import settings as objective_settings
from karploop.training.train import train

BASE = -1  # the round before the first
_ROLES = (LoopRoles.__module__, MeshRole.__module__, RemoteRole.__module__)


@dataclass
class Round:
    """What one round (or the base) left behind."""

    index: int
    stages: dict[str, Artifact]
    evals: dict[str, float]
    metrics: dict[str, float | None]
    stopped: str = ""  # why the loop ends here, where it does


class Bindings:
    """The stages of one run. See the module docstring."""

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

    def _rng(self, index: int, member: int = 0) -> Rng:
        return Rng(self.config.seed, member, index)

    def _run(self, *args, more: tuple[str, ...] = (), **kwargs) -> Artifact:
        return self.stages.run(*args, modules=(*self.task_modules, *more), **kwargs)

    @property
    def origin(self) -> str:
        """The stage that the base comes from."""
        return "import" if self.m.policy.role else "warmup"

    def base(self, member: int) -> Artifact:
        """Parameters to start from: a published checkpoint's, or those of a warm-up."""
        role = self.m.policy.role
        if role:
            source = {"files": role.files(), "code": fingerprint(*IMPORTING)}
            return self.stages.run(
                "import",
                functools.partial(take_in, **source),
                config=source | self.model,
                inputs={},
                rng=self._rng(BASE),
                keyed=False,
            )
        return self._train("warmup", self.config.warmup, BASE, member, {"seed": self.seed})

    def train(
        self,
        index: int,
        member: int,
        params: Artifact,
        base: Artifact,
        kept: list[Artifact],
    ) -> Artifact:
        """Trains on what has been kept, from the parameters that the regime says."""
        regime, objective = self.config.regime, self.m.trainers["train"].objective
        start = base if regime.start == "base" else params
        inputs = {"params": start} | ({"seed": self.seed} if self._labelled else {})
        inputs |= {f"kept_{i}": artifact for i, artifact in enumerate(self._recent(kept))}
        if objective.reference:
            inputs["reference"] = self._reference(params, base)
        decides = {"seed_share": regime.seed_share, "optimizer": regime.optimizer}
        if regime.data == "budget":
            decides["budget"] = regime.budget
        more = {"regime": decides, "objective": objective_settings(self.config.objective)}
        return self._train("train", self.config.train, index, member, inputs, more)

    @property
    def _labelled(self) -> bool:
        """Whether labelled rows are learnt from, which are neither pairs nor episodes."""
        return self.m.trainers["train"].objective.lesson == EXAMPLES

    def _reference(self, params: Artifact, base: Artifact) -> Artifact:
        return base if self.config.objective.reference == "base" else params

    def _train(self, name, config: TrainConfig, index, member, inputs, more=None) -> Artifact:
        function = functools.partial(
            train,
            trainer=self.m.trainers[name],
            prompting=self.m.policy.prompting,
            config=config,
            regime=self.config.regime if name == "train" else RegimeConfig(),
        )
        settings = asdict(config) | (more or {})
        del settings["checkpoint_every"]  # how often a stage saves does not change what it learns
        if not config.lora.rank:
            del settings["lora"]  # its other keys are without effect
        return self._run(
            name,
            function,
            config=settings | self.model,
            inputs=inputs,
            rng=self._rng(index, member),
        )

    def lesson(
        self,
        index: int,
        samples: dict[int, Artifact],
        verdicts: Artifact | None,
        selection: Artifact,
        params: Artifact,
        base: Artifact,
    ) -> tuple[Artifact, int]:
        """What the objective makes of the selection, and how many rows it has."""
        objective = self.m.trainers["train"].objective
        if objective.lesson == EXAMPLES:
            lesson = self.corrupt(index, selection)
        elif objective.lesson == PAIRS:
            inputs = _inputs(samples) | {"verdicts": verdicts, "selection": selection}
            config = self.config.preference
            lesson = self._run(
                "pairs",
                functools.partial(pairs, config=config),
                config=asdict(config),
                inputs=inputs,
                rng=self._rng(index),
                keyed=False,
            )
        else:
            inputs = _inputs(samples) | {"verdicts": verdicts, "selection": selection}
            lesson = self._experience(index, inputs, params, base)
        return lesson, lesson.table(RECORDS[objective.lesson][1]).num_rows

    def _experience(self, index, inputs, params, base) -> Artifact:
        config = self.config.objective
        settings = {"advantage": config.advantage, "reward": config.reward}
        if config.kl and config.kl_in == "reward":
            settings |= {"kl": config.kl, "row_length": self.config.train.row_length}
            settings |= self.model
            inputs = inputs | {"reference": self._reference(params, base)}
        return self._run(
            "experience",
            functools.partial(
                experience,
                trainer=self.m.trainers["train"],
                prompting=self.m.policy.prompting,
                config=config,
                train=self.config.train,
            ),
            config=settings,
            inputs=inputs,
            rng=self._rng(index),
            keyed=False,
        )

    def prompts(self, index: int, newest: int) -> Artifact:
        difficulties = window(self.config, newest)
        count = self.config.generate.prompts
        shown = list(self.m.policy.prompting.shown)
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
        settings = asdict(self.config.generate)
        for name in ("prompts", "difficulty_step", "max_difficulty", "spread", "advance"):
            del settings[name]  # in the prompts already
        for name in ("batch", "fused_steps"):
            del settings[name]  # without effect on the samples
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

    def _generate_by_chain(self, index, member, prompts, params, history, settings) -> Artifact:
        chain, roles = self.m.chain, self.m.roles
        seats = {ask.role for ask in chain.asks()}
        names = sorted({ask.template for ask in chain.asks() if ask.template})
        settings |= {"roles": roles.identity(seats), "files": {n: read_text(n) for n in names}}
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
            more=(*_ROLES, "karploop.chains.library", *_home(self.config.generate.chain)),
        )

    def judge(
        self, index: int, samples: dict[int, Artifact], history: list[Artifact]
    ) -> Artifact | None:
        """The verdicts that the filter reads (or the one it is matched with), if any.

        Args:
          history: the first member's base, and its parameters after each round so far.
        """
        if self.m.judge:
            return self._judge_by_model(index, samples, history)
        return self._tally(self.m.tally, index, samples) if self.m.tally else None

    def _tally(self, name: str, index: int, samples: dict[int, Artifact]) -> Artifact:
        """The verdicts of 'verifier' or 'vote'."""
        config = self.config.judge
        counted = {"voters": config.voters} | identity(config.equivalence) if name == "vote" else {}
        return self._run(
            "judge",
            functools.partial(judge, name=name, task=self.m.task, config=config),
            config={"judge": name, "task": self.where["name"]} | counted,
            inputs=_inputs(samples),
            rng=self._rng(index),
            keyed=False,
        )

    def _judge_by_model(self, index, samples, history) -> Artifact:
        settings, asked = self._asked_judge()
        inputs = self.m.roles.inputs(self.m.judge.seats, history)
        decides = digest([settings, [inputs[name].content for name in sorted(inputs)]])
        return self._run(
            "judge",
            functools.partial(judge_by_model, name=f"{self.m.judge.name}-{decides[:8]}", **asked),
            config=settings,
            inputs=_inputs(samples) | inputs,
            rng=self._rng(index),
            keyed=False,
            more=_ROLES,
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

    def fitness(self, index: int, history: list[Artifact]) -> tuple[dict[str, Artifact], str]:
        """What judge and policy make of labelled problems, where a model judges and there are any;
        and why the loop ends for it, if it does. Of the members, only the first is asked; of
        an ensemble, who neither reads gold nor counts votes.
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
            inputs=self.m.roles.inputs(self.m.judge.seats, history)
            | {"seed": self.seed, "params": history[-1]},
            rng=self._rng(index),
            more=_ROLES,
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
        inputs = _inputs(samples) | ({"verdicts": verdicts} if reads else {})
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

    def kept_nothing(self, selection: Artifact) -> str:
        """Why there is nothing to learn: the filter's doing, or the objective's."""
        if selection.table(EXAMPLES_FILE).num_rows == 0:
            return f"the filter '{self.config.filter.name}' kept nothing"
        return f"the objective '{self.config.objective.name}' found nothing to compare"

    def corrupt(self, index: int, selection: Artifact) -> Artifact:
        """The selection itself, unless the config asks for noise in this round."""
        noise = self.config.noise
        if not noise.rate or not noise.first_round <= index <= noise.last_round:
            return selection
        return self._run(
            "corrupt",
            functools.partial(corrupt, config=noise),
            config={"rate": noise.rate, "structure": noise.structure},
            inputs={"kept": selection},
            rng=self._rng(index),
        )

    def watch(self, index: int, samples: dict[int, Artifact], selection: Artifact) -> Artifact:
        return self._run(
            "watch",
            functools.partial(watch, task=self.m.task),
            config={"task": self.where["name"]},
            inputs=_inputs(samples) | {"selection": selection},
            rng=self._rng(index),
            keyed=False,
        )

    def anything_to_train_on(self, kept: list[Artifact]) -> bool:
        """Whether there are labelled rows, or rows of the rounds that the regime takes."""
        file = RECORDS[self.m.trainers["train"].objective.lesson][1]
        known = [artifact.table(file).num_rows for artifact in self._recent(kept)]
        return any(known) or (self._labelled and self.seed.table(EXAMPLES_FILE).num_rows > 0)

    def _recent(self, kept: list[Artifact]) -> list[Artifact]:
        return kept[-1:] if self.config.regime.data == "replace" else kept

    def next_difficulty(
        self, newest: int, samples: dict[int, Artifact], selection: Artifact
    ) -> int:
        """The next round's newest difficulty, by what this round kept."""
        rows = Samples.gather(_inputs(samples))
        kept_S = Selection.from_table(selection.table(SELECTION_FILE)).kept_S
        return following(self.config, newest, rows.difficulty_S, kept_S)

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


def read_fitness(artifact: Artifact) -> Fitness:
    return Fitness(**json.loads(artifact.path(FITNESS_FILE).read_text()))


def by_member(stage: str, artifacts: dict[int, Artifact]) -> dict[str, Artifact]:
    """A round's artifacts by name: 'train' for the first member, 'train.1' for the second, …"""
    return {f"{stage}.{m}" if m else stage: artifact for m, artifact in artifacts.items()}


def _inputs(samples: dict[int, Artifact]) -> dict[str, Artifact]:
    return {f"samples_{member}": artifact for member, artifact in samples.items()}


def _home(name: str) -> tuple[str, ...]:
    """The user's module in a "package.module:ATTRIBUTE": the values in it decide a result too."""
    return (name.partition(":")[0],) if ":" in name else ()
