"""Everything that a run compiles or looks up by name, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from karploop.config import Config, ModelConfig, PromptConfig
from karploop.curriculum import hardest
from karploop.data.fewshot import FewShot
from karploop.data.prompting import Prompting
from karploop.data.sources import labelled_prompts
from karploop.data.tasks import Task, get_task
from karploop.data.tokenizer import CharTokenizer
from karploop.errors import UserError
from karploop.filtering.filters import Filter, get_filter
from karploop.mesh import check_batch, make_mesh
from karploop.models.checkpoint import load_params
from karploop.models.weights import Weights
from karploop.roles import LocalModel
from karploop.sampling.sampler import Sampler
from karploop.training.trainer import Trainer


@dataclass(frozen=True)
class Machinery:
    """Everything compiled, made once for a run."""

    config: Config
    task: Task
    chosen: Filter
    matched: Filter | None
    policy: Policy
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
    mesh = make_mesh(config.mesh)
    model = _published(config, task) if config.roles.policy.path else _scratch(config, task)
    if model.longest + len(model.prompting.prefix) > model.config.max_length:
        shown = f" behind {len(model.prompting.prefix)} of examples" if model.role else ""
        raise UserError(
            f"problems of difficulty {hardest(config)} take {model.longest} tokens{shown}, longer "
            f"than 'config.model.max_length' of {model.config.max_length}: raise it, or lower "
            "'config.rounds' or 'config.evaluate.difficulties'"
        )
    stages = ("train",) if model.role else ("warmup", "train")
    for where in ("generate.batch", "evaluate.batch", *(f"{stage}.rows" for stage in stages)):
        stage, name = where.split(".")
        check_batch(getattr(getattr(config, stage), name), mesh, f"config.{where}")
        row_length = getattr(getattr(config, stage), "row_length", model.longest)
        if row_length < model.longest - 1:
            raise UserError(
                f"'config.{stage}.row_length' is {row_length}, shorter than the longest example "
                f"({model.longest - 1} tokens at difficulty {hardest(config)}): raise it"
            )
    source = (lambda weights: load_params(model.role.checkpoint, weights)) if model.role else None
    weights = Weights(model.config, model.vocabulary, mesh, source)
    sampler = Sampler(
        weights,
        model.prompting.tokenizer,
        prompt_length=model.prompt_length,
        completion_length=model.completion_length,
        prefix=model.prompting.prefix,
        stop_ids=model.prompting.stop_ids,
    )
    return Machinery(
        config, task, chosen, matched, model, weights, sampler, _trainers(config, weights)
    )


@dataclass(frozen=True)
class Policy:
    """The model that samples and learns, before anything of it is on a device.

    Lengths are in tokens, without start and stop token.
    """

    config: ModelConfig
    vocabulary: int
    prompting: Prompting
    role: LocalModel | None  # the checkpoint that it starts from; None: from scratch
    labelled: Sequence[str] | None  # prompts of the seed data; None: drawn by the run's seed
    prompt_length: int
    completion_length: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text without examples, start and stop token included."""
        return self.prompt_length + self.completion_length + 2

    def limit(self, task: Task, difficulty: int) -> int:
        """Most tokens of a completion, without its stop token."""
        return self.completion_length if self.role else task.max_completion_length(difficulty)


def _scratch(config: Config, task: Task) -> Policy:
    """A model trained from scratch, on characters."""
    if config.prompt != PromptConfig():
        raise UserError(
            "'config.prompt' says how a published model is asked, and there is none: set "
            "'config.roles.policy.path', or leave 'config.prompt' alone"
        )
    tokenizer, limit = CharTokenizer.for_tasks(task), hardest(config)
    return Policy(
        config=config.model,
        vocabulary=tokenizer.vocab_size,
        prompting=Prompting(tokenizer),
        role=None,
        labelled=None,
        prompt_length=task.max_prompt_length(limit),
        completion_length=task.max_completion_length(limit),
    )


def _published(config: Config, task: Task) -> Policy:
    """A checkpoint that was trained elsewhere."""
    execution = {name: getattr(config.model, name) for name in ("dtype", "scan", "remat")}
    if config.model != ModelConfig(**execution):
        raise UserError(
            "'config.roles.policy.path' names a checkpoint, which brings its own shape: of "
            "'config.model' set dtype, scan and remat only"
        )
    if config.members > 1:
        raise UserError("'config.members' counts models trained from scratch: set it to 1")
    role = LocalModel.describe(config.roles.policy.path, **execution)
    labelled = labelled_prompts(task, config.task)
    p = config.prompt
    shots = FewShot(
        instruction=p.instruction,
        examples=tuple(
            (prompt, p.answer.replace("{answer}", task.answer(prompt)))
            for prompt in labelled[: p.shots]
        ),
        prompt_format=p.question,
        separator=p.separator,
        stop=(p.stop,) if p.stop else (),
    )
    prompting = Prompting(role.tokenizer, shots, p.answer)
    prompts = (x for d in range(1, hardest(config) + 1) for x in task.prompts(d))
    longest = max(len(prompting.prompt(prompt)) for prompt in prompts)
    return Policy(
        config=role.config,
        vocabulary=role.vocabulary,
        prompting=prompting,
        role=role,
        labelled=labelled,
        prompt_length=longest,
        completion_length=p.max_new_tokens - 1,
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
