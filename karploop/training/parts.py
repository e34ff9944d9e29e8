"""What of a model is trained: everything, or an adapter on frozen parameters.

Training holds two trees, one that is trained (and has an optimiser's state, and is donated from
step to step) and one that is frozen (and shared with sampling). A pure function puts them together
into what the model is applied to; the gradient is taken through it. That is all in which full
fine-tuning and adapters differ.
"""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import jax

from karploop.config import LoraConfig
from karploop.models.lora import Lora, attach
from karploop.models.weights import Weights


class Parts(Protocol):
    """A division of a model; artifacts are stages that trained."""

    abstract: Any  # of the trained tree
    shardings: Any
    frozen_shardings: Any

    def assemble(self, trained: Any, frozen: Any) -> Any:
        """Variables of the decoder; pure."""

    def frozen(self, given: Any) -> Any:
        """The frozen tree of a training that starts from the artifact `given`; shared buffers."""

    def begin(self, given: Any, key: jax.Array) -> Any:
        """The trained tree at its start, for the caller to donate."""

    def save(self, trained: Any, given: Any, directory: pathlib.Path) -> None:
        """Writes the trained tree as a stage's parameters."""


class Everything:
    """All parameters are trained."""

    frozen_shardings = ()

    def __init__(self, weights: Weights):
        self._weights = weights
        self.abstract, self.shardings = weights.abstract, weights.shardings

    def assemble(self, trained: Any, frozen: Any) -> Any:
        return trained

    def frozen(self, given: Any) -> Any:
        return ()

    def begin(self, given: Any, key: jax.Array) -> Any:
        """The parameters of `given`, or fresh ones where it is None."""
        return self._weights.take(given) if given else self._weights.init(key)

    def save(self, trained: Any, given: Any, directory: pathlib.Path) -> None:
        self._weights.save(trained, directory)


class Adapter:
    """An adapter is trained, and what lies below it is frozen."""

    def __init__(self, weights: Weights, config: LoraConfig):
        """Raises UserError: the model has no such matrix."""
        self._weights = weights
        self.lora = Lora(weights.boxed, weights.mesh, config)
        self.abstract, self.shardings = self.lora.abstract, self.lora.shardings
        self.frozen_shardings = weights.shardings

    def assemble(self, trained: Any, frozen: Any) -> Any:
        return attach(frozen, trained, self.lora.scale)

    def frozen(self, given: Any) -> Any:
        return self._weights.load_base(given)

    def begin(self, given: Any, key: jax.Array) -> Any:
        """The adapter of `given`, to be trained on; a fresh one where it trained everything."""
        found = self._weights.load_adapter(given, self.lora)
        return self.lora.init(key) if found is None else found

    def save(self, trained: Any, given: Any, directory: pathlib.Path) -> None:
        self._weights.save_adapter(trained, self.lora, given, directory)


def make_parts(weights: Weights, config: LoraConfig) -> Parts:
    """Raises UserError: the model lacks a matrix that `config` names."""
    return Adapter(weights, config) if config.rank else Everything(weights)
