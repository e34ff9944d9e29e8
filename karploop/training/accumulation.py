"""The gradient of a step's rows, taken a part of them at a time.

What a step holds in memory grows with the rows whose activations wait for the backward pass. Here
parts of the rows go through the model one after the other. A part's loss is a mean over its own
tokens or pairs, of which parts have unequally many: what is summed is its share in the mean over
all. So the sum is the gradient of all rows at once, but for rounding.

An objective that is a mean over texts says over how many (`Objective.count`), from the batch alone.
One that is not, such as KTO, whose reference point is of the whole batch, takes two passes: the
what it reads of all rows and the slope of the loss at each of these, then the model's gradient
along these slopes (arXiv 2101.06983, section 3.2). It costs a forward pass more.

Shape suffixes: A parts, B rows of a part, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from karploop.training.objectives import Objective
from karploop.training.packing import Batch, places

Found = tuple[jax.Array, ...]  # what the objective reads, of each target or text; and what else
Look = Callable[[Any, Batch], Found]


def split(batch: Batch, parts: int) -> Batch:
    """A batch that was packed in so many parts, with an axis of parts in front of every array."""
    split_up = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    first_Ax1x1 = np.arange(parts, dtype=np.int32)[:, None, None] * _places(split_up)
    local_AxBxL = np.maximum(split_up.places_BxL - first_Ax1x1, 0)  # padding stays at 0
    return split_up._replace(places_BxL=local_AxBxL)


def joined(batch: Batch) -> Batch:
    """What `split` took apart, but for the places of padding, which nothing reads."""
    parts = len(batch.places_BxL)
    first_Ax1x1 = jnp.arange(parts, dtype=jnp.int32)[:, None, None] * _places(batch)
    return _join(batch._replace(places_BxL=batch.places_BxL + first_Ax1x1))


def accumulated(look: Look, objective: Objective, trained: Any, batch: Batch) -> tuple[Any, Found]:
    """The gradient of the objective's loss over all parts, and what was read of all rows.

    Args:
      look: (trained, part) → (what the objective reads, …); pure.
      trained: the tree by which to differentiate.
      batch: as `split` makes it.
    """
    whole = joined(batch)
    if objective.count:
        counts_A = jax.vmap(objective.count)(batch).astype(jnp.float32)
        weights = counts_A / jnp.maximum(counts_A.sum(), 1.0)

        def loss_of(trained, part, share):
            found = look(trained, part)
            return share * objective.loss(found[0], part)[0], found

    else:
        read_AxX = jax.lax.map(lambda part: look(trained, part)[0], batch)
        slopes = jax.grad(lambda x: objective.loss(_join(x), whole)[0])
        weights = slopes(read_AxX)

        def loss_of(trained, part, slopes_BxL):
            found = look(trained, part)
            return jnp.sum(slopes_BxL * found[0]), found

    def add(total, part):
        gradient, found = jax.grad(loss_of, has_aux=True)(trained, *part)
        return jax.tree.map(jnp.add, total, gradient), found

    zero = jax.tree.map(jnp.zeros_like, trained)
    gradient, found = jax.lax.scan(add, zero, (batch, weights))
    return gradient, _join(found)


def _places(batch: Batch) -> int:
    """Places of a part."""
    return places(*batch.places_BxL.shape[1:])


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
