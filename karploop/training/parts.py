"""What of a model is trained: everything, or an adapter on frozen parameters.

Training holds two trees, one that is trained (and has an optimiser's state, and is donated from
step to step) and one that is frozen (and shared with sampling). A pure function puts them together
into what the model is applied to; the gradient is taken through it. That is all in which full
fine-tuning and adapters differ.

A reward model has a head besides, which is one more collection of the trained tree.
"""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from karploop.config import LoraConfig
from karploop.mesh import put, replicated, to_host
from karploop.models.lora import Lora, attach
from karploop.models.weights import Weights

HEAD = "reward"  # the collection: {"reward": {"weights": a vector as long as a hidden state}}


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

    def divide(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        """Both trees, of whole parameters that no stage wrote."""

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

    def divide(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        return params, ()

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

    def divide(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        return self.lora.init(key), params

    def save(self, trained: Any, given: Any, directory: pathlib.Path) -> None:
        self._weights.save_adapter(trained, self.lora, given, directory)


class WithHead:
    """Another division, and a reward head that is trained with it."""

    def __init__(self, weights: Weights, below: Parts):
        self._below, self._width = below, weights.model.config.width
        self._sharding = replicated(weights.mesh)
        head = {"weights": jax.ShapeDtypeStruct((self._width,), jnp.float32)}
        self.abstract = {**below.abstract, HEAD: head}
        self.shardings = {**below.shardings, HEAD: {"weights": self._sharding}}
        self.frozen_shardings = below.frozen_shardings

    def assemble(self, trained: Any, frozen: Any) -> Any:
        return {**self._below.assemble(without_head(trained), frozen), HEAD: trained[HEAD]}

    def frozen(self, given: Any) -> Any:
        return self._below.frozen(given)

    def begin(self, given: Any, key: jax.Array) -> Any:
        return self._crowned(self._below.begin(given, key))

    def divide(self, params: Any, key: jax.Array) -> tuple[Any, Any]:
        trained, frozen = self._below.divide(params, key)
        return self._crowned(trained), frozen

    def _crowned(self, trained: Any) -> Any:
        """What is trained below, with a head of zeros: at first every reward is 0."""
        zeros_E = put(np.zeros(self._width, np.float32), self._sharding)
        return {**trained, HEAD: {"weights": zeros_E}}

    def save(self, trained: Any, given: Any, directory: pathlib.Path) -> None:
        self._below.save(without_head(trained), given, directory)


def without_head(trained: Any) -> Any:
    """What is trained below a reward head."""
    return {name: tree for name, tree in trained.items() if name != HEAD}


def head_of(trained: Any) -> np.ndarray:
    """The reward head, weights_E on the host."""
    return to_host(trained[HEAD]["weights"])


def make_parts(weights: Weights, config: LoraConfig, head: bool = False) -> Parts:
    """Raises UserError: the model lacks a matrix that `config` names."""
    parts = Adapter(weights, config) if config.rank else Everything(weights)
    return WithHead(weights, parts) if head else parts
