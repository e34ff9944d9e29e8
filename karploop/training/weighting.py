"""What every objective does with the rows and tokens that do not count.

An array has one static shape, and what fills it up has weight 0. A weight of 0 alone does not keep
such an entry out: where its loss or its slope is infinite, 0 times that is not a number, in the
loss or in every gradient. So entries are replaced before anything is computed from them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def full(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 where it comes so; of integers and bools the same numbers."""
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def only(counted_X: jax.Array, x_X: jax.Array, otherwise: float = 0.0) -> jax.Array:
    """`full(x_X)`, and `otherwise` where it is not counted, whatever was there.

    No gradient goes to what is not counted.
    """
    return jnp.where(counted_X, full(x_X), otherwise)


def weighted_mean(x_X: jax.Array, weights_X: jax.Array, nothing: float = 0.0) -> jax.Array:
    """Σ weight · x / Σ weight over an array of any shape, and `nothing` where no weight is above 0.

    Args:
      x_X: numbers also where the weight is 0, as `only` makes them.
      weights_X: at least 0.
    """
    total = jnp.sum(weights_X)
    mean = jnp.sum(weights_X * x_X) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, mean, nothing)
