"""The compiled training step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from karploop.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from karploop.mesh import batch_sharding, put, replicated, to_host
from karploop.models.decoder import Decoder, packed_mask
from karploop.models.likelihood import token_logprobs
from karploop.models.weights import Weights
from karploop.training.accumulation import Read, accumulated, joined, split
from karploop.training.objectives import Objective, make_objective
from karploop.training.optimizer import make_optimizer
from karploop.training.packing import Batch
from karploop.training.parts import make_parts


class TrainState(NamedTuple):
    params: Any  # what is trained: all parameters, or an adapter
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, over its batch."""

    loss: jax.Array  # of the objective; supervised, mean negative log-likelihood, nats a token
    accuracy: jax.Array  # weighted share of targets whose most probable prediction is right
    grad_norm: jax.Array  # global norm before clipping
    more: dict[str, jax.Array]  # of the objective; NaN where there was nothing to measure


def target_logprobs(model: Decoder, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the most probable token; see
    `token_logprobs`."""
    hidden_BxLxE, _ = model.apply(
        params, batch.tokens_BxL, packed_mask(batch.segments_BxL), batch.positions_BxL
    )
    return token_logprobs(model, params, hidden_BxLxE, batch.targets_BxL, batch.weights_BxL > 0)


def measure(
    model: Decoder, objective: Objective, params: Any, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """The objective's loss; token accuracy, and what else the objective reports."""
    return judged(objective, *target_logprobs(model, params, batch), batch)


def judged(objective: Objective, logprobs_BxL: jax.Array, right_BxL: jax.Array, batch: Batch):
    """What `measure` gives, of targets that have been read."""
    loss, more = objective.loss(logprobs_BxL, batch)
    count = jnp.maximum(batch.weights_BxL.sum(), 1.0)
    return loss, (jnp.sum(batch.weights_BxL, where=right_BxL) / count, more)


def differentiate(read: Read, objective: Objective, trained: Any, batch: Batch, accumulation: int):
    """What `measure` gives, and its gradient by `trained`; arguments as in `accumulated`."""
    if accumulation == 1:
        measured = lambda trained: judged(objective, *read(trained, batch), batch)  # noqa: E731
        return jax.value_and_grad(measured, has_aux=True)(trained)
    grads, found = accumulated(read, objective, trained, batch)
    return judged(objective, *found, joined(batch)), grads


_OFF, _SFT = LoraConfig(), make_objective(ObjectiveConfig(), longest=1)


class Trainer:
    """Optimiser state and the jitted step of one optimiser and objective over one architecture.

    All `jax.jit` calls of training stand here, with their shardings and what they donate: the
    state, which holds what is trained. What is frozen is an argument of every step and is not.
    """

    def __init__(
        self,
        weights: Weights,
        config: OptimizerConfig,
        lora: LoraConfig = _OFF,
        objective: Objective = _SFT,
        accumulation: int = 1,
    ):
        """`accumulation`: parts in which a step takes its batch, which was packed in as many.

        Raises UserError: the model lacks a matrix that `lora` names.
        """
        self.weights, self.mesh, self.objective = weights, weights.mesh, objective
        self.parts = parts = make_parts(weights, lora)
        whole, rows = replicated(self.mesh), batch_sharding(self.mesh)
        model = weights.model.clone(rows=rows if self.mesh.size > 1 else None)
        optimizer = make_optimizer(config)
        self._accumulation = accumulation
        self._batch_shardings = Batch(*([rows] * 6), by_token=rows, by_text=whole)
        split_rows = batch_sharding(self.mesh, axis=1) if accumulation > 1 else rows
        self._step_shardings = Batch(*([split_rows] * 6), by_token=split_rows, by_text=whole)
        abstract = jax.eval_shape(optimizer.init, parts.abstract)
        opt_shardings = _follow(abstract, parts.shardings, whole)
        self.shardings = TrainState(parts.shardings, opt_shardings)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            TrainState(parts.abstract, abstract),
            self.shardings,
        )

        def step(state: TrainState, frozen: Any, batch: Batch, rate: jax.Array):
            def read(trained, rows):
                return target_logprobs(model, parts.assemble(trained, frozen), rows)

            (loss, (accuracy, more)), grads = differentiate(
                read, objective, state.params, batch, accumulation
            )
            with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
            metrics = Metrics(loss, accuracy, optax.tree.norm(grads), more)
            return TrainState(params, opt_state), metrics

        self._step = jax.jit(
            step,
            in_shardings=(self.shardings, parts.frozen_shardings, self._step_shardings, whole),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._init_opt = jax.jit(optimizer.init, out_shardings=opt_shardings)
        self._logprobs = jax.jit(
            lambda params, batch: target_logprobs(model, params, batch)[0],
            in_shardings=(weights.shardings, self._batch_shardings),
            out_shardings=whole,
        )

    def start(self, trained: Any) -> TrainState:
        """Fresh optimiser state around what is trained, which the first step donates."""
        return TrainState(trained, self._init_opt(trained))

    def step(
        self, state: TrainState, batch: Batch, rate: float, frozen: Any = ()
    ) -> tuple[TrainState, Metrics]:
        """One update; `state` is donated. Returns before the device has finished.

        Args:
          frozen: as `parts.frozen` gives it; nothing where all parameters are trained.
        """
        if self._accumulation > 1:
            batch = split(batch, self._accumulation)
        return self._step(state, frozen, _put(batch, self._step_shardings), jnp.float32(rate))

    def logprobs(self, params: Any, batch: Batch) -> np.ndarray:
        """What whole parameters say of a batch's targets, logprobs_BxL, as a step would see it."""
        return to_host(self._logprobs(params, _put(batch, self._batch_shardings)))


def _put(batch: Batch, shardings: Batch) -> Batch:
    def laid(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(lambda array: put(array, sharding), part)

    return Batch(*map(laid, shardings, batch))


def _follow(opt_state: Any, shardings: Any, otherwise: NamedSharding) -> Any:
    """Shardings of an optimiser's state: a moment lies where its parameter lies.

    A moment is known by its path, which ends in its parameter's path whatever optax wraps around.
    """
    by_path = [
        (jax.tree_util.keystr(path), sharding)
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    ]

    def find(path, leaf):
        name = jax.tree_util.keystr(path)
        return next((s for suffix, s in by_path if name.endswith(suffix)), otherwise)

    return jax.tree_util.tree_map_with_path(find, opt_state)
