"""A reward model of comparisons that learns with more than its head.

The steps are those of the `train` stage, on comparisons that no stage wrote.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from karploop.config import LoraConfig, ObjectiveConfig, RewardConfig, TrainConfig
from karploop.models.lora import Lora
from karploop.models.weights import Weights
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.stages import StageContext
from karploop.training.lessons import Lesson, rewarded
from karploop.training.objectives import make_objective
from karploop.training.packing import Unit, pack, stream
from karploop.training.parts import head_of, without_head
from karploop.training.train import descend
from karploop.training.trainer import Trainer


@dataclass(frozen=True)
class Tuned:
    """What was trained, on the mesh.

    Attributes:
      params: whole, an adapter merged into them.
      adapter, lora: the adapter and its kind; None where all parameters were trained.
      weights_E: of the head, without an offset.
    """

    params: Any
    adapter: Any | None
    lora: Lora | None
    weights_E: np.ndarray


def tune(
    weights: Weights,
    params: Any,
    pairs: Sequence[Sequence[Sequence[int]]],
    weights_N: np.ndarray,
    config: RewardConfig,
    progress: Progress,
) -> Tuned:
    """Trains an adapter or everything, and a head, on pairs of a better and a worse text.

    Args:
      params: of the checkpoint; donated, where all of them are trained.
      pairs: tokens of both texts, stop token included, of which a row has room for each.
      weights_N: of the pairs, in the loss.

    Raises:
      UserError: two texts do not fit into a batch together, or the model has no such matrix.
      Diverged: the loss became NaN or infinite.
    """
    settings = config.train
    kind = settings.lora if config.tune == "lora" else LoraConfig()
    objective = make_objective(ObjectiveConfig("reward", centring=config.centring), longest=1)
    trainer = Trainer(weights, settings.optimizer, kind, objective)
    units = [
        tuple(rewarded(text, settings.row_length, weight=float(weight)) for text in pair)
        for pair, weight in zip(pairs, weights_N, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        context = StageContext(
            inputs={},
            rng=Rng(config.seed, 0, -1),
            stage="reward",
            directory=pathlib.Path(scratch),
            partial=epath.Path(scratch),
            progress=lambda total, unit: progress.stage(None, "train", total, unit),
            stop_requested=lambda: False,
            say=progress.say,
        )
        steps = _steps(units, context.numpy_rng, config)
        stage = TrainConfig(
            steps=steps,
            rows=settings.rows,
            row_length=settings.row_length,
            checkpoint_every=steps,  # none: it is begun anew when it is interrupted
            optimizer=settings.optimizer,
        )
        origins = [(("input", i), ("input", i)) for i in range(len(units))]
        trained, frozen = trainer.parts.divide(params, context.key)
        lesson = Lesson(units, origins, np.ones(len(units)))
        begin = functools.partial(trainer.start, trained)
        state, _, _ = descend(context, trainer, lesson, stage, frozen, begin)
    body, weights_E = without_head(state.params), head_of(state.params)
    if config.tune == "full":
        return Tuned(body, None, None, weights_E)
    lora = Lora(weights.boxed, weights.mesh, kind)
    return Tuned(weights.merge(frozen, body, lora.scale), body, lora, weights_E)


def _steps(units: Sequence[Unit], rng: np.random.Generator, config: RewardConfig) -> int:
    """How many batches it takes to see every unit so often."""
    order = itertools.islice(stream(np.ones(len(units)), rng), config.train.epochs * len(units))
    return sum(1 for _ in pack(units, order, config.train.rows, config.train.row_length))
