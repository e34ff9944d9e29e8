"""The model that is measured: published weights, or any shape with random ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from karploop.benchmark.costs import Shape
from karploop.config import Config
from karploop.data.tasks import get_task
from karploop.data.tokenizer import CharTokenizer, Tokenizer
from karploop.errors import UserError
from karploop.mesh import batch_parts, make_mesh
from karploop.models.checkpoint import load_params
from karploop.models.weights import Weights
from karploop.roles.local import LocalModel


@dataclass(frozen=True)
class Numbers:
    """In the place of a tokenizer, for random weights: a token's text is its number."""

    vocab_size: int
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int = 1
    has_template: bool = False

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def identity(self) -> str:
        return f"numbers below {self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def holding(self, strings: Sequence[str]) -> tuple[int, ...]:
        return tuple(i for i in range(self.vocab_size) if any(s in str(i) for s in strings))


class AsGiven:
    """Prompting whose prompts and completions are tokens already."""

    prefix: tuple[int, ...] = ()

    def prompt(self, prompt: Sequence[int]) -> Sequence[int]:
        return prompt

    def example(self, prompt: Sequence[int], completion: Sequence[int]):
        return prompt, completion


@dataclass(frozen=True)
class Subject:
    """A model on the mesh; its parameters are made or read when asked for."""

    config: Config
    weights: Weights
    tokenizer: Tokenizer
    load: Callable[[], Any]

    @property
    def name(self) -> str:
        path = self.config.policy.path
        return path.rstrip("/").rpartition("/")[2] if path else self.config.name

    @property
    def shape(self) -> Shape:
        return Shape(self.weights.model.config, self.weights.model.vocabulary)

    def tokens(self, seed: int, *lengths: int) -> list[list[int]]:
        """Texts of so many tokens each, drawn evenly."""
        rng = np.random.default_rng([self.config.seed, seed])
        return [rng.integers(0, self.shape.vocabulary, length).tolist() for length in lengths]

    def rows(self, wanted: int) -> int:
        """A batch for so many rows that divides over the mesh."""
        parts = batch_parts(self.weights.mesh)
        return -(-wanted // parts) * parts

    def check_length(self, name: str, longest: int) -> None:
        """Raises UserError: the workload's texts are longer than the model reads."""
        limit = self.weights.model.config.max_length
        if longest > limit:
            raise UserError(
                f"the workload '{name}' has texts of {longest} tokens, and the context of "
                f"'{self.name}' is {limit}: leave it out of --workloads, or raise "
                "'config.model.max_length'"
            )


def make_subject(config: Config, vocabulary: int | None) -> Subject:
    """The policy of a config, with published weights or random ones; nothing is compiled.

    Args:
      vocabulary: rows of the embedding of a model with random weights; None: those of its task's
        characters.

    Raises:
      UserError: no such checkpoint, or a mesh that it does not lie on; a vocabulary for a
        checkpoint, which has its own.
    """
    mesh = make_mesh(config.mesh)
    if not config.policy.path:
        rows = vocabulary or _characters(config)
        weights = Weights(config.model, rows, mesh)
        start = functools.partial(weights.init, jax.random.key(config.seed))
        return Subject(config, weights, Numbers(rows), start)
    if vocabulary:
        raise UserError(
            f"--vocabulary is {vocabulary}, and '{config.policy.path}' has its own: leave it out"
        )
    execution = {name: getattr(config.model, name) for name in ("dtype", "scan", "remat")}
    role = LocalModel.describe(config.policy.path, **execution)
    weights = Weights(role.config, role.vocabulary, mesh)
    start = functools.partial(load_params, role.checkpoint, weights)
    return Subject(config, weights, role.tokenizer, start)


def _characters(config: Config) -> int:
    if config.model.alphabet == "ascii":
        return CharTokenizer.ascii().vocab_size
    return CharTokenizer.for_tasks(get_task(config.task.name)).vocab_size
