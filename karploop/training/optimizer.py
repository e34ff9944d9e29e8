"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import jax
import optax
import optax.contrib

from karploop.config import ADAPTABLE, OptimizerConfig


def learning_rate(config: OptimizerConfig, done: int, total: int, size: int = 1) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): linear up, flat, linear down to `final` × peak.

    Computed on the host and passed to the step as an argument, so that stages of different length
    share one compiled program.

    Args:
      done, total: of what the stage's length is counted in, before this step and in the end.
      size: of this step.
    """
    warmup, decay = config.warmup * total, config.decay * total
    up = min(1.0, (done + size) / warmup) if warmup else 1.0
    left = total - done
    down = config.final + (1 - config.final) * left / decay if decay and left < decay else 1.0
    return config.learning_rate * min(up, down)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """An optimiser at unit learning rate: the training step multiplies its updates by the rate.

    AdamW decays matrices only, not norms and biases. Muon (orthogonalised momentum, arXiv
    2502.16982) takes the matrices inside the layers at `muon_scale` times the learning rate, and
    decays them; embedding, head and norm scales stay with Adam (in Nesterov's form, without decay).
    An adapter's factors are matrices to both. Gradients are clipped to a global norm of `clip_norm`
    first.
    """
    if config.name == "muon":
        direction = optax.contrib.muon(
            config.muon_scale,
            adam_learning_rate=1.0,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrix_axes,
        )
    else:
        direction = optax.adamw(
            1.0,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[-1].key in _MATRICES, params
            ),
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, direction)


_MATRICES = {"embedding", "head", *ADAPTABLE, "a", "b"}


def _matrix_axes(params):
    """Which axes of each layer matrix are its input and its output; None for everything else.

    Counted from the last, for scanned layers have one axis more in front.
    """

    def axes(path, x):
        name = path[-1].key
        if name == "a":  # (inputs …, rank); `out` alone has two axes of inputs
            first = (-3, -2) if path[-2].key == "out" else -2
            return optax.contrib.MuonDimensionNumbers(first, -1)
        if name == "b":  # (rank, outputs …)
            heads = path[-2].key in ("query", "key", "value")
            return optax.contrib.MuonDimensionNumbers(*((-3, (-2, -1)) if heads else (-2, -1)))
        if name in ("query", "key", "value"):  # (embed, heads, head width)
            return optax.contrib.MuonDimensionNumbers(-3, (-2, -1))
        if name == "out":  # (heads, head width, embed)
            return optax.contrib.MuonDimensionNumbers((-3, -2), -1)
        if name in ("up", "gate", "down"):
            return optax.contrib.MuonDimensionNumbers(-2, -1)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)
