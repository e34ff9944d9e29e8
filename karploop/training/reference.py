"""What a model that is not trained says of a stage's texts, read once before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from karploop.config import TrainConfig
from karploop.training.packing import Batch, Unit, pack


def logprobs_of(
    units: Sequence[Unit], read: Callable[[Batch], np.ndarray], config: TrainConfig
) -> list[list[np.ndarray]]:
    """Log-probabilities (nats) of each unit's texts, of each text's targets.

    Args:
      read: logprobs_BxL of a batch that is packed as in training, so that a model compared with
        itself differs by rounding at most.
    """
    found: list[list[np.ndarray]] = [[] for _ in units]
    rows = config.rows // config.accumulation  # no more at a time than in training
    order, share = iter(range(len(units))), config.share_prompts
    for batch, taken in pack(units, order, rows, config.row_length, share=share):
        logprobs_BxL = read(batch)
        learnt_BxL = batch.weights_BxL > 0
        place = 0
        for unit in taken:
            for _ in units[unit]:
                inside_BxL = learnt_BxL & (batch.places_BxL == place)
                found[unit].append(logprobs_BxL[inside_BxL].astype(np.float32))
                place += 1
    return found
