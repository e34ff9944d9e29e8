"""Matrices in the forms that decoding reads them in.

**int8 with scales** (weight-only quantisation), for decoding that waits for memory. Symmetric: each
output of a matrix has a scale, with which its largest weight is 127. They become numbers again just
before each product, in the type that the model computes in. On accelerators the compiler makes that
part of the product, which then reads a quarter of float32's bytes; on a CPU it is a pass of its own
and costs time.

**Turned**, a row of inputs for each output, for CPUs: XLA's backend packs the second operand of a
product anew in each step, which for few rows is much of the work, and a third less of it where the
axis that is summed over comes last. Turned once, before the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

_PARTS = 4  # of a matrix that is multiplied with one vector


class Int8(NamedTuple):
    """A matrix; its scales have size 1 along the axes that its products sum over."""

    values: jax.Array
    scales: jax.Array

    def back(self, dtype: str) -> jax.Array:
        return self.values.astype(dtype) * self.scales.astype(dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows_OxI"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class Turned:
    """A matrix of O outputs and I inputs; `shape` is that of the parameter, inputs first."""

    rows_OxI: jax.Array
    shape: tuple[int, ...]

    def back(self, dtype: str) -> jax.Array:
        return self.rows_OxI.T.reshape(self.shape)


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


def turned(boxed: Any, params: Any) -> Any:
    """Parameters with `Turned` in the place of the matrices of unrolled layers.

    Those of stacked layers (`scan`) stay: what is cut out of a stack would be turned in each step.

    Args:
      boxed: as of `quantised`.
    """
    return jax.tree.map(_turned, boxed, params, is_leaf=_is_box)


def _turned(box: nn.Partitioned, x: jax.Array) -> jax.Array | Turned:
    summed = _summed(box.names)
    if not summed or "vocab" in box.names or "layers" in box.names:
        return x
    inputs = math.prod(x.shape[axis] for axis in summed)  # axes 0, 1, …
    # The barrier keeps the compiler from turning it back here, and anew in the loop.
    return Turned(jax.lax.optimization_barrier(x.reshape(inputs, -1).T), x.shape)


def by_outputs(x: jax.Array, rows_OxI: jax.Array) -> jax.Array:
    """The product of (…, inputs) with a turned matrix, (…, outputs)."""
    outputs, inputs = rows_OxI.shape
    if x.size > inputs or outputs % _PARTS:
        return x @ rows_OxI.T
    # One thread of XLA's CPU backend multiplies a matrix with a vector, and several its parts.
    copies_NxI = jnp.broadcast_to(x.reshape(1, inputs), (_PARTS, inputs))
    found_NxO = jnp.einsum("ni,noi->no", copies_NxI, rows_OxI.reshape(_PARTS, -1, inputs))
    return found_NxO.reshape(*x.shape[:-1], outputs)


def _summed(names: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of a parameter over which its products sum; none: it is no matrix."""
    first = int(names[0] == "layers")
    if "embed" not in names or len(names) - first < 2:
        return ()
    if "vocab" in names or names[-1] != "embed":
        return (names.index("embed"),)
    return tuple(range(first, len(names) - 1))


def whole(variables: Any, dtype: str) -> Any:
    """The variables that a model takes, of those with parameters in any form.

    Turned matrices are in the collection `turned` besides, as their products read them; as
    parameters they are then read for their shapes alone.
    """
    forms = (Int8, Turned)

    def one(x):
        return x.back(dtype) if isinstance(x, forms) else x

    found = jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, forms))
    leaves = traverse_util.flatten_dict(variables["params"])
    rows = {path: x.rows_OxI for path, x in leaves.items() if isinstance(x, Turned)}
    return found | {"turned": traverse_util.unflatten_dict(rows)} if rows else found


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)
