"""Stages that make parameters, and what they learn from."""

from __future__ import annotations

import functools
from dataclasses import asdict

from karploop.bindings.shared import BASE, Shared, inputs_of
from karploop.config import RegimeConfig, TrainConfig
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
from karploop.training.objectives import EPISODES, EXAMPLES, LABELS
from karploop.training.objectives import settings as objective_settings
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
        else:
            inputs = inputs_of(samples) | {"selection": selection}
            inputs |= {"verdicts": verdicts} if verdicts else {}
            if objective.lesson == EPISODES:
                lesson = self._experience(index, inputs, params, base)
            else:
                lesson = self._preferences(objective.lesson, index, inputs)
        return lesson, lesson.table(RECORDS[objective.lesson][1]).num_rows

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
        file = RECORDS[self.m.trainers["train"].objective.lesson][1]
        known = [artifact.table(file).num_rows for artifact in self._recent(kept)]
        return any(known) or (self._labelled and self.seed.table(EXAMPLES_FILE).num_rows > 0)

    def _recent(self, kept: list[Artifact]) -> list[Artifact]:
        """The rounds that the regime takes, of those whose phase learnt from the same kind."""
        file = RECORDS[self.m.trainers["train"].objective.lesson][1]
        kept = [artifact for artifact in kept if file in artifact.manifest.files]
        return kept[-1:] if self.config.regime.data == "replace" else kept

    def kept_nothing(self, selection: Artifact) -> str:
        """Why there is nothing to learn: the filter's doing, or the objective's."""
        if selection.table(EXAMPLES_FILE).num_rows == 0:
            return f"the filter '{self.config.filter.name}' kept nothing"
        return f"the objective '{self.config.objective.name}' found nothing to compare"
