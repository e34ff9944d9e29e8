"""Everything that a run compiles or looks up by name, checked before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from karploop.chains.definition import Chain
from karploop.chains.library import get_chain
from karploop.chains.rendering import load_templates
from karploop.config import (
    MODELS,
    SIMULATED,
    TALLIES,
    TEACHER,
    Config,
    ObjectiveConfig,
    TrainConfig,
    changes_results,
)
from karploop.curriculum import hardest
from karploop.data.tasks import Task, get_task
from karploop.errors import UserError
from karploop.filtering.choice import choose, judge_name, judges, reads_gold
from karploop.filtering.registry import Filter
from karploop.judging.equivalence import identity
from karploop.judging.model_judge import ModelJudge, make_judge
from karploop.manifest import digest
from karploop.mesh import check_batch, make_mesh
from karploop.models.checkpoint import load_params
from karploop.models.weights import Weights
from karploop.phases import by_phase, in_round, told_of
from karploop.policy import Policy, make_policy
from karploop.roles.in_loop import LoopRoles, check_reward_models
from karploop.sampling.sampler import Sampler
from karploop.schema import flatten, to_dict
from karploop.training.objectives import make_objective
from karploop.training.trainer import Trainer


@dataclass(frozen=True)
class Machinery:
    """Everything compiled, made once for a run.

    Attributes:
      judge: the model that judges, if one does; it asks `roles`.
      chain: what completions come from, if it is not the policy alone; it asks them, too.
      later: what takes its place from a round on, in later phases. Model, task, roles and sampler
        are the same; a training step is, too, where what is compiled is.
    """

    config: Config
    task: Task
    chosen: Filter
    matched: Filter | None
    judge: ModelJudge | None
    chain: Chain | None
    roles: LoopRoles
    policy: Policy
    weights: Weights
    sampler: Sampler
    trainers: dict[str, Trainer]
    later: Mapping[int, Machinery] = field(default_factory=dict)

    def at(self, index: int) -> Machinery:
        """What serves a round."""
        return in_round(self.phases, index)

    @property
    def phases(self) -> dict[int, Machinery]:
        """By first round."""
        return {0: self, **self.later}

    @property
    def tally(self) -> str:
        """'verifier' or 'vote', if that judges; else empty."""
        name = judge_name(self.config, self.chosen, self.matched)
        return name if name in TALLIES else ""

    @property
    def filter_reads(self) -> bool:
        """Whether the filter reads verdicts, and not the objective alone."""
        return bool(judges(self.chosen, self.matched))

    @property
    def simulates(self) -> bool:
        """Whether in some phase gold labels say what people would, also among other judges."""
        judges = [phase.judge for phase in self.phases.values() if phase.judge]
        return any(SIMULATED in judge.name for judge in judges)

    @property
    def reads_gold(self) -> bool:
        """Whether a filter sees gold labels beside what the judge says: a diagnostic."""
        return reads_gold(self.chosen, self.matched)


class _Deciding(NamedTuple):
    """What a phase's settings name: filters, judge and chain."""

    chosen: Filter
    matched: Filter | None
    judge: ModelJudge | None
    chain: Chain | None

    def wanted(self) -> Iterator[tuple[str, str]]:
        """Roles that are asked, and what for."""
        for seat, wanted in self.judge.seats.items() if self.judge else ():
            yield from ((seat, each) for each in wanted)
        for ask in self.chain.asks() if self.chain else ():
            yield ask.role, "text"


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Machinery:
    """Checks the config against task, mesh and filters, and lays the model on the mesh.

    Nothing is compiled yet.

    Args:
      devices: to lay it on; None: all there are.

    Raises:
      UserError: anything that would fail later, found now.
    """
    task = get_task(config.task.name)
    configs = by_phase(config)
    deciding = {}
    for start, of_phase in configs.items():
        with told_of(start):
            deciding[start] = _decide(of_phase, task)
    mesh = make_mesh(config.mesh, devices)
    policy = make_policy(config, task)
    for start, of_phase in configs.items():
        with told_of(start):
            _check_rows(of_phase, policy, mesh)
    roles = _roles(configs, deciding, policy, mesh)
    check_reward_models([in_round(configs, index) for index in range(config.rounds)])
    role = policy.role
    source = functools.partial(load_params, role.checkpoint) if role else None
    weights = Weights(policy.config, policy.vocabulary, mesh, source)
    sampler = make_sampler(weights, policy)
    teacher = _teacher(configs, roles, policy, weights)
    trainers = make_trainers(configs, weights, policy, teacher)
    first, *later = (
        Machinery(
            *(configs[start], task, *deciding[start]),
            *(roles, policy, weights, sampler, trainers[start]),
        )
        for start in configs
    )
    return replace(first, later=dict(zip([*configs][1:], later, strict=True)))


def _decide(config: Config, task: Task) -> _Deciding:
    """Raises UserError: there is no such filter, judge or chain."""
    chosen, matched = choose(config)
    name = judge_name(config, chosen, matched)
    if config.task.hints and not task.hintable:
        raise UserError(
            f"'config.task.hints' writes answers into prompts as hints, and task '{task.name}' "
            "does not say how: set it to False, or give the task `hinted`"
        )
    if config.generate.rationalise and not (name == "verifier" and chosen.judges):
        raise UserError(
            "'config.generate.rationalise' shows the policy gold answers, and the filter "
            f"'{chosen.name}' would keep what repeats them: take one that keeps what is right by "
            "gold ('config.filter.name=verifier')"
        )
    judge = make_judge(config.judge, config.seed, task=task) if name in MODELS else None
    if name == "vote":
        identity(config.judge.equivalence)  # refuses where a package is missing
    return _Deciding(chosen, matched, judge, _chain(config))


def _roles(
    configs: Mapping[int, Config], deciding: Mapping[int, _Deciding], policy: Policy, mesh: Mesh
) -> LoopRoles:
    """The roles that any phase asks. Raises UserError: one cannot give what is wanted of it."""
    config = configs[0]
    wanted = {start: dict.fromkeys(of_phase.wanted()) for start, of_phase in deciding.items()}
    asked = tuple(dict.fromkeys(seat for some in wanted.values() for seat, _ in some))
    roles = LoopRoles(
        asked,
        config.roles,
        policy.speaker,
        config.judge.batch,
        config.model.dtype,
        chat=config.prompt.chat,
        job=_job(config),
        prompting=policy.prompting,
        readers=(TEACHER,) if any(c.objective.taught for c in configs.values()) else (),
    )
    if asked:
        check_batch(config.judge.batch, mesh, "config.judge.batch")
    for start, some in wanted.items():
        with told_of(start):
            for seat, each in some:
                roles.check(seat, each)
    return roles


def _job(config: Config) -> str:
    """What a loop's spending is counted for: the run, whatever its cap and its rounds may be."""
    settings = flatten(to_dict(config))
    return digest({key: value for key, value in settings.items() if changes_results(key)})


def _chain(config: Config) -> Chain | None:
    """Raises UserError: no such chain, or settings of sampling that chains do not have."""
    generate = config.generate
    if not generate.chain:
        return None
    if generate.top_k or generate.min_p:
        raise UserError(
            "'config.generate.chain' asks roles, some of which know 'temperature' and 'top_p' "
            "alone: leave 'top_k' and 'min_p' at 0"
        )
    chain = get_chain(generate.chain, generate.options, "config.generate.chain")
    load_templates(ask.template for ask in chain.asks() if ask.template)
    return chain


SAMPLED = ("generate.batch", "generate.slots", "evaluate.batch")  # prompts of a device call


def _check_rows(config: Config, policy: Policy, mesh: Mesh) -> None:
    stages = ("train",) if policy.role else ("warmup", "train")
    for where in (*SAMPLED, *(f"{stage}.rows" for stage in stages)):
        stage, name = where.split(".")
        check_divides(config, stage, name, mesh)
        needed, what = policy.row_length, "example"
        if stage == "train" and config.objective.name == "policy_gradient":
            # What was sampled is learnt behind what it was sampled from.
            needed, what = policy.longest - 1, "prompt with its completion"
        if stage == "train" and config.objective.name == "reward":
            needed += 1  # the stop token is read, too
        row_length = getattr(getattr(config, stage), "row_length", needed)
        if row_length < needed:
            raise UserError(
                f"'config.{stage}.row_length' is {row_length}, shorter than the longest {what} "
                f"({needed} tokens at difficulty {hardest(config)}): raise it"
            )
        if policy.role and row_length > policy.config.max_length:
            raise UserError(
                f"'config.{stage}.row_length' is {row_length}, longer than the model's context of "
                f"{policy.config.max_length}: lower it"
            )


def check_divides(config: Config, stage: str, name: str, mesh: Mesh) -> None:
    """Raises UserError unless what is computed at a time divides over the mesh."""
    where, settings = f"config.{stage}.{name}", getattr(config, stage)
    size, parts = getattr(settings, name), getattr(settings, "accumulation", 1)
    if size % parts:
        raise UserError(
            f"'{where}' is {size}, which 'config.{stage}.accumulation' of {parts} does not divide: "
            f"use a multiple of {parts}"
        )
    each = f"{where} / accumulation" if parts > 1 else where
    check_batch(size // parts, mesh, each)


def _teacher(
    configs: Mapping[int, Config], roles: LoopRoles, policy: Policy, weights: Weights
) -> Weights | None:
    """The architecture of the role `teacher`, which reads the policy's tokens; None: unwanted.

    Raises:
      UserError: it is a server, its tokens are others, or its context is too short.
    """
    taught = {start: config for start, config in configs.items() if config.objective.taught}
    if not taught:
        return None
    roles.check(TEACHER, "distributions")
    model = roles.model(TEACHER)
    if not model:
        return weights
    own = policy.prompting.tokenizer
    rows = min(model.vocabulary, policy.vocabulary)  # where embeddings have some to spare
    if own.reachable_size > rows or own.tokens(rows) != model.tokenizer.tokens(rows):
        known = f"the {own.vocab_size} of '{policy.role.path}'" if policy.role else "characters"
        raise UserError(
            f"'config.roles.teacher' reads the {model.tokenizer.vocab_size} tokens of "
            f"'{model.path}', and the policy {known}: take a teacher with the same tokens, or "
            "learn from what this one writes ('config.generate.chain=teacher' with "
            "'config.objective.name=sft')"
        )
    for start, config in taught.items():
        if config.train.row_length > model.config.max_length:
            with told_of(start):
                raise UserError(
                    f"'config.train.row_length' is {config.train.row_length}, longer than the "
                    f"context of 'config.roles.teacher', {model.config.max_length}: lower it"
                )
    return Weights(model.config, model.vocabulary, weights.mesh)


def make_sampler(weights: Weights, policy: Policy) -> Sampler:
    """What samples from the policy and scores by it."""
    prompting = policy.prompting
    return Sampler(
        weights,
        prompting.tokenizer,
        prompt_length=policy.prompt_length,
        completion_length=policy.completion_length,
        prefix=prompting.prefix,
        stop_ids=prompting.stop_ids,
    )


def make_trainers(
    configs: Mapping[int, Config], weights: Weights, policy: Policy, teacher: Weights | None
) -> dict[int, dict[str, Trainer]]:
    """By phase and training stage, one compiled step for all that compile the same."""
    made: dict[Any, Trainer] = {}

    def trainer(train: TrainConfig, wanted: ObjectiveConfig) -> Trainer:
        optimizer, lora, accumulation = train.optimizer, train.lora, train.accumulation
        objective = make_objective(wanted, policy.completion_length + 1)
        static = (optimizer.name, optimizer.b1, optimizer.b2, optimizer.epsilon)
        static += (optimizer.weight_decay, optimizer.clip_norm, optimizer.muon_scale)
        static += (lora,) if lora.rank else ()
        static += (wanted, accumulation)
        if static not in made:
            taught_by = teacher if wanted.taught else None
            given = (weights, optimizer, lora, objective, taught_by)
            made[static] = Trainer(*given, accumulation=accumulation)
        return made[static]

    return {
        start: {
            "warmup": trainer(config.warmup, ObjectiveConfig()),
            "train": trainer(config.train, config.objective),
        }
        for start, config in configs.items()
    }
