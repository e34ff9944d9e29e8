"""The compiled training step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from karploop.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from karploop.mesh import batch_sharding, laid_out, put, replicated, to_host
from karploop.models.decoder import Decoder, packed_mask
from karploop.models.likelihood import token_logprobs
from karploop.models.weights import Weights
from karploop.training.accumulation import Found, Look, accumulated, joined, split
from karploop.training.distillation import Read, token_divergences
from karploop.training.objectives import DIVERGENCES, REWARDS, Objective, make_objective
from karploop.training.optimizer import make_optimizer
from karploop.training.packing import Batch
from karploop.training.parts import HEAD, make_parts, without_head


class TrainState(NamedTuple):
    params: Any  # what is trained: all parameters, or an adapter
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, over its batch."""

    loss: jax.Array  # of the objective; supervised, mean negative log-likelihood, nats a token
    # Weighted share of targets whose most probable prediction is right; of rewards, as there.
    accuracy: jax.Array
    grad_norm: jax.Array  # global norm before clipping
    more: dict[str, jax.Array]  # of the objective; NaN where there was nothing to measure


def read(model: Decoder, params: Any, batch: Batch) -> Read:
    """A model's hidden states of a batch."""
    hidden_BxLxE, _ = model.apply(params, batch.tokens_BxL, _mask(batch), batch.positions_BxL)
    return Read(model, params, hidden_BxLxE)


def _mask(batch: Batch) -> jax.Array:
    return packed_mask(batch.segments_BxL, batch.branches_BxL)


def target_logprobs(model: Decoder, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the most probable token; see
    `token_logprobs`."""
    given = read(model, params, batch)
    return token_logprobs(*given, batch.targets_BxL, batch.weights_BxL > 0)


def target_divergences(
    model: Decoder, params: Any, batch: Batch, teacher: tuple[Decoder, Any], config: ObjectiveConfig
) -> tuple[jax.Array, jax.Array]:
    """How far the model is from the teacher before each target, and as in `target_logprobs`; see
    `token_divergences`."""
    return token_divergences(
        read(model, params, batch),
        read(*teacher, batch),
        batch.targets_BxL,
        batch.weights_BxL > 0,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.temperature,
    )


def text_rewards(model: Decoder, params: Any, batch: Batch) -> jax.Array:
    """The reward of each of a batch's texts, rewards_T by place; 0 where there is none.

    A text's one target stands at its last token, and its reward is the product of the hidden state
    there with the head. All positions have that product and one of them is taken, for one vector is
    less work than to move hidden states. No token is predicted.
    """
    hidden_BxLxE, _ = model.apply(
        without_head(params), batch.tokens_BxL, _mask(batch), batch.positions_BxL
    )
    # A sum of products in float32, which no accelerator rounds as it does a matrix product.
    head_1x1xE = params[HEAD]["weights"][None, None]
    rewards_BxL = jnp.sum(hidden_BxLxE.astype(jnp.float32) * head_1x1xE, axis=-1)
    taken_BxL = jnp.where(batch.weights_BxL > 0, rewards_BxL, 0.0)
    count = len(batch.by_text["present"])
    return jax.ops.segment_sum(taken_BxL.ravel(), batch.places_BxL.ravel(), count)


def look(
    model: Decoder,
    objective: Objective,
    params: Any,
    batch: Batch,
    teacher: tuple[Decoder, Any] | None = None,
) -> Found:
    """What the objective reads of a batch; and of targets, whether they are the most probable.

    Args:
      teacher: its decoder and parameters, for objectives that read divergences from it.
    """
    if objective.reads == REWARDS:
        return (text_rewards(model, params, batch),)
    if objective.reads == DIVERGENCES:
        return target_divergences(model, params, batch, teacher, objective.config)
    return target_logprobs(model, params, batch)


def judged(
    objective: Objective, found: Found, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """The objective's loss; accuracy, and what else the objective reports.

    Args:
      found: as `look` gives it.
    """
    read, *right_BxL = found
    loss, more = objective.loss(read, batch)
    if not right_BxL:
        return loss, (more["reward/accuracy"], more)
    count = jnp.maximum(batch.weights_BxL.sum(), 1.0)
    return loss, (jnp.sum(batch.weights_BxL, where=right_BxL[0]) / count, more)


def measure(model: Decoder, objective: Objective, params: Any, batch: Batch, teacher=None):
    """`judged` on what `look` finds."""
    return judged(objective, look(model, objective, params, batch, teacher), batch)


def differentiate(looked: Look, objective: Objective, trained: Any, batch: Batch, parts: int):
    """What `judged` gives, and its gradient by `trained`; arguments as in `accumulated`."""
    if parts == 1:
        measured = lambda trained: judged(objective, looked(trained, batch), batch)  # noqa: E731
        return jax.value_and_grad(measured, has_aux=True)(trained)
    grads, found = accumulated(looked, objective, trained, batch)
    return judged(objective, found, joined(batch)), grads


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
        teacher: Weights | None = None,
        accumulation: int = 1,
    ):
        """Args:
          teacher: its architecture on the same mesh, where the objective learns from one.
          accumulation: parts in which a step takes its batch, which was packed in as many.

        Raises:
          UserError: the model lacks a matrix that `lora` names.
        """
        self.weights, self.mesh, self.objective = weights, weights.mesh, objective
        self.parts = parts = make_parts(weights, lora, head=objective.reads == REWARDS)
        whole, rows = replicated(self.mesh), batch_sharding(self.mesh)
        model = weights.model.clone(rows=rows if self.mesh.size > 1 else None)
        optimizer = make_optimizer(config)
        self._accumulation = accumulation
        self._batch_shardings = Batch(*([rows] * 7), by_token=rows, by_text=whole)
        split_rows = batch_sharding(self.mesh, axis=1) if accumulation > 1 else rows
        self._step_shardings = Batch(*([split_rows] * 7), by_token=split_rows, by_text=whole)
        abstract = jax.eval_shape(optimizer.init, parts.abstract)
        opt_shardings = _follow(abstract, parts.shardings, whole)
        self.shardings = TrainState(parts.shardings, opt_shardings)
        self.abstract = laid_out(TrainState(parts.abstract, abstract), self.shardings)

        compared = teacher if objective.reads == DIVERGENCES else None
        # Of what a step reads and does not change.
        self._beside = (
            weights.abstract if lora.rank else (),
            compared.abstract if compared else (),
        )

        def step(state: TrainState, frozen: Any, taught: Any, batch: Batch, rate: jax.Array):
            beside = (compared.model, taught) if compared else None

            def looked(trained, rows):
                return look(model, objective, parts.assemble(trained, frozen), rows, beside)

            (loss, (accuracy, more)), grads = differentiate(
                looked, objective, state.params, batch, accumulation
            )
            with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
            metrics = Metrics(loss, accuracy, optax.tree.norm(grads), more)
            return TrainState(params, opt_state), metrics

        given = (parts.frozen_shardings, compared.shardings if compared else ())
        self._step = jax.jit(
            step,
            in_shardings=(self.shardings, *given, self._step_shardings, whole),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        self._init_opt = jax.jit(optimizer.init, out_shardings=opt_shardings)

        def reader(of: Weights):
            return jax.jit(
                lambda params, batch: target_logprobs(of.model, params, batch)[0],
                in_shardings=(of.shardings, self._batch_shardings),
                out_shardings=whole,
            )

        self._logprobs = reader(weights)
        self._teachers = reader(teacher) if teacher else None
        self._rewards = jax.jit(
            lambda trained, frozen, batch: text_rewards(
                model, parts.assemble(trained, frozen), batch
            ),
            in_shardings=(parts.shardings, parts.frozen_shardings, self._batch_shardings),
            out_shardings=whole,
        )

    def start(self, trained: Any) -> TrainState:
        """Fresh optimiser state around what is trained, which the first step donates."""
        return TrainState(trained, self._init_opt(trained))

    def step(
        self, state: TrainState, batch: Batch, rate: float, frozen: Any = (), taught: Any = ()
    ) -> tuple[TrainState, Metrics]:
        """One update; `state` is donated. Returns before the device has finished.

        Args:
          frozen: as `parts.frozen` gives it; nothing where all parameters are trained.
          taught: the teacher's parameters, where the objective reads divergences from it.
        """
        if self._accumulation > 1:
            batch = split(batch, self._accumulation)
        on_mesh = _put(batch, self._step_shardings)
        return self._step(state, frozen, taught, on_mesh, jnp.float32(rate))

    def lower_step(self, batch: Batch) -> jax.stages.Lowered:
        """The program of `step`, from shapes alone: of a batch, none of which is read."""
        if self._accumulation > 1:
            batch = split(batch, self._accumulation)
        of_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        rate = jax.ShapeDtypeStruct((), np.float32)
        return self._step.lower(self.abstract, *self._beside, of_batch, rate)

    def logprobs(self, params: Any, batch: Batch) -> np.ndarray:
        """What whole parameters say of a batch's targets, logprobs_BxL, as a step would see it."""
        return to_host(self._logprobs(params, _put(batch, self._batch_shardings)))

    def teacher_logprobs(self, taught: Any, batch: Batch) -> np.ndarray:
        """The same of the teacher, by its own decoder."""
        return to_host(self._teachers(taught, _put(batch, self._batch_shardings)))

    def rewards(self, trained: Any, batch: Batch, frozen: Any = ()) -> np.ndarray:
        """What is trained, with a head, makes of a batch's texts: rewards_T, by place."""
        return to_host(self._rewards(trained, frozen, _put(batch, self._batch_shardings)))


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
