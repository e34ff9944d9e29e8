"""A conditional whose backward pass keeps nothing from the forward pass.

What `jax.lax.cond` must know to go backwards leaves its branch as a result, and with it every
matrix that the branch multiplied by: a copy each time, of an output matrix that is the largest
array of a small model. Here the branch is gone through again, within one conditional.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def if_wanted(
    look: Callable[..., Sequence[jax.Array]], wanted: jax.Array, *given: jax.Array
) -> Sequence[jax.Array]:
    """look(*given) if `wanted`, a bool, and zeros of the same shapes if not.

    What `look` closes over may have a gradient as well as what it is given.
    """
    whole, closed = jax.closure_convert(look, *given)
    return _if_wanted(whole, wanted, *given, *closed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _if_wanted(look, wanted, *operands):
    return _either(look, wanted, *operands)


def _either(function, wanted, *operands):
    def nothing(*operands):
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *operands)
        )

    return jax.lax.cond(wanted, function, nothing, *operands)


def _forward(look, wanted, *operands):
    # () and None are no arrays: which operands have a gradient is known when this is traced.
    learns = tuple(() if x.perturbed else None for x in operands)
    values = tuple(x.value for x in operands)
    return _either(look, wanted.value, *values), (wanted.value, values, learns)


def _backward(look, kept, slopes):
    wanted, operands, learns = kept
    places = [place for place, mark in enumerate(learns) if mark is not None]
    slopes = [_dense(x) for x in slopes if jnp.issubdtype(x.dtype, jnp.inexact)]

    def back(operands, slopes):
        def found(*learning) -> list[Any]:
            whole = list(operands)
            for place, x in zip(places, learning, strict=True):
                whole[place] = x
            return [x for x in look(*whole) if jnp.issubdtype(x.dtype, jnp.inexact)]

        return jax.vjp(found, *(operands[place] for place in places))[1](slopes)

    gradients: list[Any] = [None] * len(operands)
    for place, x in zip(places, _either(back, wanted, operands, slopes), strict=True):
        gradients[place] = x
    return None, *gradients


def _dense(x):
    is_zero = isinstance(x, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(x.shape, x.dtype) if is_zero else x


_if_wanted.defvjp(_forward, _backward, symbolic_zeros=True)
