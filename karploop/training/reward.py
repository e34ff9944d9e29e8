"""The objective of reward models: of two replies the better one has the larger reward.

By Bradley and Terry's model the first of two is preferred with probability σ(r₁ − r₂), and a reward
model maximises the likelihood of the preferences that people (arXiv 1706.03741, 2009.01325,
2203.02155 eq. 1) or judges gave. Rewards go in, wherever they come from: a head on hidden states
that were computed once, or a whole model under training.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.training.weighting import weighted_mean


class RewardMetrics(NamedTuple):
    """Weighted means over pairs, float32; NaN where no pair has weight."""

    accuracy: jax.Array  # share of pairs whose better text has the larger reward; a tie is ½
    margin: jax.Array  # reward of the better text minus that of the worse one
    mean: jax.Array  # reward of both


def bradley_terry(
    chosen_N: jax.Array, rejected_N: jax.Array, weights_N: jax.Array, centring: float = 0.0
) -> jax.Array:
    """Weighted mean of −log σ(chosen − rejected) + centring · (chosen + rejected)², in nats.

    The likelihood does not change when all rewards move by a constant, and a model may drift along.
    The second term (arXiv 2312.09244) holds their mean near 0; 0.01 is enough for that.

    Args:
      chosen_N, rejected_N: rewards of the better and the worse of each pair.
      weights_N: of each pair, at least 0 and not all 0. With 1/K for each of the K pairs of a
        prompt, all prompts count the same, as in arXiv 2203.02155.

    Returns:
      float32, a scalar.
    """
    chosen_N, rejected_N, weights_N = (
        x.astype(jnp.float32) for x in (chosen_N, rejected_N, weights_N)
    )
    # softplus(−x) is −log σ(x) without the overflow.
    losses_N = jax.nn.softplus(rejected_N - chosen_N)
    losses_N += jnp.float32(centring) * jnp.square(chosen_N + rejected_N)
    return jnp.sum(weights_N * losses_N) / jnp.sum(weights_N)


def metrics_of_rewards(
    chosen_N: jax.Array, rejected_N: jax.Array, weights_N: jax.Array
) -> RewardMetrics:
    """What to report of pairs; arguments as of `bradley_terry`."""
    margin_N = chosen_N - rejected_N
    of_pairs = 0.5 + 0.5 * jnp.sign(margin_N), margin_N, 0.5 * (chosen_N + rejected_N)
    return RewardMetrics(*(weighted_mean(x_N, weights_N, jnp.nan) for x_N in of_pairs))
