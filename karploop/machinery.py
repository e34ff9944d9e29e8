"""Everything that a run compiles or looks up by name, checked before anything is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from karploop.config import Config
from karploop.curriculum import hardest
from karploop.data.prompting import Prompting
from karploop.data.tasks import Task, get_task
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.filtering.filters import Filter, get_filter
from karploop.mesh import check_batch, make_mesh
from karploop.models.weights import Weights
from karploop.sampling.sampler import Sampler
from karploop.training.trainer import Trainer


@dataclass(frozen=True)
class Machinery:
    """Everything compiled, made once for a run."""

    config: Config
    task: Task
    chosen: Filter
    matched: Filter | None
    prompting: Prompting
    weights: Weights
    sampler: Sampler
    trainers: dict[str, Trainer]


def prepare(config: Config) -> Machinery:
    """Checks the config against task, mesh and filters, and lays the model on the mesh.

    Nothing is compiled yet.

    Raises:
      UserError: anything that would fail later, found now.
    """
    task = get_task(config.task.name)
    chosen = get_filter(config.filter.name)
    matched = get_filter(config.filter.match) if config.filter.match else None
    if matched and config.filter.name != "random":
        raise UserError(
            f"'config.filter.match' is read by the filter 'random' alone, and the filter is "
            f"'{config.filter.name}': leave it empty or set 'config.filter.name=random'"
        )
    limit = hardest(config)
    prompt_length = task.max_prompt_length(limit)
    completion_length = task.max_completion_length(limit)
    longest = prompt_length + completion_length + 2
    if longest > config.model.max_length:
        raise UserError(
            f"problems of difficulty {limit} take {longest} tokens, longer than "
            f"'config.model.max_length' of {config.model.max_length}: raise it, or lower "
            "'config.rounds' or 'config.evaluate.difficulties'"
        )
    mesh = make_mesh(config.mesh)
    for where in ("generate.batch", "evaluate.batch", "warmup.rows", "train.rows"):
        stage, name = where.split(".")
        check_batch(getattr(getattr(config, stage), name), mesh, f"config.{where}")
        row_length = getattr(getattr(config, stage), "row_length", longest)
        if row_length < longest - 1:
            raise UserError(
                f"'config.{stage}.row_length' is {row_length}, shorter than the longest example "
                f"({longest - 1} tokens at difficulty {limit}): raise it"
            )
    tokenizer = CharTokenizer.for_tasks(task)
    prompting = Prompting(tokenizer)
    weights = Weights(config.model, tokenizer.vocab_size, mesh)
    sampler = Sampler(
        weights,
        tokenizer,
        prompt_length=prompt_length,
        completion_length=completion_length,
        prefix=prompting.prefix,
        stop_ids=prompting.stop_ids,
    )
    return Machinery(
        config, task, chosen, matched, prompting, weights, sampler, _trainers(config, weights)
    )


def _trainers(config: Config, weights: Weights) -> dict[str, Trainer]:
    """One compiled step for both training stages unless they differ in optimiser or adapter."""
    made: dict[Any, Trainer] = {}
    trainers = {}
    for name in ("warmup", "train"):
        optimizer, lora = getattr(config, name).optimizer, getattr(config, name).lora
        static = (optimizer.name, optimizer.b1, optimizer.b2, optimizer.epsilon)
        static += (optimizer.weight_decay, optimizer.clip_norm, optimizer.muon_scale)
        static += (lora,) if lora.rank else ()
        if static not in made:
            made[static] = Trainer(weights, optimizer, lora)
        trainers[name] = made[static]
    return trainers
