"""Matrices as int8 with scales (weight-only quantisation), for decoding that waits for memory.

Symmetric: each output of a matrix has a scale, with which its largest weight is 127. They become
numbers again just before each product, in the type that the model computes in. On accelerators the
compiler makes that part of the product, which then reads a quarter of float32's bytes; on a CPU it
is a pass of its own and costs time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """A matrix; its scales have size 1 along the axes that its products sum over."""

    values: jax.Array
    scales: jax.Array


def quantised(boxed: Any, params: Any) -> Any:
    """Parameters with `Int8` in the place of matrices; norms and biases stay as they are.

    Args:
      boxed: the parameters' shapes with their logical axes, as `Weights.boxed`.
    """
    return jax.tree.map(_quantised, boxed, params, is_leaf=_is_box)


def _quantised(box: nn.Partitioned, x: jax.Array) -> jax.Array | Int8:
    summed = _summed(box.names)
    if not summed:
        return x
    largest = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
    scales = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
    return Int8(jnp.round(x / scales).astype(jnp.int8), scales)


def _summed(names: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of a parameter over which its products sum; none: it is no matrix."""
    first = int(names[0] == "layers")
    if "embed" not in names or len(names) - first < 2:
        return ()
    if "vocab" in names or names[-1] != "embed":
        return (names.index("embed"),)
    return tuple(range(first, len(names) - 1))


def whole(params: Any, dtype: str) -> Any:
    """The parameters that a model takes, of those with or without `Int8`."""

    def one(x):
        return x.values.astype(dtype) * x.scales.astype(dtype) if isinstance(x, Int8) else x

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Int8))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)
