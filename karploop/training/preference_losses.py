"""Objectives of preferences: of two completions of one prompt the better becomes the likelier.

All of them read log-probabilities of whole completions and nothing else. A completion's
log-probability is the sum over its tokens, its stop token included and its prompt not, in nats, of
the unfiltered distribution at temperature 1. What a model is rewarded for implicitly, in its own
unit for each objective, is reported beside the loss.

    objective  source                 reward of a completion             reference
    dpo        arXiv 2305.18290       β · (log π − log π_ref)            yes
    ipo        arXiv 2310.12036       the same, or that by token         yes
    simpo      arXiv 2405.14734       β · log π / length                 no
    orpo       arXiv 2403.07691       log odds of the mean token         no

Left out: weights by how likely the pair itself was, other divergences than the reverse one, and
more than two completions at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from karploop.training.weighting import full, only, weighted_mean

_NEVER_SURE = -1e-6  # the largest mean log-probability whose odds float32 can tell from infinity


class PairLogprobs(NamedTuple):
    """What the model under training says of the P pairs of a batch."""

    chosen_P: jax.Array  # log-probability of the better completion, nats
    rejected_P: jax.Array  # of the worse one
    chosen_lengths_P: jax.Array  # tokens in these sums
    rejected_lengths_P: jax.Array
    weights_P: jax.Array  # of each pair, at least 0; 0 on padding, where nothing else is read


class PreferenceMetrics(NamedTuple):
    """Weighted means over pairs, float32; NaN where no pair has weight."""

    accuracy: jax.Array  # share of pairs whose better completion has the larger reward; a tie is ½
    margin: jax.Array  # reward of the better completion minus that of the worse one
    chosen: jax.Array  # reward of the better completion
    rejected: jax.Array  # of the worse one


def dpo(
    pairs: PairLogprobs,
    reference_chosen_P: jax.Array,
    reference_rejected_P: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft: float = 0.0,
) -> tuple[jax.Array, PreferenceMetrics]:
    """Direct preference optimisation: weighted mean of −log σ(margin) (arXiv 2305.18290, eq. 7).

    Args:
      reference_chosen_P, reference_rejected_P: log-probabilities of the same completions by the
        model that is not to be left, which is not trained here.
      beta: of the rewards; the larger, the closer the policy stays to the reference.
      label_smoothing: the probability ε that a preference is the wrong way round, below ½. The loss
        is then (1 − ε) · −log σ(margin) + ε · −log σ(−margin): conservative DPO (E. Mitchell, A
        note on DPO with noisy preferences and relationship to IPO, 2023).
      sft: weight of a second term, the negative log-likelihood of the better completion, mean over
        its tokens, which may otherwise become less likely together with the worse one (arXiv
        2404.19733, eq. 1, where the weight stands at the first term instead).

    Returns:
      The loss, a scalar, and metrics. 0, with gradients of 0, where no pair has weight.
    """
    counted_P, weights_P = _weights(pairs)
    chosen_P = beta * (only(counted_P, pairs.chosen_P) - only(counted_P, reference_chosen_P))
    rejected_P = beta * (only(counted_P, pairs.rejected_P) - only(counted_P, reference_rejected_P))
    margin_P = chosen_P - rejected_P
    losses_P = _logistic(margin_P, label_smoothing)
    if sft:
        losses_P -= sft * _by_token(counted_P, pairs.chosen_P, pairs.chosen_lengths_P)
    return weighted_mean(losses_P, weights_P), _metrics(chosen_P, rejected_P, weights_P)


def ipo(
    pairs: PairLogprobs,
    reference_chosen_P: jax.Array,
    reference_rejected_P: jax.Array,
    *,
    beta: float,
    by_token: bool,
) -> tuple[jax.Array, PreferenceMetrics]:
    """Identity preference optimisation (arXiv 2310.12036, eq. 17), weighted mean over pairs.

    (log-ratio of the better − log-ratio of the worse − 1/(2β))², where a log-ratio is log π −
    log π_ref. Unlike DPO's it has a minimum at a finite margin, also for pairs that always agree.

    Args:
      beta: the τ of the paper.
      by_token: whether a log-ratio is divided by its completion's length. The equation has sums,
        for which the margin 1/(2β) is in nats a completion, whatever its length; with it, which is
        what other trainers do, it is in nats a token.

    Returns:
      The loss, a scalar, and metrics; rewards are β times the log-ratios that the loss reads.
    """
    counted_P, weights_P = _weights(pairs)
    chosen_P = only(counted_P, pairs.chosen_P) - only(counted_P, reference_chosen_P)
    rejected_P = only(counted_P, pairs.rejected_P) - only(counted_P, reference_rejected_P)
    if by_token:
        chosen_P /= only(counted_P, pairs.chosen_lengths_P, 1.0)
        rejected_P /= only(counted_P, pairs.rejected_lengths_P, 1.0)
    losses_P = jnp.square(chosen_P - rejected_P - 1 / (2 * beta))
    metrics = _metrics(beta * chosen_P, beta * rejected_P, weights_P)
    return weighted_mean(losses_P, weights_P), metrics


def simpo(
    pairs: PairLogprobs, *, beta: float, margin: float
) -> tuple[jax.Array, PreferenceMetrics]:
    """Simple preference optimisation (arXiv 2405.14734, eq. 6), weighted mean over pairs.

    −log σ(reward of the better − reward of the worse − margin), a reward being β times the mean
    log-probability of a token. There is no reference, and nothing but the data and the number of
    steps holds the model back.

    Args:
      margin: the paper's γ, by which the better reward is to be larger; in units of the reward,
        not of the log-probability.
    """
    counted_P, weights_P = _weights(pairs)
    chosen_P = beta * _by_token(counted_P, pairs.chosen_P, pairs.chosen_lengths_P)
    rejected_P = beta * _by_token(counted_P, pairs.rejected_P, pairs.rejected_lengths_P)
    losses_P = _logistic(chosen_P - rejected_P - margin)
    return weighted_mean(losses_P, weights_P), _metrics(chosen_P, rejected_P, weights_P)


def orpo(pairs: PairLogprobs, *, odds_weight: float) -> tuple[jax.Array, PreferenceMetrics]:
    """Odds ratio preference optimisation (arXiv 2403.07691, eqs. 4, 6, 7), weighted over pairs.

    −log p + odds_weight · −log σ(log odds of the better − log odds of the worse). Here p is the
    geometric mean of a completion's token probabilities, odds are p / (1 − p), and the first term
    is that of supervised learning on the better completion, each pair counting the same.

    Args:
      odds_weight: the paper's λ.

    Returns:
      The loss, a scalar, and metrics; rewards are the log odds.
    """
    counted_P, weights_P = _weights(pairs)
    better_P = _by_token(counted_P, pairs.chosen_P, pairs.chosen_lengths_P, -1.0)
    worse_P = _by_token(counted_P, pairs.rejected_P, pairs.rejected_lengths_P, -1.0)
    chosen_P, rejected_P = _log_odds(better_P), _log_odds(worse_P)
    losses_P = odds_weight * _logistic(chosen_P - rejected_P) - better_P
    return weighted_mean(losses_P, weights_P), _metrics(chosen_P, rejected_P, weights_P)


def _weights(pairs: PairLogprobs) -> tuple[jax.Array, jax.Array]:
    weights_P = full(pairs.weights_P)
    return weights_P > 0, weights_P


def _by_token(counted_P, sums_P, lengths_P, otherwise: float = 0.0) -> jax.Array:
    """The mean over a completion's tokens; `otherwise` where the pair does not count."""
    return only(counted_P, sums_P, otherwise) / only(counted_P, lengths_P, 1.0)


def _logistic(margin_P: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    # softplus(−x) is −log σ(x) without the overflow.
    losses_P = jax.nn.softplus(-margin_P)
    if label_smoothing:
        losses_P = (1 - label_smoothing) * losses_P + label_smoothing * jax.nn.softplus(margin_P)
    return losses_P


def _log_odds(logprobs_P: jax.Array) -> jax.Array:
    """log p − log(1 − p), with p from its logarithm; finite where p is 1 to rounding."""
    logprobs_P = jnp.minimum(logprobs_P, _NEVER_SURE)
    return logprobs_P - jnp.log(-jnp.expm1(logprobs_P))


def _metrics(chosen_P, rejected_P, weights_P) -> PreferenceMetrics:
    margin_P = chosen_P - rejected_P
    wanted = (0.5 * (1 + jnp.sign(margin_P)), margin_P, chosen_P, rejected_P)
    return PreferenceMetrics(*(weighted_mean(x_P, weights_P, jnp.nan) for x_P in wanted))
