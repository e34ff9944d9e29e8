"""The head of a reward model that was trained with what lies below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from karploop.config import TrainConfig
from karploop.models.reward_head import RewardHead
from karploop.training.packing import Unit, pack
from karploop.training.parts import head_of
from karploop.training.trainer import Trainer


def centred_head(
    trainer: Trainer,
    trained: Any,
    frozen: Any,
    units: Sequence[Unit],
    weights_N: np.ndarray,
    config: TrainConfig,
) -> RewardHead:
    """The head with an offset by which the pairs that it was trained on have a mean reward of 0.

    Reads every pair once more, for rewards have moved since a step saw it.

    Args:
      trained, frozen: as the last step left them.
      weights_N: of the pairs.
    """
    means_N = np.zeros(len(units))
    order, share = iter(range(len(units))), config.share_prompts
    for batch, taken in pack(units, order, config.rows, config.row_length, share=share):
        rewards_T = trainer.rewards(trained, batch, frozen).astype(np.float64)
        means_N[taken] = rewards_T[: 2 * len(taken)].reshape(-1, 2).mean(1)
    return RewardHead(head_of(trained), -float(np.average(means_N, weights=weights_N)))
