"""Everything that a run compiles or looks up by name, checked before anything is compiled."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from karploop.chains.definition import Chain
from karploop.chains.library import get_chain
from karploop.chains.rendering import load_templates
from karploop.config import MODELS, TALLIES, Config, ObjectiveConfig, TrainConfig, changes_results
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
from karploop.policy import Policy, make_policy
from karploop.roles.in_loop import LoopRoles
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
    def reads_gold(self) -> bool:
        """Whether a filter sees gold labels beside what the judge says: a diagnostic."""
        return reads_gold(self.chosen, self.matched)


def prepare(config: Config) -> Machinery:
    """Checks the config against task, mesh and filters, and lays the model on the mesh.

    Nothing is compiled yet.

    Raises:
      UserError: anything that would fail later, found now.
    """
    task = get_task(config.task.name)
    chosen, matched = choose(config)
    name = judge_name(config, chosen, matched)
    mesh = make_mesh(config.mesh)
    policy = make_policy(config, task)
    _check_rows(config, policy, mesh)
    judge = make_judge(config.judge, config.seed, task=task) if name in MODELS else None
    if name == "vote":
        identity(config.judge.equivalence)  # refuses where a package is missing
    chain = _chain(config)
    asks = list(chain.asks()) if chain else []
    seats = [*(judge.seats if judge else ()), *(ask.role for ask in asks)]
    roles = LoopRoles(
        tuple(dict.fromkeys(seats)),
        config.roles,
        policy.role,
        config.judge.batch,
        config.model.dtype,
        chat=config.prompt.chat,
        job=_job(config),
    )
    if seats:
        check_batch(config.judge.batch, mesh, "config.judge.batch")
    for ask in asks:
        roles.check(ask.role, "text")
    if judge:
        for seat, wanted in judge.seats.items():
            for each in wanted:
                roles.check(seat, each)
    role = policy.role
    source = functools.partial(load_params, role.checkpoint) if role else None
    weights = Weights(policy.config, policy.vocabulary, mesh, source)
    prompting = policy.prompting
    sampler = Sampler(
        weights,
        prompting.tokenizer,
        prompt_length=policy.prompt_length,
        completion_length=policy.completion_length,
        prefix=prompting.prefix,
        stop_ids=prompting.stop_ids,
    )
    trainers = _trainers(config, weights, policy)
    checked = (config, task, chosen, matched, judge, chain, roles, policy)
    return Machinery(*checked, weights, sampler, trainers)


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


def _check_rows(config: Config, policy: Policy, mesh: Mesh) -> None:
    stages = ("train",) if policy.role else ("warmup", "train")
    for where in ("generate.batch", "evaluate.batch", *(f"{stage}.rows" for stage in stages)):
        stage, name = where.split(".")
        _check_batch(config, stage, name, mesh)
        needed, what = policy.row_length, "example"
        if stage == "train" and config.objective.name == "policy_gradient":
            # What was sampled is learnt behind what it was sampled from.
            needed, what = policy.longest - 1, "prompt with its completion"
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


def _check_batch(config: Config, stage: str, name: str, mesh: Mesh) -> None:
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


def _trainers(config: Config, weights: Weights, policy: Policy) -> dict[str, Trainer]:
    """One compiled step for both training stages unless they differ in what is compiled."""
    made: dict[Any, Trainer] = {}
    trainers = {}
    for name, wanted in (("warmup", ObjectiveConfig()), ("train", config.objective)):
        train: TrainConfig = getattr(config, name)
        optimizer, lora, accumulation = train.optimizer, train.lora, train.accumulation
        objective = make_objective(wanted, policy.completion_length + 1)
        static = (optimizer.name, optimizer.b1, optimizer.b2, optimizer.epsilon)
        static += (optimizer.weight_decay, optimizer.clip_norm, optimizer.muon_scale)
        static += (lora,) if lora.rank else ()
        static += (wanted, accumulation)
        if static not in made:
            made[static] = Trainer(weights, optimizer, lora, objective, accumulation)
        trainers[name] = made[static]
    return trainers
