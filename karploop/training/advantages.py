"""How much better a sample is than others of its prompt, from rewards; on the host, in float64.

The samples of one prompt are a group, and each is compared with its group: no second model says
what was to be expected.

    rloo     arXiv 2402.14740   reward − mean of the others
    grpo     arXiv 2402.03300   (reward − mean) / standard deviation
    dr_grpo  arXiv 2503.20783   reward − mean

The first and the last differ by the factor G / (G − 1), G samples in a group. `rloo` is unbiased.
Division by the standard deviation makes all prompts count alike, also those that are nearly always
or nearly never answered; `dr_grpo` leaves it out for that reason, and belongs with the constant
denominator of `policy_losses.token_shares`.

A reward that is missing is NaN. Its sample has weight 0 and no part in the others' statistics; so
has a sample whose group has no other reward, for there is nothing to compare it with. An advantage
of 0 with weight 1 is something else: the sample is as good as its group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from karploop.errors import UserError

NO_REWARD, ALONE, COMPARED = "no reward", "no other reward for its prompt", "compared"
_SMALLEST = 1e-4  # added to a standard deviation: rewards that differ by rounding differ by nothing


class Advantages(NamedTuple):
    """Of S samples, in their order."""

    values_S: np.ndarray  # float32; 0 where the weight is 0
    weights_S: np.ndarray  # float32, 1 where there is an advantage, else 0
    reasons: list[str]  # NO_REWARD, ALONE or COMPARED


def rloo(rewards_S: np.ndarray, groups_S: np.ndarray) -> Advantages:
    """Leave-one-out: the reward minus the mean of the other rewards of its group (2402.14740).

    A sample's own reward is no part of its baseline, so that the baseline changes no expectation.

    Args:
      rewards_S: NaN where missing.
      groups_S: integers, the same for samples of one prompt; in any order.

    Raises:
      UserError: a reward is infinite.
    """
    return _compare(rewards_S, groups_S, lambda x_G: x_G * (len(x_G) / (len(x_G) - 1)))


def grpo(rewards_S: np.ndarray, groups_S: np.ndarray) -> Advantages:
    """Group-normalised: (reward − mean) / (standard deviation + 1e-4) (2402.03300, section 4.1.2).

    The deviation is that of a sample, with G − 1 below; 1e-4 is not in the paper, and keeps rewards
    that differ by rounding from being told apart. A group of equal rewards has advantages of 0.
    Arguments and errors as of `rloo`.
    """
    return _compare(rewards_S, groups_S, lambda x_G: x_G / (x_G.std(ddof=1) + _SMALLEST))


def dr_grpo(rewards_S: np.ndarray, groups_S: np.ndarray) -> Advantages:
    """The reward minus its group's mean, and no more (2503.20783). As `rloo` otherwise."""
    return _compare(rewards_S, groups_S, lambda x_G: x_G)


def penalised(
    rewards_S: np.ndarray, logprobs_S: np.ndarray, reference_S: np.ndarray, coefficient: float
) -> np.ndarray:
    """Rewards less what it cost to leave the reference: reward − coefficient · (log π − log π_ref).

    The divergence as part of the reward (2402.14740, after 2203.02155), estimated from the sample
    itself: k1 of `policy_losses.kl_estimates`, summed over its tokens.

    Args:
      rewards_S: NaN where missing, and so in the result.
      logprobs_S, reference_S: of whole completions by the model that drew them and the reference,
        nats, unfiltered and at temperature 1.

    Returns:
      float64.
    """
    rewards_S, logprobs_S, reference_S = (
        np.asarray(x, np.float64) for x in (rewards_S, logprobs_S, reference_S)
    )
    return rewards_S - coefficient * (logprobs_S - reference_S)


def _compare(
    rewards_S: np.ndarray, groups_S: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]
) -> Advantages:
    """`scale` sees the rewards of one group, at least two, less their mean."""
    rewards_S, groups_S = np.asarray(rewards_S, np.float64), np.asarray(groups_S)
    infinite = np.flatnonzero(np.isinf(rewards_S))
    if len(infinite):
        raise UserError(
            f"the reward of sample {infinite[0]} is {rewards_S[infinite[0]]}: a reward is a finite "
            "number, and one that is missing is NaN; mend the judge or verifier that gave it"
        )
    values_S = np.zeros(len(rewards_S), np.float32)
    present_S = ~np.isnan(rewards_S)
    reasons_S = np.where(present_S, ALONE, NO_REWARD).astype(object)
    order = np.argsort(groups_S, kind="stable")
    order = order[present_S[order]]
    for members in np.split(order, np.flatnonzero(np.diff(groups_S[order])) + 1):
        if len(members) < 2:
            continue
        reasons_S[members] = COMPARED
        rewards_G = rewards_S[members]
        if rewards_G.min() < rewards_G.max():  # else the mean's rounding would be all there is
            values_S[members] = scale(rewards_G - rewards_G.mean())
    weights_S = (reasons_S == COMPARED).astype(np.float32)
    return Advantages(values_S, weights_S, reasons_S.tolist())
