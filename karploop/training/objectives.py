"""What training minimises: from what is measured of a packed batch to a loss.

An objective sees one number of each target, its log-probability or how far the model is from a
teacher there, or the reward of each text, and what the batch carries beside them, and nothing of
the model. Which units it wants, and what each text must bring, is said beside its function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from karploop.config import ObjectiveConfig
from karploop.training.kto import KtoMetrics, kl_baseline, kto
from karploop.training.packing import Batch
from karploop.training.policy_losses import PolicyMetrics, policy_loss, token_shares
from karploop.training.preference_losses import (
    PairLogprobs,
    PreferenceMetrics,
    dpo,
    ipo,
    orpo,
    simpo,
)
from karploop.training.reward import RewardMetrics, bradley_terry, metrics_of_rewards
from karploop.training.weighting import weighted_mean

# What an objective learns from
EXAMPLES, PAIRS, LABELS, EPISODES = "examples", "pairs", "labels", "episodes"
# What it is told: a number of each target, or of each text
LOGPROBS, DIVERGENCES, REWARDS = "logprobs", "divergences", "rewards"
Measured = tuple[jax.Array, dict[str, jax.Array]]  # the loss, and means to report beside it


@dataclass(frozen=True)
class Objective:
    """A loss, and what it wants.

    Attributes:
      lesson: EXAMPLES, PAIRS (a better and a worse text each), LABELS (a good or a bad text each,
        and one that answers another prompt) or EPISODES (sampled tokens with their advantage).
      reference: "" or what is to be known of each text by the reference: its sum over targets
        ("text") or each of them ("token").
      measures: names of what is reported beside the loss.
      loss: from what the model is measured by and the batch.
      reads: LOGPROBS of each target (logprobs_BxL), DIVERGENCES of each from a teacher
        (divergences_BxL), or REWARDS of each text by its place (rewards_T), read at its last token.
      count: of a batch, what its loss is a mean over, such as the number of its pairs; None where
        the loss is not the mean of something that each text has by itself.
    """

    config: ObjectiveConfig
    lesson: str
    reference: str
    measures: tuple[str, ...]
    loss: Callable[[jax.Array, Batch], Measured]
    reads: str = LOGPROBS
    count: Callable[[Batch], jax.Array] | None = None


def make_objective(config: ObjectiveConfig, longest: int) -> Objective:
    """The objective called `config.name`.

    Args:
      longest: most tokens of a completion, by which `aggregate=constant` divides.
    """
    lesson, reference, measures, function = _OBJECTIVES[config.name]
    if lesson == EPISODES:
        function = functools.partial(function, longest=longest)
        reference = "token" if config.kl else ""
        unknown = {_KL: not reference, _KL_TEACHER: not config.taught}
        measures = tuple(name for name in measures if not unknown.get(name))
    reads = {"gkd": DIVERGENCES, "reward": REWARDS}.get(config.name, LOGPROBS)
    count = functools.partial(_COUNTS[lesson], config) if lesson in _COUNTS else None
    loss = functools.partial(function, config)
    return Objective(config, lesson, reference, measures, loss, reads, count)


def settings(config: ObjectiveConfig) -> dict[str, Any]:
    """What of the config decides what is learnt from given rows: the keys that its loss reads."""
    names = _KEYS.get(config.name, ())
    if config.name == "policy_gradient" and config.kl:
        names += ("kl", "kl_in", "kl_estimator", "reference")
    if config.name == "gkd" and config.divergence == "jsd":
        names += ("beta",)
    return {"name": config.name} | {name: getattr(config, name) for name in names}


def _sft(config: ObjectiveConfig, logprobs_BxL: jax.Array, batch: Batch) -> Measured:
    """Weighted mean cross-entropy of targets: all count the same, or all texts do."""
    count = jnp.maximum(batch.weights_BxL.sum(), 1.0)
    return -(logprobs_BxL * batch.weights_BxL).sum() / count, {}


def _gkd(config: ObjectiveConfig, divergences_BxL: jax.Array, batch: Batch) -> Measured:
    """Weighted mean divergence from the teacher, weighted as `_sft` is (arXiv 2306.13649, eq. 2).

    Whose texts these are, the paper's λ, is settled by the rows that are drawn.
    """
    count = jnp.maximum(batch.weights_BxL.sum(), 1.0)
    return (divergences_BxL * batch.weights_BxL).sum() / count, {}


class _Sums(NamedTuple):
    """Of the texts of a batch, by place."""

    logprobs_T: jax.Array
    lengths_T: jax.Array


def _sums(logprobs_BxL: jax.Array, batch: Batch) -> _Sums:
    """Log-probabilities of whole completions."""
    learnt_BxL = (batch.weights_BxL > 0).astype(jnp.float32)
    count = len(batch.by_text["present"])

    def by_text(x_BxL):
        return jax.ops.segment_sum(x_BxL.ravel(), batch.places_BxL.ravel(), count)

    return _Sums(by_text(logprobs_BxL * learnt_BxL), by_text(learnt_BxL))


def _preference(config: ObjectiveConfig, logprobs_BxL: jax.Array, batch: Batch) -> Measured:
    """The better text of a pair stands at an even place, the worse one behind it."""
    sums = _sums(logprobs_BxL, batch)
    (chosen_P, rejected_P), (chosen_lengths_P, rejected_lengths_P) = (
        (x_T[::2], x_T[1::2]) for x_T in sums
    )
    present_P = batch.by_text["present"][::2]
    pairs = PairLogprobs(chosen_P, rejected_P, chosen_lengths_P, rejected_lengths_P, present_P)
    if config.name == "simpo":
        loss, metrics = simpo(pairs, beta=config.beta, margin=config.margin)
    elif config.name == "orpo":
        loss, metrics = orpo(pairs, odds_weight=config.odds_weight)
    else:
        reference_T = batch.by_text["reference"]
        given = (pairs, reference_T[::2], reference_T[1::2])
        if config.name == "ipo":
            loss, metrics = ipo(*given, beta=config.beta, by_token=config.by_token)
        else:
            smoothing, sft = config.label_smoothing, config.sft
            loss, metrics = dpo(*given, beta=config.beta, label_smoothing=smoothing, sft=sft)
    return loss, dict(zip(_OF_PAIRS, metrics, strict=True))


def _kto(config: ObjectiveConfig, logprobs_BxL: jax.Array, batch: Batch) -> Measured:
    """A text stands at an even place, and behind it one that answers another prompt."""
    logprobs_T, reference_T = _sums(logprobs_BxL, batch).logprobs_T, batch.by_text["reference"]
    present_P = batch.by_text["present"][::2]
    loss, metrics = kto(
        logprobs_T[::2],
        reference_T[::2],
        batch.by_text["desirable"][::2] > 0,
        present_P,
        kl_baseline(logprobs_T[1::2], reference_T[1::2], present_P),
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    return loss, dict(zip(_OF_LABELS, metrics, strict=True))


def _policy_gradient(
    config: ObjectiveConfig, logprobs_BxL: jax.Array, batch: Batch, *, longest: int
) -> Measured:
    """Every target of an episode has an advantage."""
    present_T = batch.by_text["present"]
    wanted_BxL, constant = batch.weights_BxL > 0, None
    if config.aggregate == "constant":
        constant = float(longest)
    shares_BxL = token_shares(
        wanted_BxL, batch.places_BxL, len(present_T), config.aggregate, constant
    )
    if config.aggregate == "constant":  # of a mean over completions
        shares_BxL /= jnp.maximum(present_T.sum(), 1.0)
    advantages_BxL = batch.by_token["advantage"]
    loss, metrics = policy_loss(
        logprobs_BxL,
        batch.by_token["sampler"],
        advantages_BxL,
        shares_BxL,
        clip_low=config.clip_low or math.inf,
        clip_high=config.clip_high or math.inf,
        truncate=config.truncate or None,
        reference_T=batch.by_token.get("reference"),
        kl_coefficient=config.kl if config.kl_in == "loss" else 0.0,
        kl_estimator=config.kl_estimator,
    )
    found = dict(zip(_OF_EPISODES[:-1], metrics, strict=True))
    if config.taught:
        seen_BxL = wanted_BxL.astype(jnp.float32)
        found[_KL_TEACHER] = weighted_mean(-advantages_BxL, seen_BxL, jnp.nan)
    return loss, {name: value for name, value in found.items() if value is not None}


def _reward(config: ObjectiveConfig, rewards_T: jax.Array, batch: Batch) -> Measured:
    """The better text of a pair stands at an even place, the worse one behind it; `present` is the
    pair's weight."""
    given = rewards_T[::2], rewards_T[1::2], batch.by_text["present"][::2]
    found = dict(zip(_OF_REWARDS, metrics_of_rewards(*given), strict=True))
    return bradley_terry(*given, config.centring), found


def _count_targets(config: ObjectiveConfig, batch: Batch) -> jax.Array:
    return batch.weights_BxL.sum()


def _count_pairs(config: ObjectiveConfig, batch: Batch) -> jax.Array:
    return batch.by_text["present"][::2].sum()


def _count_episodes(config: ObjectiveConfig, batch: Batch) -> jax.Array:
    if config.aggregate == "token":
        return (batch.weights_BxL > 0).sum()
    return batch.by_text["present"].sum()


_OF_PAIRS = tuple(f"preference/{name}" for name in PreferenceMetrics._fields)
_OF_LABELS = tuple(f"labels/{name}" for name in KtoMetrics._fields)
_KL, _KL_TEACHER = "policy/kl_reference", "policy/kl_teacher"
_OF_EPISODES = (*(f"policy/{name}" for name in PolicyMetrics._fields), _KL_TEACHER)
_OF_REWARDS = tuple(f"reward/{name}" for name in RewardMetrics._fields)
_OBJECTIVES = {
    "sft": (EXAMPLES, "", (), _sft),
    "gkd": (EXAMPLES, "", (), _gkd),
    "dpo": (PAIRS, "text", _OF_PAIRS, _preference),
    "ipo": (PAIRS, "text", _OF_PAIRS, _preference),
    "simpo": (PAIRS, "", _OF_PAIRS, _preference),
    "orpo": (PAIRS, "", _OF_PAIRS, _preference),
    "kto": (LABELS, "text", _OF_LABELS, _kto),
    "policy_gradient": (EPISODES, "", _OF_EPISODES, _policy_gradient),
    "reward": (PAIRS, "", _OF_REWARDS, _reward),
}

# Labels have none: what each is worth depends on the batch's reference point.
_COUNTS = {EXAMPLES: _count_targets, PAIRS: _count_pairs, EPISODES: _count_episodes}

_KEYS = {
    "sft": ("weighting",),
    "gkd": ("weighting", "divergence", "temperature"),
    "dpo": ("beta", "label_smoothing", "sft", "reference"),
    "ipo": ("beta", "by_token", "reference"),
    "simpo": ("beta", "margin"),
    "orpo": ("odds_weight",),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "policy_gradient": ("clip_low", "clip_high", "truncate", "aggregate"),
    "reward": ("centring",),
}
