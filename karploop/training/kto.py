"""Kahneman–Tversky optimisation: completions are good or bad by themselves, without a partner.

A completion is worth what it gains on a reference point, by a curve that flattens for gains and for
losses alike (arXiv 2402.01306, section 4). So a batch needs no pairs, and good and bad ones may be
of any number; what it does need is completions behind prompts that are not their own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.training.weighting import full, only, weighted_mean


class KtoMetrics(NamedTuple):
    """Weighted means, float32; NaN where there is nothing to take the mean of."""

    accuracy: jax.Array  # share of completions on the right side of the reference point; on it is ½
    margin: jax.Array  # mean reward of the good ones minus that of the bad ones
    desirable: jax.Array  # mean reward of the good ones
    undesirable: jax.Array  # of the bad ones


def kl_baseline(logprobs_M: jax.Array, reference_M: jax.Array, weights_M: jax.Array) -> jax.Array:
    """The reference point z₀: an estimate of KL(policy ‖ reference), nats, from mismatched pairs.

    max(0, weighted mean of log π − log π_ref) over completions put behind a prompt that they do not
    answer, such as the next one's of the batch. The estimate is biased, since they were not drawn
    from the policy, and it is that of the paper. No gradient goes through it.

    Args:
      logprobs_M, reference_M: summed log-probabilities of M such completions by both models.
      weights_M: at least 0; 0 on padding.

    Returns:
      float32, a scalar; 0 where no completion has weight.
    """
    weights_M = full(weights_M)
    counted_M = weights_M > 0
    ratios_M = only(counted_M, logprobs_M) - only(counted_M, reference_M)
    return jax.lax.stop_gradient(jnp.maximum(weighted_mean(ratios_M, weights_M), 0.0))


def kto(
    logprobs_N: jax.Array,
    reference_N: jax.Array,
    desirable_N: jax.Array,
    weights_N: jax.Array,
    baseline: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, KtoMetrics]:
    """Weighted mean of λ_D · (1 − σ(β(r − z₀))) of good and λ_U · (1 − σ(β(z₀ − r))) of bad ones.

    r is log π − log π_ref of a completion (arXiv 2402.01306, eq. 7).

    Args:
      logprobs_N: of N completions by the model under training: summed over tokens, the stop token
        included, in nats, unfiltered and at temperature 1.
      reference_N: of the same completions by the model that is not to be left.
      desirable_N: bool, whether a completion is a good one.
      weights_N: at least 0; 0 on padding, where nothing else is read.
      baseline: z₀, as `kl_baseline` gives it.
      desirable_weight, undesirable_weight: λ_D and λ_U. Where good and bad ones are unequally many,
        these times their numbers should be about equal.

    Returns:
      The loss, a scalar (0, with gradients of 0, where nothing has weight), and metrics; rewards
      are β · r.
    """
    weights_N = full(weights_N)
    counted_N = weights_N > 0
    ratios_N = only(counted_N, logprobs_N) - only(counted_N, reference_N)
    gained_N = beta * (ratios_N - baseline)
    sign_N = jnp.where(desirable_N, 1.0, -1.0).astype(ratios_N.dtype)
    lambda_N = jnp.where(desirable_N, desirable_weight, undesirable_weight).astype(ratios_N.dtype)
    # σ(−x) is 1 − σ(x) without the cancellation.
    loss = weighted_mean(lambda_N * jax.nn.sigmoid(-sign_N * gained_N), weights_N)
    desirable, undesirable = (
        weighted_mean(beta * ratios_N, jnp.where(desirable_N == good, weights_N, 0.0), jnp.nan)
        for good in (True, False)
    )
    right_N = 0.5 * (1 + jnp.sign(sign_N * gained_N))
    accuracy = weighted_mean(right_N, weights_N, jnp.nan)
    return loss, KtoMetrics(accuracy, desirable - undesirable, desirable, undesirable)
