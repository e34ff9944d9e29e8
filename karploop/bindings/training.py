"""Stages that make parameters, and what they learn from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from karploop.bindings.shared import BASE, ROLES, Shared, inputs_of
from karploop.config import TEACHER, RegimeConfig, TrainConfig
from karploop.filtering.labels import labels
from karploop.filtering.noise import corrupt
from karploop.filtering.pairs import labelled_pairs, pairs
from karploop.fingerprint import fingerprint
from karploop.models.checkpoint import IMPORTING
from karploop.models.weights import take_in
from karploop.records import EXAMPLES_FILE
from karploop.stages import Artifact
from karploop.training.experience import experience
from karploop.training.lessons import RECORDS
from karploop.training.objectives import DIVERGENCES, EPISODES, EXAMPLES, LABELS, REWARDS
from karploop.training.objectives import settings as objective_settings
from karploop.training.teaching import teach
from karploop.training.train import train


class Training(Shared):
    """Stages that make parameters, and what they learn from."""

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
        history: list[Artifact],
    ) -> Artifact:
        """Trains on what has been kept, from the parameters that the regime says: the policy, or a
        reward model (stage `reward`); `history` as in `judge`, where a teacher is compared with."""
        regime, objective = self.config.regime, self.m.trainers["train"].objective
        starts = {"continue": {"params": params}, "base": {"params": base}, "scratch": {}}
        inputs = starts[regime.start] | ({"seed": self.seed} if self._labelled else {})
        inputs |= {f"kept_{i}": artifact for i, artifact in enumerate(self._recent(kept))}
        if objective.reference:
            inputs["reference"] = self._reference(params, base)
        decides = {"seed_share": regime.seed_share, "optimizer": regime.optimizer}
        if regime.data == "budget":
            decides["budget"] = regime.budget
        more = {"regime": decides, "objective": objective_settings(self.config.objective)}
        if objective.reads == DIVERGENCES:
            taught, inputs_of_teacher = self._teacher([*history[:-1], params])
            more, inputs = more | taught, inputs | inputs_of_teacher
        name = "reward" if self.rewards else "train"
        return self._train(name, self.config.train, index, member, inputs, more)

    @property
    def rewards(self) -> bool:
        """Whether a reward model is trained, and the policy stays as it is."""
        return self.m.trainers["train"].objective.reads == REWARDS

    def _teacher(self, history: list[Artifact]) -> tuple[dict[str, Any], dict[str, Artifact]]:
        """What decides what the role `teacher` says: settings, and the loop's own weights."""
        roles = self.m.roles
        return {TEACHER: roles.identity([TEACHER])}, roles.inputs([TEACHER], history)

    @property
    def _load_teacher(self) -> Callable[[Mapping[str, Artifact]], Any]:
        return functools.partial(self.m.roles.params, TEACHER, self.m.weights)

    @property
    def _labelled(self) -> bool:
        """Whether labelled rows are learnt from, which are neither pairs nor episodes."""
        return self.m.trainers["train"].objective.lesson == EXAMPLES

    def _reference(self, params: Artifact, base: Artifact) -> Artifact:
        return base if self.config.objective.reference == "base" else params

    def _train(self, name, config: TrainConfig, index, member, inputs, more=None) -> Artifact:
        function = functools.partial(
            train,
            trainer=self.m.trainers["warmup" if name == "warmup" else "train"],
            prompting=self.m.policy.prompting,
            config=config,
            regime=RegimeConfig() if name == "warmup" else self.config.regime,
            teacher=self._load_teacher,
        )
        settings = _deciding(config) | (more or {})
        return self._run(
            name,
            function,
            config=settings | self.model,
            inputs=inputs,
            rng=self._rng(index, member),
            more=ROLES if TEACHER in settings else (),
        )

    def lesson(
        self,
        index: int,
        samples: dict[int, Artifact],
        verdicts: Artifact | None,
        selection: Artifact,
        history: list[Artifact],
    ) -> tuple[Artifact, int]:
        """What the objective makes of the selection, and how many rows it has; `history` as in
        `judge`, for what it is held to or taught by."""
        objective = self.m.trainers["train"].objective
        if objective.lesson == EXAMPLES:
            lesson = self.corrupt(index, selection)
        elif self.config.objective.taught:
            lesson = self._taught(index, samples, selection, history)
        else:
            inputs = inputs_of(samples) | {"selection": selection}
            inputs |= {"verdicts": verdicts} if verdicts else {}
            if objective.lesson == EPISODES:
                lesson = self._experience(index, inputs, history[-1], history[0])
            else:
                lesson = self._preferences(objective.lesson, index, inputs)
        return lesson, lesson.metadata(RECORDS[objective.lesson][1]).num_rows

    def _preferences(self, kind: str, index: int, inputs: dict[str, Artifact]) -> Artifact:
        """Pairs, or single completions that are good or bad."""
        config = self.config.preference
        if kind == LABELS:
            settings = {"threshold": config.desirable}
            function = functools.partial(labels, **settings)
        elif config.pairing == "labelled":
            function, settings = labelled_pairs, {"pairing": config.pairing}
            inputs = inputs | {"seed": self.seed}
        else:
            function = functools.partial(pairs, config=config)
            settings = asdict(config)
            del settings["desirable"]
        return self._run(
            kind,
            function,
            config=settings,
            inputs=inputs,
            rng=self._rng(index),
            keyed=False,
        )

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

    def _taught(self, index, samples, selection, history) -> Artifact:
        """Episodes by what a teacher says of their tokens, in place of a judge."""
        train = self.config.train
        settings, inputs = self._teacher(history)
        return self._run(
            "experience",
            functools.partial(
                teach,
                trainer=self.m.trainers["train"],
                prompting=self.m.policy.prompting,
                config=self.config.objective,
                train=train,
                teacher=self._load_teacher,
            ),
            config=settings | {"advantage": TEACHER, "row_length": train.row_length} | self.model,
            inputs=inputs_of(samples) | {"selection": selection} | inputs,
            rng=self._rng(index),
            keyed=False,
            more=ROLES,
        )

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

    def anything_to_train_on(self, kept: list[Artifact]) -> bool:
        """Whether there are labelled rows, or rows of the rounds that the regime takes."""
        known = [artifact.table(self._file).num_rows for artifact in self._recent(kept)]
        return any(known) or (self._labelled and self.seed.table(EXAMPLES_FILE).num_rows > 0)

    @property
    def _file(self) -> str:
        """What the objective learns from."""
        return RECORDS[self.m.trainers["train"].objective.lesson][1]

    def _recent(self, kept: list[Artifact]) -> list[Artifact]:
        """The rounds that the regime takes, of those whose phase learnt from the same kind."""
        known = [artifact for artifact in kept if self._file in artifact.manifest.files]
        return known[-1:] if self.config.regime.data == "replace" else known

    def kept_nothing(self, selection: Artifact) -> str:
        """Why there is nothing to learn: the filter's doing, or the objective's."""
        if selection.table(EXAMPLES_FILE).num_rows == 0:
            return f"the filter '{self.config.filter.name}' kept nothing"
        return f"the objective '{self.config.objective.name}' found nothing to compare"


def _deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings on which what is learnt depends; not how often it is saved, nor what is off."""
    settings = asdict(config)
    del settings["checkpoint_every"]
    off = {
        "lora": not config.lora.rank,
        "accumulation": config.accumulation == 1,
        "share_prompts": not config.share_prompts,
        "steps": config.tokens or config.epochs,
        "tokens": not config.tokens,
        "epochs": not config.epochs,
    }
    return {name: value for name, value in settings.items() if not off.get(name)}
