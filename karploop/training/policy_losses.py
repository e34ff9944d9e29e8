"""Objectives of rewards: sampled tokens become likelier by their advantage.

    ratio = exp(log π − log π_sampler)   of each sampled token

Both are log-probabilities of the *unfiltered* distribution at temperature 1, which is what samples
are stored with. So the ratio says how far the policy has moved since it sampled, and is 1 before
the first step. Where tokens were drawn at another temperature or from a filtered distribution, they
come from neither of the two, and the gradient is that of such tokens: biased, and no ratio here
undoes it. Sampling at temperature 1 without filters has no such bias.

What a token counts for, `shares_T`, is settled once by `token_shares`; a loss is the sum of shares
times what each token loses. All arrays of tokens have one shape, here T; rows of a packed batch,
(B, L), do as well. Summed over the tokens of a completion first and with one entry for each, they
make the completion the action, as in arXiv 2402.14740.

    REINFORCE          no clipping; the first step after sampling, or `truncate`
    PPO, GRPO          clip_low = clip_high (arXiv 1707.06347, eq. 7; 2402.03300, eq. 3)
    DAPO               clip_high > clip_low, shares by token (arXiv 2503.14476, eqs. 10, 12)
    Dr. GRPO           shares by a constant (arXiv 2503.20783)
    CISPO              `truncate` (arXiv 2506.13585)

Left out: value functions, a second bound for negative advantages, and rewards for entropy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.errors import UserError
from karploop.training.weighting import full, only, weighted_mean

AGGREGATES = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
_STEEPEST = 20.0  # the largest logarithm of a ratio; in float32 exp overflows at 88


class PolicyMetrics(NamedTuple):
    """Means over tokens with a share above 0, each the same; float32, NaN where there is none."""

    clipped: jax.Array  # share of tokens that clipping kept from moving further
    ratio: jax.Array
    kl_sampler: jax.Array  # KL(sampler ‖ policy), nats a token: how far these steps have moved
    kl_reference: jax.Array | None  # KL(policy ‖ reference), nats a token, by `kl_estimator`
    surprise: jax.Array  # −log π, nats: the entropy, where tokens were drawn from π unfiltered


def token_shares(
    wanted_T: jax.Array,
    sequences_T: jax.Array,
    sequences: int,
    aggregate: str,
    constant: float | None = None,
) -> jax.Array:
    """What each token of a batch counts for, shares_T in float32; 0 where it is not wanted.

    Args:
      wanted_T: bool (or 0 and 1); tokens of completions that have an advantage.
      sequences_T: int, the completion that each token belongs to, 0 … sequences − 1; anything in
        that range where it is not wanted.
      sequences: the most completions that a batch has (static).
      aggregate: 'token': all tokens count the same, so that long completions count for more
        (arXiv 2503.14476, eq. 12). 'sequence': all completions count the same, and their tokens
        within them (arXiv 2402.03300, eq. 3). 'constant': each token counts for 1/constant, so
        that a token's part depends on no other (arXiv 2503.20783).
      constant: for 'constant' alone, more than 0: the number of completions times the longest
        allowed, say.

    Raises:
      UserError: there is no such aggregate, or no constant for it.
    """
    wanted_T, sequences_T = full(wanted_T), jnp.asarray(sequences_T)
    if aggregate == "token":
        return wanted_T / jnp.maximum(wanted_T.sum(), 1.0)
    if aggregate == "sequence":
        lengths_S = jax.ops.segment_sum(wanted_T.ravel(), sequences_T.ravel(), sequences)
        present = jnp.maximum(jnp.sum(lengths_S > 0).astype(wanted_T.dtype), 1.0)
        return wanted_T / (jnp.maximum(lengths_S, 1.0)[sequences_T] * present)
    if aggregate == "constant":
        if constant is None or constant <= 0:
            raise UserError(f"aggregate 'constant' has the constant {constant}: give one above 0")
        return wanted_T / constant
    raise UserError(f"there is no aggregate '{aggregate}': it is one of {', '.join(AGGREGATES)}")


def kl_estimates(logprobs_T: jax.Array, reference_T: jax.Array, estimator: str) -> jax.Array:
    """Estimates of KL(policy ‖ reference) in nats, one from each token that the policy sampled.

    With r = π_ref / π (J. Schulman, Approximating KL divergence, 2020):

      k1   −log r          unbiased; as a loss its gradient is 0 in expectation
      k2   (log r)² / 2    biased; as a loss its gradient is that of the divergence
      k3   r − 1 − log r   unbiased and never negative (arXiv 2402.03300, eq. 4); as a loss its
                           gradient is that of the other direction, KL(reference ‖ policy)

    The gradients are those for tokens from the policy itself. k3 takes log r for at most 20, where
    its slope would be e²⁰.

    Raises:
      UserError: there is no such estimator.
    """
    log_r_T = full(reference_T) - full(logprobs_T)
    if estimator == "k1":
        return -log_r_T
    if estimator == "k2":
        return 0.5 * jnp.square(log_r_T)
    if estimator == "k3":
        log_r_T = jnp.minimum(log_r_T, _STEEPEST)
        return jnp.expm1(log_r_T) - log_r_T
    raise UserError(f"there is no estimator '{estimator}': it is one of {', '.join(KL_ESTIMATORS)}")


def policy_loss(
    logprobs_T: jax.Array,
    sampler_logprobs_T: jax.Array,
    advantages_T: jax.Array,
    shares_T: jax.Array,
    *,
    clip_low: float = math.inf,
    clip_high: float = math.inf,
    truncate: float | None = None,
    reference_T: jax.Array | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[jax.Array, PolicyMetrics]:
    """Σ share · (−min(ratio · A, clip(ratio, 1 − clip_low, 1 + clip_high) · A) + coefficient · KL).

    Args:
      logprobs_T: of the sampled tokens by the policy, from which the gradient flows.
      sampler_logprobs_T: by the parameters that sampled them.
      advantages_T: A, of each token; of a completion the same for all its tokens.
      shares_T: as `token_shares` gives them; where they are 0, nothing else is read.
      clip_low, clip_high: how far below and above 1 a ratio is rewarded for moving; inf: any far,
        which at ratios of 1 is REINFORCE.
      truncate: instead of clipping, −sg(min(ratio, truncate)) · A · log π: every token keeps a
        gradient, and none counts for more than so many (truncated importance sampling).
      reference_T: log-probabilities by the model that is not to be left.
      kl_coefficient: of the divergence from it, a term of the loss by token.
      kl_estimator: as in `kl_estimates`.

    Returns:
      The loss, a scalar (0, with gradients of 0, where no token has a share), and metrics. Ratios
      are held between e⁻²⁰ and e²⁰.

    Raises:
      UserError: `truncate` with clipping; a divergence without reference, or by k1, from which
        nothing would be learnt (`advantages.penalised` has it as a part of the reward).
    """
    _check(clip_low, clip_high, truncate, reference_T, kl_coefficient, kl_estimator)
    shares_T = full(shares_T)
    counted_T = shares_T > 0
    logprobs_T, sampler_logprobs_T, advantages_T = (
        only(counted_T, x_T) for x_T in (logprobs_T, sampler_logprobs_T, advantages_T)
    )
    log_ratio_T = jnp.clip(logprobs_T - sampler_logprobs_T, -_STEEPEST, _STEEPEST)
    ratio_T = jnp.exp(log_ratio_T)
    if truncate is None:
        near_T = jnp.clip(ratio_T, 1 - clip_low, 1 + clip_high)
        losses_T = -jnp.minimum(ratio_T * advantages_T, near_T * advantages_T)
        clipped_T = ratio_T * advantages_T > near_T * advantages_T
    else:
        weights_T = jax.lax.stop_gradient(jnp.minimum(ratio_T, truncate))
        losses_T = -weights_T * advantages_T * logprobs_T
        clipped_T = ratio_T > truncate
    kl_T = None
    if reference_T is not None:
        kl_T = kl_estimates(logprobs_T, only(counted_T, reference_T), kl_estimator)
        if kl_coefficient:
            losses_T += kl_coefficient * kl_T
    seen_T = counted_T.astype(shares_T.dtype)
    clipped_T = clipped_T.astype(shares_T.dtype)
    wanted = (clipped_T, ratio_T, jnp.expm1(log_ratio_T) - log_ratio_T, kl_T, -logprobs_T)
    means = (None if x is None else weighted_mean(x, seen_T, jnp.nan) for x in wanted)
    return jnp.sum(shares_T * losses_T), PolicyMetrics(*means)


def _check(clip_low, clip_high, truncate, reference_T, kl_coefficient, kl_estimator) -> None:
    if truncate is not None and not (math.isinf(clip_low) and math.isinf(clip_high)):
        raise UserError(
            f"ratios are truncated at {truncate} and clipped (clip_low {clip_low}, clip_high "
            f"{clip_high}): choose one of the two"
        )
    if kl_coefficient and reference_T is None:
        raise UserError(
            f"the divergence counts {kl_coefficient} and there is no reference: name one, or set "
            "the coefficient to 0"
        )
    if kl_coefficient and kl_estimator == "k1":
        raise UserError(
            "the divergence by k1 has a gradient of 0 in expectation as a term of the loss: take "
            "k2 or k3, or make it a part of the reward"
        )
