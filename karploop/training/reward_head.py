"""A reward head trained on hidden states of a frozen model.

The problem is convex and its data are small, so that every step sees all of them: accelerated
gradient descent that begins anew whenever its momentum points uphill (arXiv 1204.3982), at a step
that the curvature allows. Neither an order of the data nor a learning rate decides the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from karploop.mesh import batch_parts, batch_sharding, put, replicated, to_host
from karploop.models.reward_head import RewardHead
from karploop.training.reward import bradley_terry

_POWER_STEPS = 30  # to estimate the curvature, which is within a few percent by then
_MARGIN = 1.1  # over that estimate, which is from below
_DEAD = 1e-6  # an entry that varies less than this, relative to the liveliest, is rounding


class Pairs(NamedTuple):
    """Hidden states of the better and the worse of N pairs, and the pairs' weights."""

    chosen_NxE: np.ndarray  # float32
    rejected_NxE: np.ndarray  # float32
    weights_N: np.ndarray  # float32, more than 0


@dataclass(frozen=True)
class Fitted:
    head: RewardHead
    loss: float  # `bradley_terry` on the pairs that it was trained on, without the penalty
    gradient: float  # norm at the end, of what is minimised; small where `steps` were enough


def fit_head(
    pairs: Pairs, *, l2: float, centring: float, steps: int, key: jax.Array, mesh: Mesh
) -> Fitted:
    """The head that minimises Bradley–Terry loss plus an L2 penalty.

    Entries are standardised by the mean and standard deviation of the pairs, which are folded into
    the head; its offset makes their mean reward 0. The penalty is that of a prior by which, at
    l2 = 1, rewards have a standard deviation of 1; it loses weight as there are more pairs:
    l2 · E/(2N) · |v|² for a head v on standardised entries, N the sum of the weights.

    Args:
      steps: of gradient descent; one program, whatever their number.
      key: of the vector from which the curvature is estimated.
    """
    mean_E, spread_E = _moments(pairs)
    live_E = spread_E > _DEAD * spread_E.max(initial=0.0)
    scale_E = np.where(live_E, 1 / np.where(live_E, spread_E, 1.0), 0.0)
    # The mesh splits the pairs evenly; those that fill up have no weight.
    padding = -len(pairs.weights_N) % batch_parts(mesh)
    chosen_NxE, rejected_NxE = (
        np.pad(((x - mean_E) * scale_E).astype(np.float32), ((0, padding), (0, 0)))
        for x in (pairs.chosen_NxE, pairs.rejected_NxE)
    )
    weights_N = np.pad(pairs.weights_N.astype(np.float32), (0, padding))
    rows = batch_sharding(mesh)
    on_device = (put(x, rows) for x in (chosen_NxE, rejected_NxE, weights_N))
    settings = jnp.float32(l2), jnp.float32(centring), key
    head_E, loss, gradient = to_host(_compiled(mesh)(*on_device, *settings, steps))
    weights_E = (head_E * scale_E).astype(np.float32)
    offset = -float(mean_E @ weights_E.astype(np.float64))
    return Fitted(RewardHead(weights_E, offset), float(loss), float(gradient))


@functools.cache
def _compiled(mesh: Mesh):
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.jit(
        _descend,
        static_argnums=6,
        in_shardings=(rows, rows, rows, whole, whole, whole),
        out_shardings=whole,
    )


def _moments(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each entry over all texts, in float64."""
    shares_N = pairs.weights_N.astype(np.float64) / (2 * pairs.weights_N.sum(dtype=np.float64))
    sides = (pairs.chosen_NxE, pairs.rejected_NxE)
    mean_E = sum(shares_N @ x for x in sides)
    return mean_E, np.sqrt(sum(shares_N @ np.square(x - mean_E) for x in sides))


def _descend(chosen_NxE, rejected_NxE, weights_N, l2, centring, key, steps: int):
    """The head on standardised entries (E), and its loss and gradient norm."""
    width, total = chosen_NxE.shape[1], weights_N.sum()
    ridge = l2 * width / total

    def rewards(head_E):  # in full float32, also where matrices are multiplied in less by default
        return (jnp.matmul(x, head_E, precision="highest") for x in (chosen_NxE, rejected_NxE))

    def objective(head_E):
        loss = bradley_terry(*rewards(head_E), weights_N, centring)
        return loss + 0.5 * ridge * jnp.vdot(head_E, head_E), loss

    def bend(head_E):
        """The product with a matrix that no Hessian of the objective exceeds: σ′ is at most ¼."""
        better_N, worse_N = rewards(head_E)
        apart_N, both_N = weights_N * (better_N - worse_N), weights_N * (better_N + worse_N)
        return ridge * head_E + sum(
            jnp.matmul(x_N, x_NxE, precision="highest") / total
            for x_N, x_NxE in (
                (0.25 * apart_N + 2 * centring * both_N, chosen_NxE),
                (-0.25 * apart_N + 2 * centring * both_N, rejected_NxE),
            )
        )

    def unit(x_E):
        return x_E / jnp.maximum(jnp.linalg.norm(x_E), jnp.finfo(jnp.float32).tiny)

    start_E = unit(jax.random.normal(key, (width,), jnp.float32))
    steepest_E = jax.lax.fori_loop(0, _POWER_STEPS, lambda _, x_E: unit(bend(x_E)), start_E)
    curvature = _MARGIN * jnp.linalg.norm(bend(steepest_E))
    rate = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1.0), 0.0)
    differentiate = jax.grad(objective, has_aux=True)

    def step(carry, _):
        head_E, ahead_E, pace = carry  # `ahead` is the head moved on by its momentum
        gradient_E, _ = differentiate(ahead_E)
        new_E = ahead_E - rate * gradient_E
        uphill = jnp.vdot(gradient_E, new_E - head_E) > 0
        pace = jnp.where(uphill, 1.0, pace)
        faster = 0.5 * (1 + jnp.sqrt(1 + 4 * pace * pace))
        momentum = jnp.where(uphill, 0.0, (pace - 1) / faster)
        return (new_E, new_E + momentum * (new_E - head_E), faster), None

    zero_E = jnp.zeros(width, jnp.float32)
    (head_E, _, _), _ = jax.lax.scan(step, (zero_E, zero_E, jnp.float32(1)), length=steps)
    gradient_E, loss = differentiate(head_E)
    return head_E, loss, jnp.linalg.norm(gradient_E)
